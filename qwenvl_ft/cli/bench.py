"""``qwenvl-ft bench WHAT``: how fast and how large things are, on this machine."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

SIZE = Annotated[str, typer.Option(help="tiny, mini, 2b, 4b, 8b or 30b-a3b; random weights, nothing is downloaded.")]
SETTINGS = Annotated[
    list[str] | None, typer.Argument(metavar="[section.key=value]...", help="More of the recipe, as for training.")
]
JSON = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def step(
    settings: SETTINGS = None,
    size: SIZE = "tiny",
    train_type: Annotated[Literal["full", "lora"], typer.Option(help="All weights, or LoRA on the text.")] = "full",
    row_length: Annotated[int, typer.Option(help="Tokens of a packed row.", min=64)] = 8192,
    image_share: Annotated[float, typer.Option(help="Share of tokens that are images.", min=0, max=0.9)] = 0.5,
    supervised_share: Annotated[float, typer.Option(help="Share that is answers.", min=0.01, max=0.9)] = 0.25,
    mean_sample: Annotated[
        int | None, typer.Option(help="Tokens of a sample, log-normal around it; 512, or less in short rows.", min=64)
    ] = None,
    rows: Annotated[int, typer.Option(help="Rows of a step.", min=1)] = 1,
    steps: Annotated[int, typer.Option(help="Steps that are measured.", min=1)] = 8,
    warmup: Annotated[int, typer.Option(help="Steps before them.", min=1)] = 2,
    attn_impl: Annotated[str, typer.Option(help="As model.attn_impl.")] = "auto",
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile.")] = False,
    checkpointing: Annotated[bool, typer.Option(help="Gradient checkpointing.")] = True,
    profile: Annotated[Path | None, typer.Option(help="Folder for a Chrome trace; prints the top costs.")] = None,
    as_json: JSON = False,
) -> None:
    """Train a few real steps: tokens/s, step time, peak memory, share of the device's peak."""
    from qwenvl_ft.bench.report import step_text
    from qwenvl_ft.bench.step import StepOptions, bench_step

    result, costs = bench_step(
        StepOptions(
            size=size,
            train_type=train_type,
            row_length=row_length,
            image_share=image_share,
            supervised_share=supervised_share,
            mean_sample=mean_sample,
            rows=rows,
            steps=steps,
            warmup=warmup,
            compile=compile,
            checkpointing=checkpointing,
            settings=(f"model.attn_impl={attn_impl}", *(settings or ())),
            profile=profile,
        )
    )
    _tell(result.told(), as_json, lambda _: step_text(result))
    if costs:
        typer.echo(costs, err=as_json)


COMMANDS: dict[str, Callable[..., None]] = {"step": step}


def bench(words: list[str]) -> int:
    """Run one of the measurements with the rest of the command line."""
    app = typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        no_args_is_help=True,
        help="Measure the library on this machine.",
    )
    app.callback()(lambda: None)
    for name, function in COMMANDS.items():
        app.command(name)(function)
    app(args=["fit", *words[1:]] if words[:1] == ["--fit"] else words, prog_name="qwenvl-ft bench")
    return 0


def _tell(told: dict[str, Any], as_json: bool, text: Callable[[dict[str, Any]], str]) -> None:
    typer.echo(json.dumps(told) if as_json else text(told))
