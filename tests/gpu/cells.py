"""Measure one model, way of training and row length: packed beside padded beside a plain Trainer.

    python tests/gpu/cells.py --size 4b --train-type lora --row-length 8192

One process for all of them, so that they share a card and its state; a line ``ROW {json}`` after each, so that what was
measured is kept if the process ends. A step takes about as many tokens in each layout: a packed row, or as many samples
as fill it on average. A padded batch that runs out of memory is halved and accumulated, until it fits.
"""

import argparse
import gc
import json
from dataclasses import replace

import torch

from qwenvl_ft.bench.memory import memory
from qwenvl_ft.bench.step import StepOptions, bench_step
from qwenvl_ft.training.meter import peak_memory_gib

if __package__ in (None, ""):
    from plain import mean_of, plain_step
else:
    from .plain import mean_of, plain_step

LORA = ("tuner.lora_rank=16", "tuner.lora_alpha=32", "tuner.lora_dropout=0.05")
PADDED = ("training.packing=false", "training.padding_free=false")
MORE = {
    "compiled": ("training.torch_compile=true",),
    "liger": ("training.use_liger_kernel=true",),
    "unchecked": ("training.gradient_checkpointing=false",),
}
"""Packed rows with something changed."""
LAYOUTS = ("packed", "padded", "plain", *MORE)


def measure(layout: str, options: StepOptions, batch: int, accumulation: int) -> dict:
    """Figures of one layout."""
    if layout == "plain":
        return plain_step(options, batch, accumulation)
    settings = LORA if options.train_type == "lora" else ()
    if layout == "padded":
        settings += (*PADDED, f"training.gradient_accumulation_steps={accumulation}")
        options = replace(options, rows=batch)
    result, _ = bench_step(replace(options, settings=settings + MORE.get(layout, ())))
    names = ("steps", "seconds", "tokens", "samples", "supervised_tokens", "peak_tflops", "peak_source", "attention")
    return {name: getattr(result, name) for name in names} | {"mfu": round(result.mfu, 4)}


def cell(layout: str, options: StepOptions) -> dict:
    """A row of the table: figures, or why there are none."""
    samples = max(1, options.row_length // mean_of(options)) if layout in ("padded", "plain") else 1
    batch, reason = samples, "out of memory"
    told = {"layout": layout, "size": options.size, "train_type": options.train_type, "row_length": options.row_length}
    while batch:
        free_memory()
        try:
            found = measure(layout, options, batch, samples // batch)
        except torch.OutOfMemoryError:
            batch = batch // 2
            continue
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            break
        peak = peak_memory_gib(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        rates = {f"{name}_per_second": round(found[name] / found["seconds"], 2) for name in ("tokens", "samples")}
        told |= {"status": "ok", "batch": batch, "accumulation": samples // batch, "peak_gib": peak}
        return told | found | rates
    return told | {"status": "failed", "reason": reason}


def free_memory() -> None:
    """Drop what the last cell left, and count the peak anew."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def computed_gib(options: StepOptions) -> float:
    """What `qwenvl-ft bench memory` says of the packed row."""
    told = memory(options.size, options.train_type, options.row_length, image_share=options.image_share)
    return round(told.total, 1)


def no_room(computed: float) -> str:
    """Why a cell is not tried; empty where it may fit. The context takes about half a GiB."""
    if not torch.cuda.is_available():
        return ""
    there = torch.cuda.get_device_properties(0).total_memory / 2**30
    return f"needs {computed:.0f} GiB by computation, the GPU has {there:.0f}" if computed + 0.5 > there else ""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--train-type", default="lora")
    parser.add_argument("--row-length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--layouts", default="packed,padded,plain")
    words = parser.parse_args()
    options = StepOptions(
        size=words.size,
        train_type=words.train_type,
        row_length=words.row_length,
        steps=words.steps,
        warmup=words.warmup,
    )
    computed = computed_gib(options)
    for layout in words.layouts.split(","):
        reason = no_room(computed)
        told = {"layout": layout, "size": words.size, "train_type": words.train_type, "row_length": words.row_length}
        row = told | {"status": "skipped", "reason": reason} if reason else cell(layout, options)
        print("ROW", json.dumps(row | {"computed_gib": computed}), flush=True)


if __name__ == "__main__":
    main()
