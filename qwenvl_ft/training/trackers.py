"""Sets the environment variables of experiment trackers from keys of ``training``."""

import os

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.recipe.schema import SECRETS, TrainingConfig

TRACKERS = {
    "wandb_project": ("wandb", "WANDB_PROJECT"),
    "wandb_entity": ("wandb", "WANDB_ENTITY"),
    "swanlab_project": ("swanlab", "SWANLAB_PROJECT"),
    "swanlab_mode": ("swanlab", "SWANLAB_MODE"),
    "swanlab_token": ("swanlab", "SWANLAB_API_KEY"),
}
"""Key under ``training`` -> the tracker in ``report_to`` that reads it, and the environment variable it reads."""


def set_tracker_variables(section: TrainingConfig, report_to: list[str]) -> None:
    """Set the variables of the trackers in ``report_to``, and TensorBoard's folder if ``logging_dir`` is given.

    With ``report_to=none`` the keys of trackers are ignored.

    Raises:
        RecipeError: a key is set whose tracker is not in ``report_to``.
    """
    if section.logging_dir is not None:
        os.environ["TENSORBOARD_LOGGING_DIR"] = section.logging_dir
    for name, (tracker, variable) in TRACKERS.items():
        value = getattr(section, name)
        if value is None or not report_to:
            continue
        if tracker not in report_to:
            setting = f"training.{name}" if name in SECRETS else f"training.{name}={value}"
            raise RecipeError(
                f"{setting} is only read by {tracker}, but training.report_to is {', '.join(report_to)}. "
                f"Add {tracker} to it, or remove training.{name}."
            )
        os.environ[variable] = value
