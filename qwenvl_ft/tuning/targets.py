"""Finds the modules that a recipe's names match: adapter targets and modules trained in full.

A name matches every module whose full name equals it or ends with it after a dot: ``q_proj``, ``mlp.up_proj``,
``model.visual.merger``. A name that matches nothing is an error.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

from qwenvl_ft.errors import RecipeError, hint
from qwenvl_ft.model.anatomy import current_name, part_of
from qwenvl_ft.model.quantization import is_linear
from qwenvl_ft.recipe.methods import WITH_LORA
from qwenvl_ft.tuning.freeze_flags import freeze_flags_of, frozen_parts
from qwenvl_ft.upstream.whole import full_shape

if TYPE_CHECKING:
    from qwenvl_ft.recipe.schema import TunerConfig

logger = logging.getLogger(__name__)

ALL_LINEAR = "all-linear"
ROUTERS = re.compile(r"\.mlp\.shared_expert_gate$")
"""Linear layers with one output, which weighs the shared expert of a Qwen3.5. Like routers, they must be named."""
GATES = re.compile(rf"\.linear_attn\.in_proj_[ab]$|{ROUTERS.pattern}")
"""The same, and the gates of delta nets, which have one output for each head. Only LoRA that does not start from the
base weights adapts so few whatever its rank."""


def adapter_targets(model: nn.Module, tuner: TunerConfig) -> list[str]:
    """Return the full names of the Linear modules that get an adapter.

    Only unfrozen parts are searched, and ``modules_to_save`` are left out. ``all-linear`` means all of them except the
    language head and `ROUTERS`, for other methods than plain LoRA also `GATES`. ``target_regex`` must match a whole
    name and replaces ``target_modules``; ``^$`` selects none.

    Raises:
        RecipeError: a name or the pattern matches none of these modules.
    """
    frozen = frozen_parts(tuner)
    saved = saved_modules(model, tuner)
    linears = [name for name, module in model.named_modules() if is_linear(module)]
    free = [name for name in linears if part_of(name) not in frozen and not inside(name, saved)]
    if tuner.target_regex is not None:
        return _by_regex(tuner.target_regex, linears, free, frozen)
    left_out = ROUTERS if tuner.train_type in WITH_LORA and plain_start(tuner) else GATES
    chosen: set[str] = set()
    for wanted in tuner.target_modules:
        if wanted == ALL_LINEAR:
            chosen |= {name for name in free if not left_out.search(name)} - _heads(model)
            continue
        hits = _matches(wanted, free)
        if not hits:
            raise _unmatched_target(wanted, model, linears, frozen)
        chosen |= set(hits)
    return [name for name in free if name in chosen]


def parameter_targets(model: nn.Module, tuner: TunerConfig) -> list[str]:
    """Return the full names of the weights outside of Linear layers that get LoRA: experts and routers of MoE models.

    The experts of a layer are one tensor with three axes. ``all-linear`` includes them unless ``target_parameters`` is
    set; the router must be named.

    Raises:
        RecipeError: a name matches nothing, or LoRA with these settings cannot adapt such weights.
    """
    frozen, saved = frozen_parts(tuner), saved_modules(model, tuner)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    every = [
        name
        for name, value in model.named_parameters()
        if len(full_shape(value)) in (2, 3) and ".mlp." in name and name.rpartition(".")[0] not in linears
    ]
    free = [name for name in every if part_of(name) not in frozen and not inside(name, saved)]
    wanted = tuner.target_parameters
    if wanted is None:
        if tuner.target_regex is not None or ALL_LINEAR not in tuner.target_modules:
            return []
        experts = [name for name in free if ".mlp.experts." in name]
        if experts and not reaches_parameters(tuner):
            logger.warning("tuner.target_modules=all-linear leaves the experts out: %s.", _OUT_OF_REACH)
            return []
        return experts
    chosen: set[str] = set()
    for name in wanted:
        hits = _matches(name, free)
        if not hits:
            elsewhere = _matches(name, every)
            if elsewhere:
                raise _taken("target_parameters", name, elsewhere, frozen)
            raise RecipeError(
                f"tuner.target_parameters names {name!r}, which is not a weight of experts or a router."
                + hint(name, {_tail(full, name.count(".") + 1) for full in every})
            )
        chosen |= set(hits)
    if chosen and not reaches_parameters(tuner):
        raise RecipeError(f"tuner.target_parameters={wanted} cannot be adapted: {_OUT_OF_REACH}. Set it to [].")
    return [name for name in free if name in chosen]


def reaches_parameters(tuner: TunerConfig) -> bool:
    """Return True if LoRA with these settings can adapt weights outside of Linear layers.

    For those, peft has neither DoRA nor initialisations from weights or data.
    """
    return plain_start(tuner) and not tuner.use_dora


def plain_start(tuner: TunerConfig) -> bool:
    """Return True if LoRA's initialisation uses neither the base weights nor data."""
    return str(tuner.init_weights).lower() in ("true", "false", "gaussian")


_OUT_OF_REACH = "peft supports neither use_dora nor this init_weights for experts and routers"


def saved_modules(model: nn.Module, tuner: TunerConfig) -> list[str]:
    """Return the full names of ``tuner.modules_to_save``, with each ModuleList replaced by its elements.

    Raises:
        RecipeError: a name matches no module, or one without parameters.
    """
    modules = dict(model.named_modules())
    names: list[str] = []
    for wanted in tuner.modules_to_save:
        hits = _matches(wanted, (name for name in modules if name))
        if not hits:
            raise RecipeError(f"tuner.modules_to_save names {wanted!r}, {_problem_of(wanted, model)}")
        for hit in hits:
            names += _elements(hit, modules[hit])
    for name in names:
        if not any(True for _ in modules[name].parameters()):
            raise RecipeError(f"tuner.modules_to_save names {name!r}, which has no parameters to train.")
    return [name for name in dict.fromkeys(names) if not inside(name, [other for other in names if other != name])]


def inside(name: str, modules: Iterable[str]) -> bool:
    """Return True if ``name`` is one of ``modules`` or inside of one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _matches(wanted: str, names: Iterable[str]) -> list[str]:
    spellings = {wanted, current_name(wanted)}
    return [name for name in names if any(name == s or name.endswith(f".{s}") for s in spellings)]


def _elements(name: str, module: nn.Module) -> list[str]:
    """Return the elements of a container, whose own forward is never called; other modules stand for themselves."""
    if not isinstance(module, nn.ModuleList | nn.ModuleDict):
        return [name]
    return [leaf for key, child in module.named_children() for leaf in _elements(f"{name}.{key}", child)]


def _heads(model: Any) -> set[str]:
    """Return the names of the language head, which is adapted only if it is named."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return {name for name, module in model.named_modules() if head is not None and module is head}


def _by_regex(pattern: str, linears: list[str], free: list[str], frozen: list[str]) -> list[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise RecipeError(f"tuner.target_regex={pattern!r} is not a regular expression: {error}.") from error
    hits = [name for name in free if compiled.fullmatch(name)]
    if hits or compiled.fullmatch(""):
        return hits
    elsewhere = [name for name in linears if compiled.fullmatch(name)]
    if elsewhere:
        raise _taken("target_regex", pattern, elsewhere, frozen)
    example = free[0] if free else linears[0]
    raise RecipeError(
        f"tuner.target_regex={pattern!r} matches no Linear module. It must match a whole name, such as {example}; "
        "'^$' selects none."
    )


def _unmatched_target(wanted: str, model: nn.Module, linears: list[str], frozen: list[str]) -> RecipeError:
    elsewhere = _matches(wanted, linears)
    if elsewhere:
        return _taken("target_modules", wanted, elsewhere, frozen)
    for name in _matches(wanted, (name for name, _ in model.named_modules() if name)):
        kind = type(model.get_submodule(name)).__name__
        within = [linear.removeprefix(f"{name}.") for linear in linears if linear.startswith(f"{name}.")]
        fix = f"Name the layers in it: {', '.join(within[:4])}." if within else "Name it in tuner.modules_to_save."
        return RecipeError(f"tuner.target_modules names {wanted!r}, which is a {kind}, not a Linear layer. {fix}")
    return RecipeError(f"tuner.target_modules names {wanted!r}, {_problem_of(wanted, model, linears)}")


def _taken(key: str, wanted: str, names: list[str], frozen: list[str]) -> RecipeError:
    parts = sorted({part_of(name) for name in names} & set(frozen))
    if not parts:
        return RecipeError(f"tuner.{key} {wanted!r} matches only modules that tuner.modules_to_save trains in full.")
    return RecipeError(
        f"tuner.{key} {wanted!r} matches only modules of {', '.join(parts)}, which the recipe freezes. "
        f"Set {freeze_flags_of(parts)}."
    )


def _problem_of(wanted: str, model: nn.Module, among: list[str] | None = None) -> str:
    """Return the end of an error about a name that is not a module: it is a parameter, or the nearest names."""
    parameters = _matches(wanted, (name for name, _ in model.named_parameters(remove_duplicate=False)))
    if parameters and parameters[0].rpartition(".")[0]:
        return f"which is a parameter. Name its module: {parameters[0].rpartition('.')[0]}."
    names = among or [name for name, _ in model.named_modules() if name]
    depth = wanted.count(".") + 1
    return f"which is not a module of the model.{hint(wanted, {_tail(name, depth) for name in names})}"


def _tail(name: str, depth: int) -> str:
    return ".".join(name.split(".")[-depth:])
