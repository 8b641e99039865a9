"""Measures real training steps (trainer, loader, plan, loss, optimizer) over a model with random weights.

Only weights and records are generated; everything else is what `qwenvl_ft.train` runs, configured by a recipe.
"""

from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedModel, ProgressCallback, TrainerCallback

from qwenvl_ft import assemble
from qwenvl_ft.bench.clock import Clock, now
from qwenvl_ft.bench.flops import model_work, peak_tflops
from qwenvl_ft.bench.sizes import random_model, write_size
from qwenvl_ft.bench.workload import filled_records
from qwenvl_ft.checkpoint.manifest import gather
from qwenvl_ft.data.encode.by_recipe import build_encoder
from qwenvl_ft.data.plan.dataset import SampleDataset
from qwenvl_ft.errors import BenchError
from qwenvl_ft.model.source import load_config
from qwenvl_ft.recipe.load import load_recipe
from qwenvl_ft.recipe.schema import Recipe
from qwenvl_ft.training.build import build_trainer
from qwenvl_ft.training.meter import peak_memory_gib
from qwenvl_ft.training.prepare import prepare_run
from qwenvl_ft.training.trainer import QwenVLTrainer
from qwenvl_ft.upstream.attention import attention_of

TOP_COSTS = 10
"""Number of operations in the printed profile."""
PROFILED_STEPS = 2


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """Options of the benchmark."""

    size: str = "tiny"
    """One of `qwenvl_ft.bench.sizes.SIZES`."""
    train_type: str = "full"
    """full (all parts) or lora (on the language model)."""
    row_length: int = 8192
    """Tokens of a packed row."""
    image_share: float = 0.5
    """Share of image tokens, 0 to 1."""
    supervised_share: float = 0.25
    """Share of answer tokens, 0 to 1."""
    mean_sample: int | None = None
    """Mean tokens of a sample, log-normally distributed; None is 512, or less in short rows."""
    rows: int = 1
    """Rows per step."""
    steps: int = 8
    """Measured steps."""
    warmup: int = 2
    """Steps before the measured ones."""
    compile: bool = False
    """torch.compile."""
    checkpointing: bool = True
    """Gradient checkpointing."""
    settings: tuple[str, ...] = ()
    """Further overrides of the recipe, as section.key=value."""
    profile: Path | None = None
    """Folder for a trace of two more steps; None for no trace."""


@dataclass
class StepResult:
    """Result of the benchmark; totals over all measured steps and ranks."""

    device: str
    size: str
    train_type: str
    attention: str
    dtype: str
    row_length: int
    steps: int
    seconds: float
    cpu_seconds: float
    """CPU seconds of all threads of this process."""
    step_ms: list[float]
    """Time of each step; on a GPU the time to launch it, so that only the sum is meaningful."""
    tokens: int
    supervised_tokens: int
    images: int
    samples: int
    peak_memory_gib: float
    """Of the rank with the most."""
    model_flops: dict[str, int]
    """FLOPs of the matrix products that the result requires, by kind."""
    peak_tflops: float
    peak_source: str
    """``table``, or ``measured``: the fastest matrix product on this device."""
    ranks: int = 1
    """Processes, one for each device."""

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs per second divided by the peak of all devices."""
        return self.model_flops["total"] / self.seconds / (self.peak_tflops * 1e12 * self.ranks)

    def to_json(self) -> dict[str, Any]:
        """Return the result and derived rates as a dict that JSON can hold."""
        return asdict(self) | {
            "tokens_per_second": round(self.tokens_per_second, 1),
            "supervised_tokens_per_second": round(self.supervised_tokens / self.seconds, 1),
            "tflops_per_second": round(self.model_flops["total"] / self.seconds / 1e12, 3),
            "mfu": round(self.mfu, 4),
        }


class Profiler(TrainerCallback):
    """Profiles the steps after the measured ones."""

    def __init__(self, after: int) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self.after = after
        self.profile = torch.profiler.profile(activities=activities)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.after:
            self.profile.start()
        if state.global_step == self.after + PROFILED_STEPS:
            self.profile.stop()

    def write(self, folder: Path) -> str:
        """Write a Chrome trace, and return a table of the top costs."""
        folder.mkdir(parents=True, exist_ok=True)
        self.profile.export_chrome_trace(str(folder / "trace.json.gz"))
        by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        return self.profile.key_averages().table(sort_by=by, row_limit=TOP_COSTS, max_name_column_width=60)


def step_recipe(options: StepOptions, folder: Path) -> Recipe:
    """Return the recipe of the benchmark: without logs and checkpoints."""
    on_gpu = torch.cuda.is_available()
    full = options.train_type == "full"
    profiled = PROFILED_STEPS if options.profile else 0
    return load_recipe(
        None,
        [
            f"model.model={folder}",
            f"model.torch_dtype={'bfloat16' if on_gpu else 'float32'}",
            f"template.max_length={options.row_length}",
            f"tuner.train_type={options.train_type}",
            f"tuner.freeze_vit={str(not full).lower()}",
            f"tuner.freeze_aligner={str(not full).lower()}",
            f"training.per_device_train_batch_size={options.rows}",
            f"training.max_steps={options.warmup + options.steps + profiled}",
            f"training.gradient_checkpointing={str(options.checkpointing).lower()}",
            f"training.torch_compile={str(options.compile).lower()}",
            f"training.dataloader_num_workers={4 if on_gpu else 0}",
            "training.save_strategy=no",
            "training.save_final=false",
            "training.report_to=none",
            "training.disable_tqdm=true",
            "training.logging_steps=1000000",
            "training.logging_first_step=false",
            f"training.output_dir={folder / 'output'}",
            *options.settings,
        ],
    )


def bench_step(options: StepOptions) -> tuple[StepResult, str]:
    """Train for a few steps and measure them; every rank must call it.

    Returns:
        The result, timed by this rank, and the table of rank 0's profile (empty without ``options.profile``).

    Raises:
        RecipeError: a setting is invalid.
        BenchError: an option is invalid, or a setting does not apply to random weights.
    """
    with TemporaryDirectory() as name:
        return _measured(options, Path(name))


def _measured(options: StepOptions, folder: Path) -> tuple[StepResult, str]:
    write_size(options.size, folder)
    recipe = step_recipe(options, folder)
    _check(recipe, options)
    args = prepare_run(recipe)
    device = args.device
    trainer = bench_trainer(recipe, args, options, folder)
    clock = Clock(device, options.warmup, options.steps)
    trainer.add_callback(clock)
    profiler = Profiler(options.warmup + options.steps) if options.profile else None
    if profiler:
        trainer.add_callback(profiler)
    trainer.train()
    model: Any = trainer.model
    rows = [row for own in gather(clock.rows()) for row in own]
    seconds = clock.seconds()
    dtype = recipe.model.torch_dtype
    peak, source = device_peak(device, dtype)
    result = StepResult(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        size=options.size,
        train_type=options.train_type,
        attention=_attention_name(model),
        dtype=dtype,
        row_length=options.row_length,
        steps=len(seconds),
        seconds=round(sum(seconds), 4),
        cpu_seconds=round(clock.cpu[clock.last] - clock.cpu[clock.warmup], 4),
        step_ms=[round(1e3 * second, 1) for second in seconds],
        tokens=sum(row.tokens for row in rows),
        supervised_tokens=sum(row.supervised for row in rows),
        images=sum(len(row.frames) for row in rows),
        samples=sum(len(row.samples) for row in rows),
        peak_memory_gib=max(gather(peak_memory_gib(device))),
        model_flops=model_work(model).flops(rows),
        peak_tflops=peak,
        peak_source=source,
        ranks=args.world_size,
    )
    if profiler is None or options.profile is None or args.process_index > 0:
        return result, ""
    return result, profiler.write(options.profile)


def _check(recipe: Recipe, options: StepOptions) -> None:
    """Raise for options and settings that the benchmark would not honour."""
    if options.image_share + options.supervised_share > 1:
        raise BenchError(
            f"image_share={options.image_share} and supervised_share={options.supervised_share} add up to more than 1. "
            "Lower one of them."
        )
    if recipe.quantization.quantization_bit is not None:
        raise BenchError("quantization.quantization_bit: the benchmark's random weights are not quantised. Remove it.")


def bench_trainer(recipe: Recipe, args: Any, options: StepOptions, folder: Path) -> QwenVLTrainer:
    """Build the trainer of a recipe over generated records, as `qwenvl_ft.train` does."""
    processor = assemble.build_processor(recipe)
    steps = options.warmup + options.steps + PROFILED_STEPS
    mean = options.mean_sample or min(512, options.row_length // 8)
    # without packing a row is one sample; twice the mean, because lengths vary
    row = options.row_length if recipe.training.packing else 2 * mean
    records = filled_records(
        processor.tokenizer,
        tokens=int(1.1 * steps * args.per_device_train_batch_size * args.gradient_accumulation_steps)
        * row
        * args.world_size,
        mean_sample=mean,
        longest=options.row_length,
        image_share=options.image_share,
        supervised_share=options.supervised_share,
        seed=args.seed,
    )
    dataset = SampleDataset(records, build_encoder(recipe, processor), name="bench", cache_dir=folder / "lengths")
    torch.manual_seed(args.seed)
    model = random_model(load_config(str(folder)), recipe.model, args.device)
    trainer = build_trainer(recipe, args, assemble.prepared(model, recipe, args), processor, dataset, callbacks=[])
    trainer.remove_callback(ProgressCallback)
    return trainer


def device_peak(device: torch.device, dtype: str) -> tuple[float, str]:
    """Return the device's peak in TFLOP/s, and its source: the data sheet's 16-bit peak, or a measurement."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = peak_tflops(name) if dtype != "float32" else None
    return (peak, "table") if peak else (measured_peak(device, dtype), "measured")


@cache
def measured_peak(device: torch.device, dtype: str) -> float:
    """Return TFLOP/s of the fastest of several large matrix products."""
    side = 8192 if device.type == "cuda" else 2048
    a = torch.randn(side, side, dtype=getattr(torch, dtype), device=device)
    best = 0.0
    for _ in range(5):
        begin = now(device)
        a @ a
        best = max(best, 2 * side**3 / (now(device) - begin))
    return round(best / 1e12, 4)


def _attention_name(model: Any) -> str:
    """Return the name of the language model's attention implementation."""
    inner = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    return attention_of(inner.config.get_text_config())
