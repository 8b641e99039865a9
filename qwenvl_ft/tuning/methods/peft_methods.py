"""Train types that peft implements and that only need a config, which this module builds from the recipe's keys.

A train type with recipe keys of its own (``vera_rank``) is listed in `OWN_KEYS`; all others take peft's fields through
``tuner.peft_options``. If a method does not support the size of a layer, the error names the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

from qwenvl_ft.errors import RecipeError, hint, one_line
from qwenvl_ft.tuning.methods.lora import place, wrap
from qwenvl_ft.upstream.peft import config_class_of

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from qwenvl_ft.recipe.schema import TunerConfig

Sizes = Callable[[Any, int, int], str | None]
"""(config, in_features, out_features) -> why the method does not support that size, or None if it does."""


def _vera(tuner: TunerConfig) -> dict[str, Any]:
    return {"r": tuner.vera_rank, "vera_dropout": tuner.vera_dropout, "d_initial": tuner.vera_d_initial}


def _boft(tuner: TunerConfig) -> dict[str, Any]:
    size = tuner.boft_block_size
    if tuner.boft_block_num:
        if size not in (0, 4):
            raise RecipeError(
                f"tuner.boft_block_size={size} and tuner.boft_block_num={tuner.boft_block_num} both set the blocks of "
                "a layer. Keep one."
            )
        size = 0
    elif not size:
        raise RecipeError("tuner.boft_block_size=0 needs tuner.boft_block_num. Set one of them.")
    return {
        "boft_block_size": size,
        "boft_block_num": tuner.boft_block_num,
        "boft_n_butterfly_factor": tuner.boft_n_butterfly_factor,
        "boft_dropout": tuner.boft_dropout,
    }


def _fourierft(tuner: TunerConfig) -> dict[str, Any]:
    return {"n_frequency": tuner.fourier_n_frequency, "scaling": tuner.fourier_scaling}


def _bone(tuner: TunerConfig) -> dict[str, Any]:
    return {"r": tuner.bone_rank, "init_weights": True if tuner.bone_init == "default" else tuner.bone_init}


def _boft_size(config: Any, width: int, height: int) -> str | None:
    blocks = config.boft_block_num or (width // config.boft_block_size if width % config.boft_block_size == 0 else 0)
    if not blocks or width % blocks:
        key = "boft_block_num" if config.boft_block_num else "boft_block_size"
        return f"is {width} wide, which tuner.{key}={getattr(config, key)} does not divide"
    spread = 2 ** (config.boft_n_butterfly_factor - 1)
    if blocks % spread or (config.boft_n_butterfly_factor > 1 and width // blocks % 2):
        return f"has {blocks} blocks, too few or odd for tuner.boft_n_butterfly_factor={config.boft_n_butterfly_factor}"
    return None


def _fourier_size(config: Any, width: int, height: int) -> str | None:
    if config.n_frequency > width * height:
        return f"has {width * height} frequencies, fewer than tuner.fourier_n_frequency={config.n_frequency}"
    return None


def _bat_size(config: Any, width: int, height: int) -> str | None:
    if config.init_weights == "bat" and (width % config.r or height % config.r):
        return f"is {width} x {height}, which tuner.bone_rank={config.r} does not divide (bone_init=bat needs it)"
    return None


OWN_KEYS: dict[str, tuple[str, Callable[[TunerConfig], dict[str, Any]], Sizes | None]] = {
    "vera": ("VERA", _vera, None),
    "boft": ("BOFT", _boft, _boft_size),
    "fourierft": ("FOURIERFT", _fourierft, _fourier_size),
    "bone": ("MISS", _bone, _bat_size),
}
"""Train type -> (peft's name, function that builds peft's fields, check of sizes). Bone is called MiSS in peft."""

PLACED = ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern", "task_type")
"""Fields of peft's configs that follow from keys of the recipe's ``tuner`` section."""
DEFAULTS: dict[str, dict[str, Any]] = {"ia3": {"feedforward_modules": []}}
"""Fields for which peft has no default for these models. IA3 scales outputs."""


def build_by_config(model: PreTrainedModel, tuner: TunerConfig) -> nn.Module:
    """Wrap the model in a PeftModel of the method that ``train_type`` names.

    Raises:
        RecipeError: as `fitting_config`, or an error of peft while it wraps the model.
    """
    kind, factors = tuner.train_type, tuner.boft_n_butterfly_factor
    config = fitting_config(model, tuner)
    try:
        wrapped = wrap(model, config, tuner)
    except (ValueError, TypeError, RuntimeError) as error:
        raise RecipeError(f"tuner.train_type={kind} does not fit the model: {one_line(error)}") from error
    if kind == "boft" and factors > 1 and not all(getattr(m, "fbd_cuda_available", True) for m in wrapped.modules()):
        raise RecipeError(
            f"tuner.boft_n_butterfly_factor={factors} needs peft's CUDA extension, which could not be built (it needs "
            "a GPU, nvcc and ninja); without it peft would use 1. Set it to 1."
        )
    return wrapped


def fitting_config(model: PreTrainedModel, tuner: TunerConfig) -> Any:
    """Return the peft config of a method. Only names and sizes of the model are read, so it may be on the meta device.

    Raises:
        RecipeError: an option that the method does not have or rejects, a layer of an unsupported size, or no target.
    """
    import peft

    kind, options, check_size = tuner.train_type, dict(tuner.peft_options), None
    if kind in OWN_KEYS:
        name, build_options, check_size = OWN_KEYS[kind]
        options = build_options(tuner)
    else:
        name = kind.upper()
    config_class = config_class_of(name, f"tuner.train_type={kind}")
    _check_options(kind, options, config_class)
    targets = place(model, tuner)
    if not isinstance(targets["target_modules"], list):
        raise RecipeError(
            f"tuner.train_type={kind} has no layer to adapt: only tuner.modules_to_save would train. Use "
            "tuner.train_type=lora with target_regex '^$', or full."
        )
    try:
        config = config_class(task_type="CAUSAL_LM", **(DEFAULTS.get(kind, {}) | options), **targets)
    except (ValueError, TypeError) as error:
        raise RecipeError(f"tuner.train_type={kind}: {one_line(error)} (peft {peft.__version__})") from error
    for target in targets["target_modules"]:
        layer: Any = model.get_submodule(target)
        problem = check_size(config, layer.in_features, layer.out_features) if check_size else None
        if problem:
            raise RecipeError(f"tuner.train_type={kind}: {target} {problem}. Change it, or leave the layer out.")
    return config


def option_names(config_class: Any) -> Iterator[str]:
    """Yield the fields of a peft config that ``tuner.peft_options`` may set."""
    from peft import PeftConfig

    common = {entry.name for entry in fields(PeftConfig)}
    for entry in fields(config_class):
        if entry.name not in common and entry.name not in PLACED:
            assert entry.default is not MISSING or entry.default_factory is not MISSING, entry.name
            yield entry.name


def _check_options(kind: str, options: dict[str, Any], config_class: Any) -> None:
    known = list(option_names(config_class))
    for name in options:
        if name not in known:
            raise RecipeError(
                f"tuner.peft_options.{name}: tuner.train_type={kind} has no such field.{hint(name, known)}"
            )
