"""Measures growth: tokens/s by row length, and seconds of the data path by number of records; draws both."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from qwenvl_ft.bench.sizes import bench_processor
from qwenvl_ft.bench.step import StepOptions, bench_step
from qwenvl_ft.bench.workload import QUESTION, WORDS, photo
from qwenvl_ft.data.encode.encoder import Encoder
from qwenvl_ft.data.plan.lengths import measure
from qwenvl_ft.data.plan.packing import RunShape, assign, pack_lengths
from qwenvl_ft.data.sources.records import load_records

ROW_LENGTHS = (2048, 4096, 8192, 16_384, 32_768)
RECORDS = (1_000, 10_000, 100_000, 1_000_000)


def grow_rows(size: str, lengths: Sequence[int] = ROW_LENGTHS, *, steps: int = 1) -> Iterator[dict[str, Any]]:
    """Measure training speed for each row length, with the same kind of samples.

    On a CPU it uses one thread and CPU time, so that other work on the machine does not count.
    """
    torch.set_num_threads(1)
    for length in lengths:
        options = StepOptions(
            size=size, row_length=length, steps=steps, warmup=1, mean_sample=256, image_share=0.25, checkpointing=False
        )
        result, _ = bench_step(options)
        seconds = result.seconds if torch.cuda.is_available() else result.cpu_seconds
        speed = round(result.tokens / seconds, 1)
        yield {"row_length": length, "tokens_per_second": speed, "peak_memory_gib": result.peak_memory_gib}


def grow_records(counts: Sequence[int] = RECORDS, *, images: int = 40) -> Iterator[dict[str, Any]]:
    """Measure the CPU seconds of opening, measuring and packing records with an image and an answer, on one core."""
    encoder = Encoder(bench_processor(), max_length=8192, truncation_strategy="delete")
    with TemporaryDirectory() as name:
        folder = Path(name)
        for index in range(images):
            (folder / f"{index}.jpg").write_bytes(photo(320, 32 * (5 + index % 6), index))
        for count in counts:
            path = _written(folder / f"{count}.jsonl", count, images)
            seconds: dict[str, float] = {}
            begin = time.process_time()
            records = load_records(str(path), cache_dir=folder / "arrow")
            seconds["open"] = time.process_time() - begin
            begin = time.process_time()
            tokens = measure(records, encoder, cache_dir=folder / "lengths").tokens
            seconds["measure"] = time.process_time() - begin
            begin = time.process_time()
            assign(pack_lengths(tokens, max_length=8192), tokens, RunShape(8, 1, 4))
            seconds["pack"] = time.process_time() - begin
            begin = time.process_time()
            measure(load_records(str(path), cache_dir=folder / "arrow"), encoder, cache_dir=folder / "lengths")
            seconds["start again"] = time.process_time() - begin
            path.unlink()
            yield {"records": count} | {name: round(taken, 4) for name, taken in seconds.items()}


def _written(path: Path, count: int, images: int) -> Path:
    rng = np.random.default_rng(count)
    with path.open("w", encoding="utf-8") as file:
        for index, words in enumerate(rng.lognormal(3.5, 0.6, count).clip(5, 300).astype(int)):
            answer = " ".join(WORDS[k] for k in rng.integers(0, len(WORDS), words))
            turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": f"{index}: {answer}"}]
            file.write(json.dumps({"image": f"{index % images}.jpg", "conversations": turns}) + "\n")
    return path


COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")


def plot(title: str, x: Sequence[float], lines: Mapping[str, Sequence[float]], *, x_name: str, y_name: str) -> str:
    """Draw lines over two logarithmic axes as SVG."""
    left, top, width, height = 80, 50, 520, 300
    values = [value for line in lines.values() for value in line]
    x_low, x_high = np.log10(min(x)), np.log10(max(x))
    y_low, y_high = np.floor(np.log10(min(values))), np.ceil(np.log10(max(values)))

    def place(at: float, value: float) -> tuple[float, float]:
        across = (np.log10(at) - x_low) / max(x_high - x_low, 1e-9)
        up = (np.log10(value) - y_low) / max(y_high - y_low, 1e-9)
        return round(left + width * float(across), 1), round(top + height * (1 - float(up)), 1)

    bottom, middle = top + height, left + width / 2
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 130}" height="{bottom + 60}" '
        'font-family="sans-serif" font-size="13">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{middle}" y="28" text-anchor="middle" font-size="16">{title}</text>',
        f'<text x="{middle}" y="{bottom + 44}" text-anchor="middle">{x_name}</text>',
        f'<text x="22" y="{top + height / 2}" text-anchor="middle" '
        f'transform="rotate(-90 22 {top + height / 2})">{y_name}</text>',
    ]
    for power in range(int(y_low), int(y_high) + 1):
        y = place(x[0], 10.0**power)[1]
        parts.append(f'<line x1="{left}" x2="{left + width}" y1="{y}" y2="{y}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{10.0**power:g}</text>')
    for at in x:
        spot = place(at, 10.0**y_low)[0]
        parts.append(f'<line x1="{spot}" x2="{spot}" y1="{top}" y2="{bottom}" stroke="#eee"/>')
        parts.append(f'<text x="{spot}" y="{bottom + 20}" text-anchor="middle">{at:,.0f}</text>')
    beside = label_heights([place(x[-1], line[-1])[1] for line in lines.values()])
    for colour, (name, line), label in zip(COLOURS, lines.items(), beside, strict=False):
        spots = [place(at, value) for at, value in zip(x, line, strict=True)]
        points = " ".join(f"{px},{py}" for px, py in spots)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{px}" cy="{py}" r="3.5" fill="{colour}"/>' for px, py in spots]
        parts.append(f'<text x="{spots[-1][0] + 10}" y="{label + 4}" fill="{colour}">{name}</text>')
    return "\n".join([*parts, "</svg>", ""])


def label_heights(ends: Sequence[float], apart: float = 15) -> list[float]:
    """Return the heights of the lines' names: at the line ends, moved down to avoid overlap."""
    heights = list(ends)
    for above, below in pairwise(sorted(range(len(heights)), key=lambda i: ends[i])):
        heights[below] = max(heights[below], heights[above] + apart)
    return heights


def plot_rows(entries: Sequence[dict[str, Any]], size: str) -> str:
    """Draw the results of `grow_rows`."""
    lines: dict[str, list[float]] = {"tokens/s": [entry["tokens_per_second"] for entry in entries]}
    x = [entry["row_length"] for entry in entries]
    return plot(f"Training {size}: tokens/s by row length", x, lines, x_name="tokens of a row", y_name="tokens/s")


def plot_records(entries: Sequence[dict[str, Any]]) -> str:
    """Draw the results of `grow_records`."""
    names = [name for name in entries[0] if name != "records"]
    lines = {name: [max(entry[name], 1e-3) for entry in entries] for name in names}
    x = [entry["records"] for entry in entries]
    return plot("Before the first step, one core", x, lines, x_name="records", y_name="seconds")
