"""Formats measurements as text."""

from collections.abc import Sequence
from typing import Any

from qwenvl_ft.bench.memory import Memory
from qwenvl_ft.bench.step import StepResult


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Format a Markdown table: the first column is aligned left, the others right."""
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
    """Format the figures of a step, one per line, and the shares of its matrix work."""
    data = result.to_json()
    flops = dict(result.model_flops)
    total = flops.pop("total")
    shares = ", ".join(f"{name} {share / total:.0%}" for name, share in flops.items() if share)
    median = sorted(result.step_ms)[result.steps // 2]
    devices = result.device if result.ranks == 1 else f"{result.ranks} x {result.device}"
    peak = f"{result.peak_tflops * result.ranks:g} ({result.peak_source})"
    return "\n".join(
        [
            f"{result.size}, {result.train_type}, {result.dtype}, {result.attention}, on {devices}",
            f"  {result.steps} steps of {result.tokens / result.steps:,.0f} tokens "
            f"({result.samples / result.steps:.1f} samples, {result.images / result.steps:.1f} images)",
            f"  tokens/s             {data['tokens_per_second']:>12,.1f}",
            f"  supervised tokens/s  {data['supervised_tokens_per_second']:>12,.1f}",
            f"  step, ms             {1e3 * result.seconds / result.steps:>12,.1f}   median {median:,.1f}",
            f"  peak memory, GiB     {result.peak_memory_gib:>12,.2f}",
            f"  needed TFLOP/s       {data['tflops_per_second']:>12,.3f}   of {peak}",
            f"  MFU                  {data['mfu']:>12.1%}   {shares}",
        ]
    )


def data_text(data: dict[str, Any]) -> str:
    """Format the figures of the data path."""
    again = data["plan_seconds"] / data["plan_again_seconds"]
    return "\n".join(
        [
            f"{data['records']} records, {data['images']} images, {data['tokens']:,} tokens; CPU seconds of one core",
            f"  planning, records/s  {data['planned_per_second']:>10,.0f}   {again:,.0f} times as fast from the cache",
            f"  row fill             {data['fill']:>10.1%}",
            f"  encoding, samples/s  {data['samples_per_second']:>10,.1f}",
            f"  times the floor      {data['times_floor']:>10.2f}   (decode and resize alone: "
            f"{data['records'] / data['floor_seconds']:,.1f} samples/s)",
            f"  bytes per image      {data['bytes_per_image']:>10,.0f}   from the processor: "
            f"{data['processor_bytes_per_image']:,.0f}",
        ]
    )


def loss_text(data: dict[str, Any]) -> str:
    """Format both losses side by side."""
    plain, chunked = data["plain"], data["chunked"]
    heads = ("loss", "peak GiB", "seconds", "sum")
    rows = [
        (name, f"{part['gib']:.2f}", f"{part['seconds']:.1f}", f"{part['loss']:.2f}")
        for name, part in (("all logits", plain), ("supervised, in chunks", chunked))
    ]
    return f"{table(heads, rows)}\n{plain['gib'] / chunked['gib']:.1f} times less memory"


def attention_text(data: dict[str, Any]) -> str:
    """Format both forms of attention side by side."""
    return (
        f"{data['tokens']:,} tokens in {data['samples']} samples, forward and backward: per sample "
        f"{data['per_sample']:.3f} s, block mask {data['block_mask']:.3f} s, {data['times_faster']:.1f} times faster; "
        f"largest difference {data['largest_difference']:.1e}"
    )


def memory_text(entries: Sequence[Memory]) -> str:
    """Format a row for each model, train_type and row length, in GiB."""
    names = ("weights", "gradients", "optimizer", "copies", "checkpoints", "layer", "head")
    rows = [
        (f"{entry.size} {entry.train_type}", f"{entry.row_length:,}", f"{entry.total:.0f}")
        + tuple(f"{getattr(entry, name):.1f}" for name in names)
        for entry in entries
    ]
    return table(("model", "row", "GiB", *names), rows)
