"""Reads from a recipe which parts of the model are frozen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.model.anatomy import FREEZE_FLAGS

if TYPE_CHECKING:
    from qwenvl_ft.recipe.schema import TunerConfig


def frozen_parts(tuner: TunerConfig) -> list[str]:
    """Return the parts whose flag (``freeze_vit``, ``freeze_aligner``, ``freeze_llm``) is set."""
    return [part for part, flag in FREEZE_FLAGS.items() if getattr(tuner, flag)]


def freeze_flags_of(parts: list[str]) -> str:
    """Return the recipe keys that unfreeze ``parts``, as a user types them."""
    return ", ".join(f"tuner.{FREEZE_FLAGS[part]}=false" for part in parts)


def require_language_model_only(tuner: TunerConfig) -> None:
    """Raise unless a recipe trains only the language model, for train types that change nothing else.

    Raises:
        RecipeError: the language model is frozen, another part is unfrozen, or target modules are named.
    """
    if tuner.freeze_llm or not (tuner.freeze_vit and tuner.freeze_aligner):
        raise RecipeError(
            f"tuner.train_type={tuner.train_type} changes the language model only: set tuner.freeze_llm=false, "
            "freeze_vit=true and freeze_aligner=true. To train another part too, name it in tuner.modules_to_save."
        )
    if tuner.target_regex is not None or tuner.target_modules != ["all-linear"]:
        raise RecipeError(
            f"tuner.train_type={tuner.train_type} has no target modules. Remove tuner.target_modules and target_regex."
        )
