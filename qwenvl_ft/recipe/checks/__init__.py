"""Is this recipe consistent? Finds settings that are valid individually but contradict each other.

Each check takes a recipe and returns the error message for the first contradiction that it finds, with the key to
change, or None. One module per topic; `CHECKS` lists all of them.
"""

from collections.abc import Callable

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.recipe.checks import data, evaluation, fields, launcher, memory, method, optimizer, stream
from qwenvl_ft.recipe.schema import Recipe

Check = Callable[[Recipe], str | None]

CHECKS: tuple[Check, ...] = (
    fields.output_dir,
    fields.without_effect,
    memory.activation_checkpointing,
    data.sampling,
    memory.compilation,
    data.lengths,
    method.initialisation,
    evaluation.direction_of_metric,
    optimizer.unsuitable,
    optimizer.low_rank,
    optimizer.lora_plus,
    optimizer.lisa,
    method.quantization,
    launcher.one_sharding,
    launcher.fsdp_version,
    method.adalora_needs_gradients,
    method.second_stage,
    method.shared_rows,
    data.areas,
    data.datasets,
    data.names_of_validation_sets,
    stream.settings,
    method.nothing_trains,
    data.packing,
    evaluation.evaluation_data,
    evaluation.metric_for_best_model,
    evaluation.load_best_model,
    memory.precision,
    optimizer.schedule,
)
"""All checks, in order. The first message is the one that the user sees."""


def check(recipe: Recipe) -> None:
    """Check a recipe.

    Raises:
        RecipeError: two settings contradict each other.
    """
    for find_contradiction in CHECKS:
        message = find_contradiction(recipe)
        if message:
            raise RecipeError(message)
