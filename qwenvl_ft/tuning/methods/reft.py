"""Train type ``reft``: low-rank edits of the language model's hidden states at first and last tokens of prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qwenvl_ft.errors import RecipeError, unknown_name
from qwenvl_ft.model.adapters import register_adapters
from qwenvl_ft.tuning.freeze_flags import require_language_model_only
from qwenvl_ft.tuning.methods.lora import wrap_own
from qwenvl_ft.tuning.targets import inside, saved_modules

if TYPE_CHECKING:
    from torch import nn

    from qwenvl_ft.recipe.schema import TunerConfig


def build_reft(model: Any, tuner: TunerConfig) -> nn.Module:
    """Wrap the model in a PeftModel whose only trainable weights are the edits and ``modules_to_save``.

    Raises:
        RecipeError: an unknown kind of edit, invalid layers or positions, or keys that ReFT cannot use.
    """
    from qwenvl_ft.model.adapters.interventions import INTERVENTIONS, ReftConfig, parse_positions

    if tuner.reft_intervention_type not in INTERVENTIONS:
        raise unknown_name("tuner.reft_intervention_type", tuner.reft_intervention_type, INTERVENTIONS)
    require_language_model_only(tuner)
    parse_positions(tuner.reft_positions)
    register_adapters()
    return wrap_own(
        model,
        ReftConfig,
        tuner,
        layers(model, tuner),
        rank=tuner.reft_rank,
        intervention=tuner.reft_intervention_type,
        positions=tuner.reft_positions,
    )


def layers(model: Any, tuner: TunerConfig) -> list[str]:
    """Return the full names of the decoder layers whose output is edited; all of them if the recipe names none.

    Raises:
        RecipeError: the model has no such layer, or one is trained in full.
    """
    count = len(model.model.language_model.layers)
    indices = list(range(count)) if tuner.reft_layers is None else tuner.reft_layers
    wrong = [layer for layer in indices if not 0 <= layer < count]
    if wrong or not indices:
        raise RecipeError(f"tuner.reft_layers={indices}: the language model has layers 0 to {count - 1}.")
    names = [f"model.language_model.layers.{layer}" for layer in dict.fromkeys(indices)]
    saved = saved_modules(model, tuner)
    clash = [name for name in names if inside(name, saved) or any(inside(other, [name]) for other in saved)]
    if clash:
        raise RecipeError(
            f"tuner.modules_to_save trains {clash[0]} in full, or a module in it, but ReFT edits the output of that "
            "layer. Leave the layer out of tuner.reft_layers."
        )
    return names
