"""``qwenvl-ft serve-check``: compares a server's answers with those of the trained model."""

from pathlib import Path
from typing import Annotated, Any

import typer


def serve_check(
    url: Annotated[str, typer.Option(help="API of an OpenAI-compatible server: http://127.0.0.1:8000/v1.")],
    model: Annotated[Path, typer.Option(help="Folder of the trained model: a run, a checkpoint or a merged model.")],
    data: Annotated[
        str,
        typer.Option(
            help="Records, written as in data.train and read as the run's recipe says. Videos need vLLM with "
            "--trust-request-mm-kwargs."
        ),
    ],
    served_name: Annotated[str | None, typer.Option(help="Name of the served model, if there are several.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Number of records that are asked.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of an answer, in tokens.")] = 64,
    tie_margin: Annotated[
        float, typer.Option(help="Two tokens whose log-probabilities are closer than this, in nats, are a tie.")
    ] = 0.1,
    torch_dtype: Annotated[
        str, typer.Option(help="bfloat16, float16, float32, or auto for the saved precision.")
    ] = "auto",
    attn_impl: Annotated[str, typer.Option(help="Attention implementation, as model.attn_impl in a recipe.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Ask a server and the trained model the same questions greedily; exit code 1 if they do not agree."""
    import json
    from dataclasses import asdict

    from transformers.utils import logging

    from qwenvl_ft.cli.infer import load
    from qwenvl_ft.data.readers import read_record
    from qwenvl_ft.data.sources.key_rules import KEEP_TRUE, KeyRules
    from qwenvl_ft.data.sources.mixture import load_options, register
    from qwenvl_ft.data.sources.records import load_records
    from qwenvl_ft.errors import DataError
    from qwenvl_ft.evaluation.served import Server, compare

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    section = trained_data(model)
    register(section)
    rules = {"rules": KeyRules(tuple(section.ignored_keys), KEEP_TRUE)}
    records = load_records(data, **load_options(section, seed=0) | rules)
    chosen = [read_record(*records[place]) for place in range(min(limit, len(records)))]
    server = Server(url, served_name, str(model))
    loaded, ((_, processor),) = load(str(model), [], torch_dtype=torch_dtype, attn_impl=attn_impl)
    found, left = compare(
        loaded,
        trained_encoder(model, processor),
        server,
        chosen,
        max_new_tokens=max_new_tokens,
        tie_margin=tie_margin,
    )
    if not found:
        raise DataError(f"{data}: the server cannot be asked about any record: {'; '.join(_reasons(left)) or 'none'}.")
    agree = sum(one.agrees for one in found)
    if as_json:
        not_asked = [{"source": source, "reason": reason} for source, reason in left]
        result = {"agree": agree, "records": [asdict(one) for one in found], "not_asked": not_asked}
        typer.echo(json.dumps(result, ensure_ascii=False))
    else:
        for line in report(found, left):
            typer.echo(line)
    if agree < len(found):
        raise typer.Exit(1)


def trained_data(folder: Path) -> Any:
    """Return the section ``data`` of the recipe beside a trained model, without keys that only other releases have."""
    from qwenvl_ft.recipe.provenance import saved_recipe
    from qwenvl_ft.recipe.sections import field_names
    from qwenvl_ft.recipe.sections.data import DataConfig

    saved = saved_recipe(folder).get("data") or {}
    return DataConfig(**{key: saved[key] for key in field_names(DataConfig) if key in saved})


def trained_encoder(folder: Path, processor: Any) -> Any:
    """Return an encoder by the recipe beside a trained model.

    It has the system prompt, tools, vision ids, thinking switch and limits on media of the run. Images deeper than 8
    bits are read as the processor says.
    """
    from dataclasses import replace

    from qwenvl_ft.data.encode.encoder import Encoder
    from qwenvl_ft.data.encode.tools_prompt import read_tools
    from qwenvl_ft.data.media.images import MediaPolicy
    from qwenvl_ft.data.media.reading import Reading, saved_reading
    from qwenvl_ft.recipe.provenance import saved_recipe

    template, data = saved_recipe(folder).get("template") or {}, trained_data(folder)
    reading = Reading(image_frame=data.image_frame).over(saved_reading(processor))
    return Encoder(
        processor,
        system_prompt=template.get("system_prompt"),
        tools=read_tools(template["tools_prompt"]) if template.get("tools_prompt") else None,
        add_vision_id=bool(template.get("add_vision_id")),
        enable_thinking=bool(template.get("enable_thinking")),
        policy=replace(MediaPolicy.of(data), reading=reading),
        max_record_bytes=data.max_record_bytes,
    )


def report(found: list[Any], left: list[tuple[str, str]]) -> list[str]:
    """Return the lines that describe a comparison.

    Args:
        left: (source, reason) of each record that was not asked.
    """
    lines = []
    for one in found:
        alike = one.tokens if one.first is None else one.first
        close = "" if one.logprob_gap is None else f", log-probabilities within {one.logprob_gap:.2g}"
        ending = "" if one.agrees else f": {one.cause or 'cause unknown'}"
        if one.first is not None and one.agrees:
            ending = f": then a tie ({one.gap:.2g} nats)"
        mark = "agrees" if one.agrees else "DIFFERS"
        lines.append(f"{mark}  {one.source}: {alike} of {one.tokens} tokens{close}{ending}")
    agree = sum(one.agrees for one in found)
    return [*lines, *(f"not asked  {line}" for line in _reasons(left)), f"{agree} of {len(found)} records agree"]


def _reasons(left: list[tuple[str, str]]) -> list[str]:
    """Return a text for each reason why records were not asked, with their number and the first of them."""
    records: dict[str, list[str]] = {}
    for source, reason in left:
        records.setdefault(reason, []).append(source)
    return [f"{len(sources)} from {sources[0]} on: {reason}" for reason, sources in records.items()]
