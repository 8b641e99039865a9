"""Maps ``tuner.init_weights`` to the way LoRA's matrices are initialised: the settings for peft, and the steps before
and after it.

`from_data` holds the initialisations that look at batches (LoRA-GA, EVA), `original_base` the model class of those that
change the base weights (PiSSA, OLoRA, LoRA-GA), `loftq` the one that compensates for quantisation.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qwenvl_ft.errors import RecipeError, unknown_name
from qwenvl_ft.tuning.methods.starts.from_data import eva_settings, ga_gradients, ga_settings, initialize_eva
from qwenvl_ft.tuning.methods.starts.loftq import initialize_loftq
from qwenvl_ft.tuning.methods.starts.original_base import OriginalBasePeftModel, remember_start
from qwenvl_ft.tuning.targets import plain_start

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn

    from qwenvl_ft.recipe.schema import TunerConfig
    from qwenvl_ft.tuning.methods.trained import TrainedPeftModel


@dataclass(frozen=True)
class Start:
    """One way to initialise LoRA; its steps run in the order of the fields."""

    settings: Callable[[TunerConfig], dict[str, Any]]
    """(tuner) -> fields of LoraConfig."""
    prepare: Callable[[nn.Module, LoraConfig], None] = lambda model, config: None
    """(model, config), called before the model is wrapped."""
    finish: Callable[[Any], Any] = lambda wrapped: wrapped
    """(PeftModel) -> the same PeftModel, initialised."""
    kind: type[TrainedPeftModel] | None = None
    """Class of the PeftModel; None is peft's own."""


def check_sizes(tuner: TunerConfig, sizes: dict[str, tuple[int, int]]) -> None:
    """Raise if a rank is larger than the number of directions that the initialisation can take from a layer's weight.

    Args:
        sizes: target -> (its rank, the smaller side of its weight).

    Raises:
        RecipeError: names the layer.
    """
    if not tuner.changes_base:
        return
    start = tuner.init_weights
    share = 2 if start == "lora-ga" else 1  # it takes 2 r singular vectors
    for name, (rank, side) in sizes.items():
        if share * rank > side:
            raise RecipeError(
                f"tuner.init_weights={start} with rank {rank} needs {share * rank} directions of {name}, which has "
                f"only {side}. Lower tuner.lora_rank, or give that layer a lower rank in tuner.rank_pattern."
            )


def wants_data(tuner: TunerConfig) -> bool:
    """Return True if the initialisation that a recipe asks for looks at batches."""
    return tuner.train_type in ("lora", "longlora") and tuner.init_weights in ("lora-ga", "eva")


def start_of(tuner: TunerConfig, batches: Sequence[Any] | None = None) -> Start:
    """Return the initialisation that ``tuner.init_weights`` names.

    Args:
        batches: batches of the collator, for lora-ga and eva.

    Raises:
        RecipeError: an unknown name, or no batches for an initialisation that needs them.
    """
    name = str(tuner.init_weights).lower()
    if plain_start(tuner):
        value = {"true": True, "false": False}.get(name, name)
        return Start(lambda tuner: {"init_lora_weights": value})
    if name in ("pissa", "olora") or re.fullmatch(r"pissa_niter_[1-9]\d*", name):
        return Start(lambda tuner: {"init_lora_weights": name}, finish=remember_start, kind=OriginalBasePeftModel)
    if name == "loftq":
        return Start(lambda tuner: {"init_lora_weights": True}, finish=initialize_loftq)
    if name not in ("lora-ga", "eva"):
        known = ("true", "false", "gaussian", "pissa", "pissa_niter_N", "olora", "loftq", "lora-ga", "eva")
        raise unknown_name("tuner.init_weights", name, known)
    if not batches:
        raise RecipeError(
            f"tuner.init_weights={name} looks at data: pass batches of the collator to prepare_model(model, tuner, "
            "batches=[...]). A run of a recipe makes them itself."
        )
    if name == "eva":
        return Start(eva_settings, finish=lambda wrapped: initialize_eva(wrapped, batches))
    return Start(
        ga_settings,
        prepare=lambda model, config: ga_gradients(model, config, batches),
        finish=remember_start,
        kind=OriginalBasePeftModel,
    )
