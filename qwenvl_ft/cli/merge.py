"""``qwenvl-ft merge``: merges an adapter into its base model, and optionally quantises the result."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from qwenvl_ft.export.merge import Merged


def merge(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of an adapter: a checkpoint, or the output_dir of a run.")],
    out: Annotated[Path, typer.Argument(help="New folder for the merged model.")],
    base: Annotated[str | None, typer.Option(help="Base model, if it is no longer where the adapter says.")] = None,
    torch_dtype: Annotated[str, typer.Option(help="Precision of the result; auto is that of the base model.")] = "auto",
    max_shard_size: Annotated[str, typer.Option(help="Maximum size of one weight file.")] = "5GB",
    quant_method: Annotated[
        str | None,
        typer.Option("--quant-method", "--quant_method", help="gptq or awq: quantise the language model."),
    ] = None,
    quant_bits: Annotated[int, typer.Option("--quant-bits", "--quant_bits", help="Bits per weight.")] = 4,
    group_size: Annotated[
        int, typer.Option("--group-size", "--gptq_group_size", help="Number of weights that share a scale.")
    ] = 128,
    n_samples: Annotated[
        int, typer.Option("--n-samples", "--quant_n_samples", help="Number of calibration samples.")
    ] = 128,
    dataset: Annotated[str | None, typer.Option(help="Calibration records, written as in data.train.")] = None,
    ignored_keys: Annotated[
        str, typer.Option("--ignored-keys", help="Keys of calibration records that are taken as absent: a,b.")
    ] = "",
) -> None:
    """Write a model whose weights include the adapter's update, with processor and generation config."""
    from tempfile import TemporaryDirectory

    from transformers.utils import logging

    from qwenvl_ft.export.merge import merge as merge_adapter
    from qwenvl_ft.export.merge import require_new
    from qwenvl_ft.export.quantize import check_quantization, quantize, require_no_quantization

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    options: dict[str, Any] = {"base": base, "torch_dtype": torch_dtype, "max_shard_size": max_shard_size}
    if quant_method is None:
        done = merge_adapter(checkpoint, out, **options)
        for line in (merged_line(done), *done.notes):
            typer.echo(line)
        return
    check_quantization(quant_method, quant_bits, dataset)
    target = require_new(out)
    with TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as whole:
        source, notes = checkpoint, []
        if (checkpoint / "adapter_config.json").is_file():
            done = merge_adapter(checkpoint, whole, **options)
            source, notes = done.folder, done.notes
        require_no_quantization(str(source))
        quantize(
            source,
            target,
            method=quant_method,
            bits=quant_bits,
            group_size=group_size,
            dataset=dataset or "",
            n_samples=n_samples,
            ignored_keys=[key.strip() for key in ignored_keys.split(",") if key.strip()],
        )
    size = sum(path.stat().st_size for path in target.glob("*.safetensors")) / 2**20
    typer.echo(f"{target}: {quant_method}, {quant_bits} bits in groups of {group_size}, {size:,.1f} MiB")
    for line in notes:
        typer.echo(line)


def merged_line(done: "Merged") -> str:
    """Describe a merged model."""
    untied = "; the language head has a weight of its own now" if done.untied else ""
    return (
        f"{done.folder}: {done.method} merged into {done.layers} layers, modules trained in full: {done.copies}; "
        f"{done.dtype}, {done.mebibytes:,.1f} MiB{untied}"
    )
