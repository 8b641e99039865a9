"""What was measured -> lines to read."""

from collections.abc import Sequence
from typing import Any

from qwenvl_ft.bench.memory import Memory
from qwenvl_ft.bench.step import StepResult


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Markdown, aligned: the first column to the left, numbers to the right."""
    cells = [[str(cell) for cell in row] for row in (heads, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(heads))]
    lines = [
        "| "
        + " | ".join(f"{cell:{'<' if not column else '>'}{widths[column]}}" for column, cell in enumerate(row))
        + " |"
        for row in cells
    ]
    rule = "|" + "|".join("-" * (width + 1) + ("-" if not column else ":") for column, width in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def step_text(result: StepResult) -> str:
    """A step's figures, one a line, and what its matrix work goes to."""
    told = result.told()
    flops = dict(result.model_flops)
    total = flops.pop("total")
    shares = ", ".join(f"{name} {share / total:.0%}" for name, share in flops.items() if share)
    median = sorted(result.step_ms)[result.steps // 2]
    peak = f"{result.peak_tflops:g} ({result.peak_source})"
    return "\n".join(
        [
            f"{result.size}, {result.train_type}, {result.dtype}, {result.attention}, on {result.device}",
            f"  {result.steps} steps of {result.tokens / result.steps:,.0f} tokens "
            f"({result.samples / result.steps:.1f} samples, {result.images / result.steps:.1f} images)",
            f"  tokens/s             {told['tokens_per_second']:>12,.1f}",
            f"  supervised tokens/s  {told['supervised_tokens_per_second']:>12,.1f}",
            f"  step, ms             {1e3 * result.seconds / result.steps:>12,.1f}   median {median:,.1f}",
            f"  peak memory, GiB     {result.peak_memory_gib:>12,.2f}",
            f"  needed TFLOP/s       {told['tflops_per_second']:>12,.3f}   of {peak}",
            f"  MFU                  {told['mfu']:>12.1%}   {shares}",
        ]
    )


def data_text(told: dict[str, Any]) -> str:
    """The data path's figures."""
    again = told["plan_seconds"] / told["plan_again_seconds"]
    return "\n".join(
        [
            f"{told['records']} records, {told['images']} images, {told['tokens']:,} tokens; seconds of one core",
            f"  planning, records/s  {told['planned_per_second']:>10,.0f}   {again:,.0f} times as fast from the cache",
            f"  row fill             {told['fill']:>10.1%}",
            f"  encoding, samples/s  {told['samples_per_second']:>10,.1f}",
            f"  times the floor      {told['times_floor']:>10.2f}   (decode and resize alone: "
            f"{told['records'] / told['floor_seconds']:,.1f} samples/s)",
            f"  bytes of an image    {told['bytes_per_image']:>10,.0f}   the processor's: "
            f"{told['processor_bytes_per_image']:,.0f}",
        ]
    )


def loss_text(told: dict[str, Any]) -> str:
    """Both losses beside each other."""
    plain, chunked = told["plain"], told["chunked"]
    heads = ("loss", "peak GiB", "seconds", "sum")
    rows = [
        (name, f"{part['gib']:.2f}", f"{part['seconds']:.1f}", f"{part['loss']:.2f}")
        for name, part in (("all logits", plain), ("supervised, in chunks", chunked))
    ]
    return f"{table(heads, rows)}\n{plain['gib'] / chunked['gib']:.1f} times less memory"


def attention_text(told: dict[str, Any]) -> str:
    """Both forms of attention beside each other."""
    return (
        f"{told['tokens']:,} tokens of {told['samples']} samples, forward and backward: per sample "
        f"{told['per_sample']:.3f} s, block mask {told['block_mask']:.3f} s, {told['times_faster']:.1f} times faster; "
        f"largest difference {told['largest_difference']:.1e}"
    )


def memory_text(told: Sequence[Memory]) -> str:
    """A row for each model, way of training and row length, in GiB."""
    names = ("weights", "gradients", "optimizer", "copies", "checkpoints", "layer", "head")
    rows = [
        (f"{entry.size} {entry.train_type}", f"{entry.row_length:,}", f"{entry.total:.0f}")
        + tuple(f"{getattr(entry, name):.1f}" for name in names)
        for entry in told
    ]
    return table(("model", "row", "GiB", *names), rows)
