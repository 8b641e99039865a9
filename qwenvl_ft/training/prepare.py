"""Prepares a run: everything between reading the recipe and loading its data and model, in order."""

from contextlib import AbstractContextManager, nullcontext

from transformers import TrainingArguments

from qwenvl_ft.recipe.schema import Recipe
from qwenvl_ft.training.arguments import build_arguments
from qwenvl_ft.training.preflight import preflight, try_model
from qwenvl_ft.training.ranks import join_ranks, set_single_rank
from qwenvl_ft.training.trackers import set_tracker_variables
from qwenvl_ft.upstream.launcher import launcher_shards
from qwenvl_ft.upstream.probe import fallbacks
from qwenvl_ft.upstream.restarts import meet_anew
from qwenvl_ft.upstream.unused import unused


def prepare_run(recipe: Recipe) -> TrainingArguments:
    """Check what can be checked without data, join the ranks, and return the run's TrainingArguments.

    `try_model` and `fallbacks` build models without weights, so they precede TrainingArguments: once these exist under
    ZeRO-3, transformers shards every model that is built.

    Raises:
        RecipeError: a setting does not work on this machine or with these packages.
        CheckpointError: there is no such model.
    """
    try_model(recipe)
    fallbacks()  # the answers are cached
    if recipe.deepspeed.enabled:
        set_single_rank()
    meet_anew()
    args = build_arguments(recipe)
    join_ranks(args)
    preflight(recipe, args)
    set_tracker_variables(recipe.training, list(args.report_to or []))
    return args


def unused_packages(recipe: Recipe) -> AbstractContextManager[None]:
    """Hide DeepSpeed inside the context unless the recipe or launcher uses it: accelerate imports it if installed."""
    needed = recipe.deepspeed.enabled or launcher_shards() == "DeepSpeed"
    return nullcontext() if needed else unused("deepspeed")
