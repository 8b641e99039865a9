"""``tuner.train_type`` -> how the model is prepared for it. A new method is one module and one entry here."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from qwenvl_ft.recipe.checks import OPTIONS_ONLY
from qwenvl_ft.tuning.methods.adalora import build_adalora
from qwenvl_ft.tuning.methods.adapter import build_adapter
from qwenvl_ft.tuning.methods.full import build_full, check_full, free_weights
from qwenvl_ft.tuning.methods.llamapro import build_llamapro, check_llamapro
from qwenvl_ft.tuning.methods.longlora import build_longlora
from qwenvl_ft.tuning.methods.lora import build_lora, lora_place, place
from qwenvl_ft.tuning.methods.peft_methods import OWN_KEYS, build_by_config, fitting_config
from qwenvl_ft.tuning.methods.reft import build_reft


@dataclass(frozen=True)
class Method:
    """How a train type prepares a model, and what has to be true afterwards."""

    build: Callable[..., Any]
    """(model, tuner config) -> prepared model; raises RecipeError for names and sizes that do not fit."""

    adapter: bool
    """Whether the result is a PeftModel in which the weights of the base model are frozen."""

    reads_data: bool = False
    """Whether ``build`` takes ``batches``, for starts that look at data."""

    names: Callable[..., Any] | None = None
    """(model without weights, tuner config): raises RecipeError for names and sizes that do not fit it."""

    check: Callable[[Any, Any], None] | None = None
    """(model, tuner config): refuses a model in which more than the method's own weights would train."""


METHODS = {
    "full": Method(build_full, adapter=False, names=free_weights, check=check_full),
    "lora": Method(build_lora, adapter=True, reads_data=True, names=lora_place),
    "adapter": Method(build_adapter, adapter=True, names=build_adapter),
    "reft": Method(build_reft, adapter=True, names=build_reft),
    "llamapro": Method(build_llamapro, adapter=False, names=build_llamapro, check=check_llamapro),
    "longlora": Method(build_longlora, adapter=True, reads_data=True, names=partial(lora_place, tied_copies=True)),
    "adalora": Method(build_adalora, adapter=True, names=place),
    **{name: Method(build_by_config, adapter=True, names=fitting_config) for name in (*OWN_KEYS, *OPTIONS_ONLY)},
}
