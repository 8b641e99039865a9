"""Measure one model size, method and row length: packed rows, padded batches and a plain Trainer.

    python tests/gpu/cells.py --size 4b --train-type lora --row-length 8192

All layouts run in one process, so that they share a GPU in the same state. After each the process prints a line
``ROW {json}``, so that earlier results survive a crash. One step of each layout has about the same number of tokens:
one packed row, or as many samples as fill it on average. A padded batch that runs out of memory is halved and
accumulated until it fits.
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
"""Variants of packed rows -> the settings that they change."""
LAYOUTS = ("packed", "padded", "plain", *MORE)


def measure(layout: str, options: StepOptions, batch: int, accumulation: int) -> dict:
    """Run one layout and return its figures."""
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
    """Return a row of the table: the figures, or the reason why there are none."""
    samples = max(1, options.row_length // mean_of(options)) if layout in ("padded", "plain") else 1
    batch, reason = samples, "out of memory"
    row = {"layout": layout, "size": options.size, "train_type": options.train_type, "row_length": options.row_length}
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
        row |= {"status": "ok", "batch": batch, "accumulation": samples // batch, "peak_gib": peak}
        return row | found | rates
    return row | {"status": "failed", "reason": reason}


def free_memory() -> None:
    """Free memory left by the last cell, and reset the peak."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def computed_gib(options: StepOptions) -> float:
    """Return the GiB that `qwenvl-ft bench memory` computes for the packed row."""
    estimate = memory(options.size, options.train_type, options.row_length, image_share=options.image_share)
    return round(estimate.total, 1)


def no_room(computed: float) -> str:
    """Return why a cell is skipped, or an empty string if it may fit. The CUDA context takes about half a GiB."""
    if not torch.cuda.is_available():
        return ""
    available = torch.cuda.get_device_properties(0).total_memory / 2**30
    return f"needs {computed:.0f} GiB by computation, the GPU has {available:.0f}" if computed + 0.5 > available else ""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--train-type", default="lora")
    parser.add_argument("--row-length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--layouts", default="packed,padded,plain")
    args = parser.parse_args()
    subject = {"size": args.size, "train_type": args.train_type, "row_length": args.row_length}
    options = StepOptions(**subject, steps=args.steps, warmup=args.warmup)
    computed = computed_gib(options)
    for layout in args.layouts.split(","):
        reason = no_room(computed)
        skipped = {"layout": layout, **subject, "status": "skipped", "reason": reason}
        row = skipped if reason else cell(layout, options)
        print("ROW", json.dumps(row | {"computed_gib": computed}), flush=True)


if __name__ == "__main__":
    main()
