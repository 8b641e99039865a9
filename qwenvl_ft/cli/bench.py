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
    from qwenvl_ft.bench.lines import step_text
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
    _tell(result.to_json(), as_json, lambda _: step_text(result))
    if costs:
        typer.echo(costs, err=as_json)


def data(
    file: Annotated[Path | None, typer.Argument(help="Records; without, photos and questions are made.")] = None,
    model: Annotated[str | None, typer.Option(help="Whose processor; without, a small tokenizer's.")] = None,
    media_root: Annotated[str | None, typer.Option(help="Folder that relative media start at.")] = None,
    records: Annotated[int, typer.Option(help="Records that are encoded.", min=8)] = 200,
    max_pixels: Annotated[int, typer.Option(help="Area of an image after resizing.", min=1024)] = 200_704,
    row_length: Annotated[int, typer.Option(help="Tokens of a packed row.", min=64)] = 4096,
    as_json: JSON = False,
) -> None:
    """Plan, encode and join records on one core, beside decoding and resizing alone."""
    from qwenvl_ft.bench.data import bench_data
    from qwenvl_ft.bench.lines import data_text
    from qwenvl_ft.bench.sizes import bench_processor
    from qwenvl_ft.model.load import load_processor

    processor = load_processor(model, max_pixels=max_pixels) if model else bench_processor(max_pixels=max_pixels)
    told = bench_data(processor, file, media_root=media_root, records=records, row_length=row_length).to_json()
    _tell(told, as_json, data_text)


def loss(
    tokens: Annotated[int, typer.Option(help="Tokens of the row.", min=64)] = 16_384,
    supervised_share: Annotated[float, typer.Option(help="Share that is answers.", min=0.01, max=1)] = 0.25,
    vocabulary: Annotated[int, typer.Option(help="Words.", min=64)] = 151_936,
    width: Annotated[int, typer.Option(help="Hidden size.", min=8)] = 256,
    as_json: JSON = False,
) -> None:
    """Peak memory of the language head and the loss: of supervised tokens in chunks, and of all logits at once."""
    from qwenvl_ft.bench.lines import loss_text
    from qwenvl_ft.bench.parts import bench_loss

    sizes = {"supervised_share": supervised_share, "vocabulary": vocabulary, "width": width}
    _tell(bench_loss(tokens=tokens, **sizes), as_json, loss_text)  # type: ignore[arg-type]


def attention(
    tokens: Annotated[int, typer.Option(help="Tokens of the row.", min=64)] = 8192,
    samples: Annotated[int, typer.Option(help="Samples in it.", min=1)] = 32,
    rounds: Annotated[int, typer.Option(help="Turns; the fastest counts.", min=1)] = 3,
    as_json: JSON = False,
) -> None:
    """Attention over a packed row, forward and backward: per sample, and with the block mask."""
    from qwenvl_ft.bench.lines import attention_text
    from qwenvl_ft.bench.parts import bench_attention

    _tell(bench_attention(tokens=tokens, samples=samples, rounds=rounds), as_json, attention_text)


def memory(
    sizes: Annotated[list[str] | None, typer.Argument(help="2b, 4b, 8b if none is named.")] = None,
    row_length: Annotated[list[int] | None, typer.Option(help="Tokens of a row; may be repeated.")] = None,
    image_share: Annotated[float, typer.Option(help="Share of tokens that are images.", min=0, max=0.9)] = 0.5,
    as_json: JSON = False,
) -> None:
    """GPU memory of training, computed without a GPU: full and LoRA, by row length."""
    from dataclasses import asdict

    from qwenvl_ft.bench.lines import memory_text
    from qwenvl_ft.bench.memory import SETTINGS
    from qwenvl_ft.bench.memory import memory as computed

    told = [
        computed(size, train_type, length, image_share=image_share)
        for size in sizes or ("2b", "4b", "8b")
        for train_type in SETTINGS
        for length in row_length or (4096, 8192, 16_384)
    ]
    entries = [asdict(entry) | {"total": entry.total} for entry in told]
    _tell({"computed": entries}, as_json, lambda _: memory_text(told))


def fit(
    size: SIZE = "mini",
    row_length: Annotated[int, typer.Option(help="Tokens of the longest row that is timed.", min=256)] = 2048,
    rounds: Annotated[int, typer.Option(help="Turns of each row; the fastest counts.", min=1)] = 2,
    freeze_vit: Annotated[bool, typer.Option("--freeze-vit", help="As the runs will.")] = False,
    as_json: JSON = False,
) -> None:
    """Time rows of very different make, fit what tokens and patches cost, and keep it for the plans of this machine."""
    from dataclasses import asdict

    from qwenvl_ft.bench.fit import bench_fit, keep

    costs, explained = bench_fit(size, row_length=row_length, rounds=rounds, trains_vision=not freeze_vit)
    told = asdict(costs) | {"explained": round(explained, 3), "file": str(keep(costs, explained))}
    _tell(told, as_json, lambda told: "\n".join(f"{name:<13} {value}" for name, value in told.items()))


def growth(
    what: Annotated[Literal["rows", "records"], typer.Argument(help="By row length, or by number of records.")],
    size: SIZE = "tiny",
    most: Annotated[int | None, typer.Option(help="Longest row, or most records.", min=2048)] = None,
    svg: Annotated[Path | None, typer.Option(help="Draw it into this file.")] = None,
) -> None:
    """How training speed grows with row length, and the data path with records; a JSON object a line."""
    from qwenvl_ft.bench.growth import RECORDS, ROW_LENGTHS, grow_records, grow_rows, plot_records, plot_rows

    steps = [at for at in (ROW_LENGTHS if what == "rows" else RECORDS) if most is None or at <= most]
    told = []
    for entry in grow_rows(size, steps) if what == "rows" else grow_records(steps):
        typer.echo(json.dumps(entry))
        told.append(entry)
    if svg is not None:
        svg.write_text(plot_rows(told, size) if what == "rows" else plot_records(told), encoding="utf-8")


COMMANDS: dict[str, Callable[..., None]] = {
    "data": data,
    "step": step,
    "loss": loss,
    "attention": attention,
    "memory": memory,
    "growth": growth,
    "fit": fit,
}
"""What can be measured -> the command."""


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
