"""Does accelerate's configuration agree with the recipe? It reaches a run as variables that would win in silence."""

from typing import Any

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.recipe.schema import Recipe
from qwenvl_ft.upstream.launcher import launcher_compiles, launcher_precision, launcher_recomputes


def require_launcher_agrees(recipe: Recipe, arguments: dict[str, Any]) -> None:
    """Compare what accelerate's file and flags set with the fields of TrainingArguments.

    Raises:
        RecipeError: they contradict each other.
    """
    given, dtype = launcher_precision(), recipe.model.torch_dtype
    wanted = next((half for half in ("bf16", "fp16") if arguments[half]), "no")
    if given not in ("no", wanted):
        half = f"training.{given}=true" if given in ("bf16", "fp16") else "training.bf16=true"
        raise RecipeError(
            f"accelerate's configuration sets mixed_precision: {given} (ACCELERATE_MIXED_PRECISION), but the recipe "
            f"says {'none' if wanted == 'no' else wanted} by model.torch_dtype={dtype}, training.bf16="
            f"{arguments['bf16']} and training.fp16={arguments['fp16']}. Set mixed_precision: '{wanted}' there, or "
            f"{half} here."
        )
    if launcher_recomputes() and arguments["activation_checkpointing"]:
        raise RecipeError(
            "accelerate's configuration sets fsdp_activation_checkpointing, and the recipe training."
            "activation_checkpointing: every layer would be computed three times. Remove one of them."
        )
    backend = launcher_compiles()
    if backend is not None and not arguments.get("torch_compile"):
        raise RecipeError(
            f"accelerate's configuration compiles the model (dynamo_backend: {backend}), but the recipe does not set "
            "training.torch_compile. Set training.torch_compile=true, or dynamo_backend: 'no' there."
        )
