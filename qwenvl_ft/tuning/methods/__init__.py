"""``tuner.train_type`` -> how the model is prepared for it. A new method is one module and one entry here."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qwenvl_ft.tuning.methods.full import build_full
from qwenvl_ft.tuning.methods.lora import build_lora


@dataclass(frozen=True)
class Method:
    """How a train type prepares a model, and what has to be true afterwards."""

    build: Callable[[Any, Any], Any]
    """(model, tuner config) -> prepared model; raises RecipeError for names and sizes that do not fit."""

    adapter: bool
    """Whether the result is a PeftModel in which the weights of the base model are frozen."""


METHODS = {
    "full": Method(build_full, adapter=False),
    "lora": Method(build_lora, adapter=True),
}
