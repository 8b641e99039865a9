"""``qwenvl-ft bench NAME``: measures speed and memory on this machine."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

SIZE = Annotated[
    str,
    typer.Option(
        help="Model size: tiny, mini, 2b, 4b, 8b, 30b-a3b, or of Qwen3.5 qwen3.5-tiny, qwen3.5-0.8b, -2b, -4b, -9b, "
        "-27b, -35b-a3b, -122b-a10b, -397b-a17b, with random weights; nothing is downloaded."
    ),
]
SETTINGS = Annotated[
    list[str] | None, typer.Argument(metavar="[section.key=value]...", help="Further recipe settings, as for training.")
]
JSON = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def step(
    settings: SETTINGS = None,
    size: SIZE = "tiny",
    train_type: Annotated[
        Literal["full", "lora"], typer.Option(help="All weights, or LoRA on the language model.")
    ] = "full",
    row_length: Annotated[int, typer.Option(help="Length of a packed row, in tokens.", min=64)] = 8192,
    image_share: Annotated[float, typer.Option(help="Share of image tokens.", min=0, max=0.9)] = 0.5,
    supervised_share: Annotated[float, typer.Option(help="Share of supervised tokens.", min=0.01, max=0.9)] = 0.25,
    mean_sample: Annotated[
        int | None,
        typer.Option(help="Mean length of a sample, in tokens (log-normal); default 512, less in short rows.", min=64),
    ] = None,
    rows: Annotated[int, typer.Option(help="Number of rows per step.", min=1)] = 1,
    steps: Annotated[int, typer.Option(help="Number of measured steps.", min=1)] = 8,
    warmup: Annotated[int, typer.Option(help="Number of warm-up steps before them.", min=1)] = 2,
    attn_impl: Annotated[str, typer.Option(help="Attention implementation, as model.attn_impl.")] = "auto",
    compile: Annotated[bool, typer.Option("--compile", help="Use torch.compile.")] = False,
    checkpointing: Annotated[bool, typer.Option(help="Use gradient checkpointing.")] = True,
    sequence_parallel_size: Annotated[
        int, typer.Option(help="Processes that share a row; start a multiple of it by torchrun or accelerate.", min=1)
    ] = 1,
    profile: Annotated[
        Path | None, typer.Option(help="Folder for a Chrome trace; also prints the most expensive operations.")
    ] = None,
    as_json: JSON = False,
) -> None:
    """Run a few training steps and report tokens/s, step time, peak memory and share of the device's peak FLOP/s."""
    from qwenvl_ft.bench.lines import step_text
    from qwenvl_ft.bench.step import StepOptions, bench_step
    from qwenvl_ft.checkpoint.manifest import rank
    from qwenvl_ft.training.ranks import leave_ranks

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
            settings=(
                f"model.attn_impl={attn_impl}",
                *((f"training.sequence_parallel_size={sequence_parallel_size}",) if sequence_parallel_size > 1 else ()),
                *(settings or ()),
            ),
            profile=profile,
        )
    )
    if rank() == 0:
        _print(result.to_json(), as_json, lambda _: step_text(result))
        if costs:
            typer.echo(costs, err=as_json)
    leave_ranks()


def data(
    file: Annotated[
        Path | None, typer.Argument(help="File of records; default: generated photos and questions.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Model whose processor is used; default: one with a small tokenizer.")
    ] = None,
    media_root: Annotated[str | None, typer.Option(help="Folder that relative media paths start from.")] = None,
    records: Annotated[int, typer.Option(help="Number of records to encode.", min=8)] = 200,
    max_pixels: Annotated[
        int, typer.Option(help="Maximum area of an image after resizing, in pixels.", min=1024)
    ] = 200_704,
    row_length: Annotated[int, typer.Option(help="Length of a packed row, in tokens.", min=64)] = 4096,
    as_json: JSON = False,
) -> None:
    """Plan, encode and collate records on one core, and compare with only decoding and resizing."""
    from qwenvl_ft.bench.data import bench_data
    from qwenvl_ft.bench.lines import data_text
    from qwenvl_ft.bench.sizes import bench_processor
    from qwenvl_ft.model.load import load_processor

    processor = load_processor(model, max_pixels=max_pixels) if model else bench_processor(max_pixels=max_pixels)
    result = bench_data(processor, file, media_root=media_root, records=records, row_length=row_length)
    _print(result.to_json(), as_json, data_text)


def loss(
    tokens: Annotated[int, typer.Option(help="Length of the row, in tokens.", min=64)] = 16_384,
    supervised_share: Annotated[float, typer.Option(help="Share of supervised tokens.", min=0.01, max=1)] = 0.25,
    vocabulary: Annotated[int, typer.Option(help="Vocabulary size.", min=64)] = 151_936,
    width: Annotated[int, typer.Option(help="Hidden size.", min=8)] = 256,
    as_json: JSON = False,
) -> None:
    """Measure peak memory of language head and loss: over supervised tokens in chunks, and over all logits at once."""
    from qwenvl_ft.bench.lines import loss_text
    from qwenvl_ft.bench.parts import bench_loss

    sizes = {"supervised_share": supervised_share, "vocabulary": vocabulary, "width": width}
    _print(bench_loss(tokens=tokens, **sizes), as_json, loss_text)  # type: ignore[arg-type]


def attention(
    tokens: Annotated[int, typer.Option(help="Length of the row, in tokens.", min=64)] = 8192,
    samples: Annotated[int, typer.Option(help="Number of samples in the row.", min=1)] = 32,
    rounds: Annotated[int, typer.Option(help="Number of repetitions; the fastest counts.", min=1)] = 3,
    as_json: JSON = False,
) -> None:
    """Time attention over a packed row, forward and backward: per sample, and with a block mask."""
    from qwenvl_ft.bench.lines import attention_text
    from qwenvl_ft.bench.parts import bench_attention

    _print(bench_attention(tokens=tokens, samples=samples, rounds=rounds), as_json, attention_text)


def memory(
    sizes: Annotated[list[str] | None, typer.Argument(help="Model sizes; default 2b, 4b and 8b.")] = None,
    row_length: Annotated[list[int] | None, typer.Option(help="Length of a row, in tokens. May be repeated.")] = None,
    image_share: Annotated[float, typer.Option(help="Share of image tokens.", min=0, max=0.9)] = 0.5,
    engine: Annotated[
        Literal["none", "zero2", "zero3"], typer.Option(help="What divides weights, gradients and optimizer state.")
    ] = "none",
    gpus: Annotated[int, typer.Option(help="GPUs of the run.", min=1)] = 1,
    sequence_parallel_size: Annotated[int, typer.Option(help="GPUs that share a row; divides --gpus.", min=1)] = 1,
    as_json: JSON = False,
) -> None:
    """Compute the memory of one GPU in full and LoRA training by row length, without a GPU."""
    from dataclasses import asdict

    from qwenvl_ft.bench.lines import memory_text
    from qwenvl_ft.bench.memory import SETTINGS, Run
    from qwenvl_ft.bench.memory import memory as computed

    run = Run(engine, gpus, sequence_parallel_size)

    results = [
        computed(size, train_type, length, image_share=image_share, run=run)
        for size in sizes or ("2b", "4b", "8b")
        for train_type in SETTINGS
        for length in row_length or (4096, 8192, 16_384)
    ]
    entries = [asdict(entry) | {"total": entry.total} for entry in results]
    _print({"computed": entries}, as_json, lambda _: memory_text(results))


def fit(
    size: SIZE = "mini",
    row_length: Annotated[int, typer.Option(help="Length of the longest timed row, in tokens.", min=256)] = 2048,
    rounds: Annotated[int, typer.Option(help="Number of repetitions of each row; the fastest counts.", min=1)] = 2,
    freeze_vit: Annotated[
        bool, typer.Option("--freeze-vit", help="Freeze the vision tower; set this if your training runs freeze it.")
    ] = False,
    as_json: JSON = False,
) -> None:
    """Time rows of different composition, fit the cost of tokens and patches, and save it for the planner."""
    from dataclasses import asdict

    from qwenvl_ft.bench.fit import bench_fit, keep

    costs, explained = bench_fit(size, row_length=row_length, rounds=rounds, trains_vision=not freeze_vit)
    result = asdict(costs) | {"explained": round(explained, 3), "file": str(keep(costs, explained))}
    _print(result, as_json, lambda values: "\n".join(f"{name:<13} {value}" for name, value in values.items()))


def growth(
    over: Annotated[
        Literal["rows", "records"],
        typer.Argument(metavar="rows|records", help="Vary the row length, or the number of records."),
    ],
    size: SIZE = "tiny",
    most: Annotated[
        int | None, typer.Option(help="Longest row in tokens, or largest number of records.", min=2048)
    ] = None,
    svg: Annotated[Path | None, typer.Option(help="Write a plot to this SVG file.")] = None,
) -> None:
    """Measure training speed by row length, or data loading by number of records; prints one JSON object per line."""
    from qwenvl_ft.bench.growth import RECORDS, ROW_LENGTHS, grow_records, grow_rows, plot_records, plot_rows

    steps = [at for at in (ROW_LENGTHS if over == "rows" else RECORDS) if most is None or at <= most]
    entries = []
    for entry in grow_rows(size, steps) if over == "rows" else grow_records(steps):
        typer.echo(json.dumps(entry))
        entries.append(entry)
    if svg is not None:
        svg.write_text(plot_rows(entries, size) if over == "rows" else plot_records(entries), encoding="utf-8")


COMMANDS: dict[str, Callable[..., None]] = {
    "data": data,
    "step": step,
    "loss": loss,
    "attention": attention,
    "memory": memory,
    "growth": growth,
    "fit": fit,
}
"""Name of a benchmark -> its command."""


def bench(words: list[str]) -> int:
    """Run one of the benchmarks with the remaining arguments."""
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


def _print(result: dict[str, Any], as_json: bool, text: Callable[[dict[str, Any]], str]) -> None:
    typer.echo(json.dumps(result) if as_json else text(result))
