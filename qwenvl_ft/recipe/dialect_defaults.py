"""Which defaults does a command line of another tool rely on? One table for each tool.

A command line that has one of a tool's marks and names no recipe file was written for that tool. A setting that it
leaves out then has that tool's default instead of ours, unless dialect_kept.py names it. Everything that the user gives
is stronger.

Sources: ms-swift 4.6.0 (tests hold its table against the installed package), and argument.py, train_qwen.py and
data_processor.py of qwen-vl-finetune with transformers 4.57, the version that it names.
"""

import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from qwenvl_ft.recipe.dialects import TOKEN_PIXELS
from qwenvl_ft.recipe.layers import Layer
from qwenvl_ft.recipe.methods import reads
from qwenvl_ft.recipe.schema import TemplateConfig

Values = dict[str, Any]
UNSET: Any = object()
"""Result of a computed default that does not apply: our own default stays."""


@dataclass(frozen=True)
class Given:
    """What the command line says, for the defaults that depend on it."""

    flags: frozenset[str]
    """Flags as they are spelled, without dashes."""
    values: Values = field(default_factory=dict)
    """Dotted key -> value, as it was given (text) or as a default that comes earlier in the table set it."""

    def number(self, key: str, otherwise: int) -> int:
        """Return a whole number; ``otherwise`` if it is absent, or malformed, which is reported later."""
        try:
            return int(self.values.get(key, otherwise))
        except (TypeError, ValueError):
            return otherwise

    @property
    def train_type(self) -> str:
        """The training method."""
        return str(self.values.get("tuner.train_type", "lora"))


@dataclass(frozen=True)
class Computed:
    """A default that follows from other settings."""

    of: Callable[[Given], Any]
    """Its value, or `UNSET`."""
    shown: str
    """How docs/reference.md says it."""


POSITIONS = {"qwen3": 262144, "qwen2.5": 128000, "qwen2": 32768}
"""Part of a model's name on the Hub -> its number of positions (max_position_embeddings)."""


def longest(given: Given) -> Any:
    """Return the number of tokens that the model has positions for, which is the limit of a tool that sets none."""
    if "global_max_length" in given.values:
        return UNSET
    if "model.max_model_len" in given.values:
        return given.values["model.max_model_len"]
    name = str(given.values.get("model.model", ""))
    config = Path(name).expanduser() / "config.json"
    if name and config.is_file():
        try:
            values = json.loads(config.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return UNSET  # loading the model reports it
        positions = (values.get("text_config") or values).get("max_position_embeddings")
        return positions if isinstance(positions, int) else UNSET
    return next((positions for part, positions in POSITIONS.items() if part in name.lower()), UNSET)


def _sixteen_samples(given: Given) -> int:
    """Return ms-swift's accumulation: as many micro-batches as give 16 samples per step over all ranks."""
    per_rank = max(1, given.number("training.per_device_train_batch_size", 1))
    ranks = int(os.environ.get("WORLD_SIZE", "1") or 1)
    return max(1, math.ceil(16 / per_rank / ranks))


def _evaluates(given: Given) -> bool:
    return any(given.values.get(key) for key in ("data.val", "data.split_dataset_ratio"))


def _evaluate_as_saved(given: Given) -> Any:
    """Return ms-swift's eval_strategy: that of the checkpoints."""
    strategy = given.values.get("training.save_strategy")
    return strategy if strategy == "epoch" and _evaluates(given) else UNSET


def _each_epoch(steps: str, given: Given) -> Any:
    """Return axolotl's strategy of saving or evaluating (if there is data for it) where no number of steps is given."""
    applies = f"training.{steps}" not in given.values and (steps == "save_steps" or _evaluates(given))
    return "epoch" if applies else UNSET


def _named_parts(given: Given) -> bool:
    return any(flag.startswith("tune_mm_") for flag in given.flags)


def _full_by_parts(given: Given) -> Any:
    return "full" if _named_parts(given) else UNSET


def _frozen_unless_named(given: Given) -> Any:
    """Return the freezing of a part in full training: frozen beside ``--tune_mm_*``, else trained. LoRA keeps ours."""
    return _named_parts(given) if given.train_type == "full" else UNSET


def _frozen_in_full(given: Given) -> Any:
    """Return True in full training, in which ours trains all parts; every other method has the same default."""
    return True if given.train_type == "full" else UNSET


PAIRS = (
    ("template.min_pixels", "template.max_pixels"),
    ("template.fps_min_frames", "template.fps_max_frames"),
    ("template.video_min_pixels", "template.video_max_pixels"),
)
"""Keys of which the first may not exceed the second."""


def _contradicts(key: str, value: Any, given: Given) -> bool:
    """Return True if a default would contradict what the user gives, so that it would be an error."""
    for least, most in PAIRS:
        if key == least and value > given.number(most, value):
            return True
        if key == most and value < given.number(least, value):
            return True
    longest_sample = given.number("template.max_length", TemplateConfig().max_length)
    return key in PAIRS[0] and value // TOKEN_PIXELS >= longest_sample


PARTS = Computed(_frozen_unless_named, "true beside --tune_mm_*; false in other full training")
FROZEN = Computed(_frozen_in_full, "true, also in full training")
LENGTH = Computed(longest, "the model's number of positions")


TRANSFORMERS: Values = {
    "training.packing": False,
    "training.per_device_train_batch_size": 8,
    "training.per_device_eval_batch_size": 8,
    "training.learning_rate": 5e-5,
    "training.weight_decay": 0.0,
    "training.lr_scheduler_type": "linear",
    "training.warmup_steps": 0,
    "training.logging_steps": 500,
    "training.logging_first_step": False,
    "training.save_total_limit": None,
}
"""Defaults of TrainingArguments that differ from ours, and no packing: for tools that leave them as they are."""

DIALECTS: dict[str, Values] = {
    "axolotl": {
        "tuner.train_type": "full",
        "tuner.freeze_vit": False,
        "tuner.freeze_aligner": False,
        "tuner.lora_dropout": 0.0,
        "template.max_length": 512,
        "training.packing": False,
        "training.weight_decay": 0.0,
        "training.logging_first_step": False,
        "training.per_device_eval_batch_size": Computed(
            lambda given: given.number("training.per_device_train_batch_size", 1), "per_device_train_batch_size"
        ),
        "training.num_train_epochs": 1,
        "training.warmup_steps": 0.03,
        "training.save_strategy": Computed(partial(_each_epoch, "save_steps"), "epoch without save_steps"),
        "training.eval_strategy": Computed(partial(_each_epoch, "eval_steps"), "epoch without eval_steps"),
        "training.save_total_limit": 4,
    },
    "LLaMA-Factory": TRANSFORMERS
    | {
        "tuner.freeze_vit": FROZEN,
        "tuner.freeze_aligner": FROZEN,
        "tuner.lora_alpha": Computed(lambda given: 2 * given.number("tuner.lora_rank", 8), "twice lora_rank"),
        "tuner.lora_dropout": 0.0,
        "template.max_length": 2048,
        "template.max_pixels": 768 * 768,
        "template.min_pixels": 32 * 32,
        "template.fps": 2.0,
        "template.fps_max_frames": 128,
        "template.video_frame_max_pixels": 256 * 256,
    },
    "2U1": TRANSFORMERS
    | {
        "tuner.lora_rank": 64,
        "tuner.lora_alpha": 16,
        "template.max_length": LENGTH,
        "template.max_pixels": 12845056,
        "template.min_pixels": 3136,
        "template.video_frame_max_pixels": 602112,
    },
    "ms-swift": {
        "tuner.freeze_vit": FROZEN,
        "tuner.freeze_aligner": FROZEN,
        "template.max_length": LENGTH,
        "model.torch_dtype": "auto",
        "training.packing": False,
        "training.gradient_accumulation_steps": Computed(_sixteen_samples, "16 samples per step over all ranks"),
        "training.weight_decay": 0.1,
        "training.adam_beta2": 0.95,
        "training.warmup_steps": 0,
        "training.logging_steps": 5,
        "training.save_total_limit": None,
        "training.eval_strategy": Computed(_evaluate_as_saved, "epoch if save_strategy is epoch"),
    },
    "train_qwen.py": TRANSFORMERS
    | {
        "tuner.train_type": Computed(_full_by_parts, "full beside --tune_mm_*"),
        "tuner.freeze_llm": PARTS,
        "tuner.freeze_vit": PARTS,
        "tuner.freeze_aligner": PARTS,
        "tuner.lora_rank": 64,
        "tuner.lora_alpha": 128,
        "tuner.target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "template.max_length": LENGTH,
        "template.max_pixels": 576 * 28 * 28,
        "template.min_pixels": 16 * 28 * 28,
        "template.fps": 2,
        "template.fps_min_frames": 4,
        "template.fps_max_frames": 8,
        "template.video_min_pixels": 256 * 28 * 28,
        "template.video_max_pixels": 1024 * 28 * 28,
    },
}
"""Tool -> our key -> its default, for each default that differs from ours. A key of ``tuner`` applies only to methods
that read it."""


def default_layer(dialect: str, flags: Iterable[str], stronger: Iterable[Layer]) -> Layer:
    """Return the layer of a tool's defaults, the weakest of a recipe.

    Args:
        flags: flags of the command line, without dashes.
        stronger: the layers of what the user gives, the weakest first.
    """
    user = {key: value for layer in stronger for key, value in _dotted(layer.values)}
    layer = Layer(dialect)
    seen: Values = {}
    for key, default in DIALECTS[dialect].items():
        given = Given(frozenset(flags), seen | user)
        value = default.of(given) if isinstance(default, Computed) else default
        section, _, name = key.partition(".")
        unread = section == "tuner" and not reads(given.train_type, name)
        if value is UNSET or unread or _contradicts(key, value, given):
            continue
        layer.set(key, value, key)
        seen[key] = value
    return layer


def _dotted(values: Values, prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and not prefix:
            yield from _dotted(value, f"{name}.")
        else:
            yield name, value
