"""What does ``training.resume_weights_only`` do? It starts a new run from a checkpoint's weights, and nothing else."""

from copy import deepcopy
from pathlib import Path

from qwenvl_ft.checkpoint.complete import AUTO, FRESH, WEIGHTS
from qwenvl_ft.checkpoint.manifest import content_fault, read
from qwenvl_ft.errors import CheckpointError, RecipeError
from qwenvl_ft.recipe.methods import METHODS
from qwenvl_ft.recipe.schema import Recipe, TunerConfig

KEY = "training.resume_weights_only=true"


def from_weights_only(recipe: Recipe) -> Recipe:
    """Return the recipe of a new run from the weights of ``training.resume_from_checkpoint``, if it asks for that.

    The folder becomes ``model.model``, or ``tuner.resume_from_checkpoint`` for an adapter. The run is not resumed: it
    starts at step 0, so it needs an ``output_dir`` of its own, and can itself be resumed.

    Raises:
        RecipeError: the recipe names no folder, or its method cannot start from one.
        CheckpointError: the weights are not those that were saved.
    """
    if not recipe.training.resume_weights_only:
        return recipe
    named = str(recipe.training.resume_from_checkpoint or "")
    if named.lower() in (*AUTO, *FRESH):
        raise RecipeError(f"{KEY} needs the folder of a checkpoint. Set training.resume_from_checkpoint=FOLDER.")
    method = recipe.tuner.train_type
    if method == "llamapro":
        raise RecipeError(
            f"{KEY}: tuner.train_type=llamapro would add its blocks again. Set tuner.train_type=full and "
            f"model.model={named}."
        )
    require_saved_weights("training.resume_from_checkpoint", Path(named))
    run = deepcopy(recipe)
    run.training.resume_from_checkpoint, run.training.resume_weights_only = None, False
    start_from(run, named, adapter=METHODS[method].adapter)
    return run


def start_from(run: Recipe, folder: str, *, adapter: bool) -> None:
    """Let a run start from the weights in a folder: those of an adapter, or of a whole model."""
    if adapter:
        run.tuner.resume_from_checkpoint = folder
        run.tuner.init_weights = TunerConfig().init_weights  # the adapter has its weights
    else:
        run.model.model, run.model.model_revision = folder, "main"


def require_saved_weights(key: str, folder: Path) -> None:
    """Raise CheckpointError if a folder has a manifest and its weights are not as they were saved.

    Args:
        key: the recipe key that names the folder.
    """
    files = (read(folder) or {"files": {}})["files"]
    weights = [name for name in files if any(Path(name).match(pattern) for pattern in WEIGHTS)]
    fault = content_fault(folder, weights)
    if fault is not None:
        raise CheckpointError(f"{key}={folder}: {fault}. Name another checkpoint.")
