"""The training methods: every value of ``tuner.train_type``, its functions, and the keys of ``tuner`` that it reads.

To add one, write its functions in a module of `qwenvl_ft.tuning.methods` and add an entry to `METHODS`. The functions
are named by ``module:function`` and imported when a model is prepared, so that reading a recipe imports neither torch
nor peft.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from qwenvl_ft.recipe.choices import imported
from qwenvl_ft.recipe.sections.tuner import AdaLora, FullTraining, LoraStart

TUNING = "qwenvl_ft.tuning.methods."


@dataclass(frozen=True, kw_only=True)
class Method:
    """A training method: how it prepares a model, and which settings it takes."""

    builder: str
    """``module:function`` of ``(model, tuner) -> prepared model``. The function raises RecipeError for names or sizes
    that do not fit the model."""
    adapter: bool
    """True if the result is a PeftModel in which the base model's weights are frozen."""
    keys: tuple[str, ...] = ()
    """Keys of ``tuner`` that this method reads, besides those that no method lists, which all methods read."""
    over_quantized: bool = False
    """True if it can train over a base model that bitsandbytes quantised. Tests train, resume and merge each."""
    reads_data: bool = False
    """True if the builder also takes ``batches``, for initialisations that are computed from data."""
    trial: str | None = None
    """``module:function`` of ``(model without weights, tuner)``, which raises RecipeError for names or sizes that do
    not fit. It runs before the weights are loaded."""
    schedule: str | None = None
    """``module:function`` of ``(tuner, steps of the run)``, which raises RecipeError if they are too few. It runs
    before the model is loaded."""
    checker: str | None = None
    """``module:function`` of ``(model, tuner)``, which raises RecipeError if weights other than the method's would
    train."""

    @property
    def build(self) -> Callable[..., Any]:
        """The function named by ``builder``."""
        return _function(self.builder)

    @property
    def names(self) -> Callable[..., Any] | None:
        """The function named by ``trial``."""
        return _function(self.trial) if self.trial else None

    @property
    def enough_steps(self) -> Callable[..., None] | None:
        """The function named by ``schedule``."""
        return _function(self.schedule) if self.schedule else None

    @property
    def check(self) -> Callable[..., None] | None:
        """The function named by ``checker``."""
        return _function(self.checker) if self.checker else None


def _function(path: str) -> Callable[..., Any]:
    function: Callable[..., Any] = imported(path)
    return function


def _keys(topic: type, *left_out: str) -> tuple[str, ...]:
    return tuple(entry.name for entry in fields(topic) if entry.name not in left_out)


TARGETS = ("target_modules", "target_regex")
SCALED = ("lora_alpha", "lora_dropout", "lora_bias", "lora_dtype")
"""Keys of LoRA that AdaLoRA reads too."""
LORA = (
    *TARGETS,
    "target_parameters",
    "lora_rank",
    *SCALED,
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    *_keys(LoraStart),
)


def _adapter(
    builder: str, trial: str, keys: tuple[str, ...], *, over_quantized: bool = False, reads_data: bool = False
) -> Method:
    """Return a method that adds weights to a frozen base model; its functions are named below `TUNING`."""
    return Method(
        builder=TUNING + builder,
        trial=TUNING + trial,
        adapter=True,
        keys=keys,
        over_quantized=over_quantized,
        reads_data=reads_data,
    )


def _by_config(*keys: str, over_quantized: bool = False) -> Method:
    """Return a method of peft that only needs a config (tuning/methods/peft_methods.py)."""
    functions = "peft_methods:build_by_config", "peft_methods:fitting_config"
    return _adapter(*functions, (*TARGETS, *keys), over_quantized=over_quantized)


OPTIONS_ONLY = (
    "c3a",
    "deft",
    "delora",
    "gralora",
    "hira",
    "hra",
    "ia3",
    "loha",
    "lokr",
    "miss",
    "oft",
    "psoft",
    "randlora",
    "road",
    "shira",
    "tinylora",
    "vblora",
    "waveft",
)
"""Methods of peft without keys of their own: all their settings are in ``tuner.peft_options``."""

METHODS: dict[str, Method] = {
    "full": Method(
        builder=f"{TUNING}full:build_full",
        trial=f"{TUNING}full:free_weights",
        checker=f"{TUNING}full:check_full",
        adapter=False,
        keys=_keys(FullTraining),
    ),
    "lora": _adapter("lora:build_lora", "lora:lora_place", LORA, over_quantized=True, reads_data=True),
    "longlora": _adapter(
        "longlora:build_longlora",
        "longlora:longlora_place",
        (*LORA, "longlora_group_size", "longlora_embeddings_and_norms"),
        over_quantized=True,
        reads_data=True,
    ),
    "adalora": replace(
        _adapter("adalora:build_adalora", "lora:place", (*TARGETS, *SCALED, *_keys(AdaLora))),
        schedule=f"{TUNING}adalora:require_enough_steps",
    ),
    "llamapro": Method(
        builder=f"{TUNING}llamapro:build_llamapro",
        trial=f"{TUNING}llamapro:build_llamapro",
        checker=f"{TUNING}llamapro:check_llamapro",
        adapter=False,
        keys=("llamapro_num_new_blocks",),
    ),
    "adapter": _adapter(
        "adapter:build_adapter",
        "adapter:build_adapter",
        (*TARGETS, "adapter_length", "adapter_act"),
        over_quantized=True,
    ),
    "reft": _adapter(
        "reft:build_reft",
        "reft:build_reft",
        ("reft_layers", "reft_rank", "reft_intervention_type", "reft_positions"),
        over_quantized=True,
    ),
    "vera": _by_config("vera_rank", "vera_dropout", "vera_d_initial", over_quantized=True),
    "boft": _by_config(
        "boft_block_size", "boft_block_num", "boft_n_butterfly_factor", "boft_dropout", over_quantized=True
    ),
    "fourierft": _by_config("fourier_n_frequency", "fourier_scaling", over_quantized=True),
    "bone": _by_config("bone_rank", "bone_init", over_quantized=True),
    **{name: _by_config("peft_options", over_quantized=name == "oft") for name in OPTIONS_ONLY},
}
"""``tuner.train_type`` -> method."""

LORAS = ("lora", "longlora")
"""Train types that are LoRA with all its initialisations."""
WITH_LORA = (*LORAS, "adalora")
"""Train types whose adapters have LoRA's matrices A and B."""


def readers(key: str) -> list[str]:
    """Return the train types that list ``tuner.key``; none for a key that all methods read."""
    return [name for name, method in METHODS.items() if key in method.keys]


def reads(train_type: Any, key: str) -> bool:
    """Return True if a train type reads ``tuner.key``."""
    listed = readers(key)
    return not listed or train_type in listed


def over_quantized() -> list[str]:
    """Return the train types that can train over a quantised base model."""
    return [name for name, method in METHODS.items() if method.over_quantized]
