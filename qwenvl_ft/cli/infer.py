"""``qwenvl-ft infer``: asks a model about images, with the code that evaluates during training."""

from pathlib import Path
from typing import Annotated, Any

import typer

HighBitDepth = Annotated[
    str | None,
    typer.Option(
        help="How values deeper than 8 bits become 8 bits: error, window, minmax, percentile or clip. Without it, as "
        "the model was trained."
    ),
]
Window = Annotated[
    tuple[float, float] | None, typer.Option(help="Lowest and highest value of the images, as in -160 240.")
]
ImageFrame = Annotated[
    int | None, typer.Option(help="Frame, page or slice of image files with several, counted from 0.")
]


def infer(
    model: Annotated[str, typer.Option(help="Directory or hub id of a model, or an adapter's directory.")],
    prompt: Annotated[
        str, typer.Option(help="The question. <image> marks the place of an image; without it, all images come first.")
    ],
    image: Annotated[list[str] | None, typer.Option(help="Image file or URL. May be repeated.")] = None,
    adapter: Annotated[
        list[Path] | None,
        typer.Option(help="Directory of an adapter to load on the model. May be repeated; each adapter answers."),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System prompt, if the model was trained with one.")] = None,
    tools: Annotated[
        str | None, typer.Option(help="Function schemas, as template.tools_prompt, if the model was trained with some.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum length of the answer, in tokens.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 is greedy decoding; above 0, sample.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed for sampling.")] = 0,
    high_bit_depth: HighBitDepth = None,
    window: Window = None,
    image_frame: ImageFrame = None,
    torch_dtype: Annotated[
        str, typer.Option(help="bfloat16, float16, float32, or auto for the saved precision.")
    ] = "auto",
    attn_impl: Annotated[str, typer.Option(help="Attention implementation, as model.attn_impl in a recipe.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of only the answer.")] = False,
) -> None:
    """Ask a model one question about any number of images, and print its answer."""
    import json

    from transformers.utils import logging

    from qwenvl_ft.data.encode.tools_prompt import read_tools
    from qwenvl_ft.data.media.reading import reading_of

    if temperature < 0:
        raise typer.BadParameter(f"{temperature} is below 0", param_hint="--temperature")
    options: dict[str, Any] = {
        "system": system,
        "tools": read_tools(tools, "--tools") if tools else None,
        "reading": reading_of({"high_bit_depth": high_bit_depth, "window": window, "image_frame": image_frame}, "--"),
    }
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    loaded, answerers = load(model, adapter or [], torch_dtype=torch_dtype, attn_impl=attn_impl)
    for folder, (_, processor) in zip(adapter or [Path(model)], answerers, strict=True):
        say_losses(folder, loaded.config.model_type)
        say_switches(folder, processor)
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {}
    for number, (source, processor) in enumerate(answerers):
        if adapter:
            loaded.set_adapter(f"adapter_{number}")
        encoder = encoder_of(processor, **options)
        asked = record(prompt, image or [])
        if number == 0:
            say_frames(asked["image"], encoder.policy)
        answer, seconds = ask(loaded, encoder, asked, seed, max_new_tokens=max_new_tokens, **sampling)
        result = {"answer": answer, "model": model, "seconds": seconds} | ({"adapter": source} if adapter else {})
        line = f"{source}: {answer}" if len(answerers) > 1 else answer
        typer.echo(json.dumps(result, ensure_ascii=False) if as_json else line)


def encoder_of(processor: Any, *, system: str | None, tools: list[dict[str, Any]] | None, reading: Any) -> Any:
    """Return an encoder that may fetch URLs, and reads images as the flags say, else as the model was trained."""
    from qwenvl_ft.data.encode.encoder import Encoder
    from qwenvl_ft.data.media.images import MediaPolicy
    from qwenvl_ft.data.media.reading import saved_reading

    policy = MediaPolicy(allow_urls=True, reading=reading.over(saved_reading(processor)))
    return Encoder(processor, system_prompt=system, tools=tools, policy=policy)


def say_frames(images: list[str], policy: Any) -> None:
    """Name the images of several frames of which none was chosen."""
    from qwenvl_ft.data.media.frames import unchosen

    for shown in unchosen(images, policy):
        typer.echo(f"frame 0 is shown of {shown}; --image-frame chooses another", err=True)


def say_losses(folder: Path, model_type: str) -> None:
    """Say which serving engines would answer without the adapter in a folder, or without a part of it."""
    from qwenvl_ft.export.engines import silent_losses

    if (folder / "adapter_config.json").is_file():
        for line in silent_losses(folder, model_type):
            typer.echo(f"note: {line}", err=True)


def say_switches(folder: Path, processor: Any) -> None:
    """Say how a server renders prompts as the training run in a folder, if its chat template has switches."""
    import shlex

    from qwenvl_ft.export.chat_template import switches_flag, switches_of

    if flag := switches_flag(switches_of(folder, processor)):
        typer.echo(f"note: serve it with {shlex.join(flag)}, as it was trained", err=True)


def ask(model: Any, encoder: Any, asked: dict[str, Any], seed: int, **options: Any) -> tuple[str, float]:
    """Return the answer to a record, and how many seconds it took."""
    import time

    import torch

    from qwenvl_ft.evaluation.generate import generate

    torch.manual_seed(seed)
    start = time.perf_counter()
    (answer,) = generate(model, encoder.processor, [asked], encoder=encoder, **options)
    return answer, round(time.perf_counter() - start, 3)


def record(prompt: str, images: list[str]) -> dict[str, Any]:
    """Return the question as a record, with the images where the prompt has ``<image>``, else before it."""
    from qwenvl_ft.data.readers.media_pool import TAGS

    tags = "" if TAGS.search(prompt) else "<image>\n" * len(images)
    places = [path if "://" in path else str(Path(path).expanduser().resolve()) for path in images]
    return {"id": "prompt", "image": places, "conversations": [{"from": "human", "value": tags + prompt}]}


def load(model: str, adapters: list[Path], *, torch_dtype: str, attn_impl: str) -> tuple[Any, list[tuple[str, Any]]]:
    """Load a model and its adapters, on a GPU if there is one.

    Returns:
        The model, with adapters named adapter_0, adapter_1, ..., and a list of (directory, processor): one pair per
        adapter, or a single pair for the model itself.

    Raises:
        CheckpointError: a directory holds no model or adapter, or the adapters use different methods.
    """
    import torch

    from qwenvl_ft.errors import CheckpointError
    from qwenvl_ft.model.adapters.load import trained_lengths, with_adapter
    from qwenvl_ft.model.load import load_model, load_processor
    from qwenvl_ft.model.source import PROCESSOR_FILES

    for adapter in adapters:
        if not (adapter / "adapter_config.json").is_file():
            raise CheckpointError(f"{adapter} has no adapter_config.json, so it is not an adapter's directory.")
    lengths = [trained_lengths(adapter) for adapter in adapters] or [(None, None)]
    if any(other != lengths[0] for other in lengths):
        raise CheckpointError(
            f"the adapters were trained with different rope_scaling: {lengths}. Run infer for each of them."
        )
    scaling, longest = lengths[0]
    loaded = load_model(
        model, torch_dtype=torch_dtype, attn_impl=attn_impl, rope_scaling=scaling, max_model_len=longest
    )
    answerers = []
    for number, adapter in enumerate(adapters):
        loaded = with_adapter(loaded, adapter, name=f"adapter_{number}")
        has_processor = any((adapter / name).is_file() for name in PROCESSOR_FILES)
        answerers.append((str(adapter), load_processor(str(adapter) if has_processor else model)))
    return loaded.to("cuda" if torch.cuda.is_available() else "cpu"), answerers or [(model, load_processor(model))]
