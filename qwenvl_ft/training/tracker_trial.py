"""Does an experiment tracker work with this transformers? Starts, feeds and ends it in another process, offline.

transformers starts its trackers only after the data is measured and the model is loaded, and calls functions of their
packages that some versions lack.
"""

import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from qwenvl_ft.errors import RecipeError, one_line

logger = logging.getLogger(__name__)

OFFLINE: dict[str, dict[str, str]] = {
    "clearml": {"CLEARML_OFFLINE_MODE": "1"},
    "codecarbon": {},
    "comet_ml": {"COMET_START_ONLINE": "0", "COMET_START_MODE": "create"},
    "dvclive": {},
    "mlflow": {"MLFLOW_TRACKING_URI": "sqlite:///mlflow.db"},
    "neptune": {"NEPTUNE_MODE": "offline"},
    "swanlab": {"SWANLAB_MODE": "offline"},
    "trackio": {"TRACKIO_DIR": "trackio"},
    "wandb": {"WANDB_MODE": "offline", "WANDB_SILENT": "true"},
}
"""Tracker that can be tried -> environment variables with which it writes into the working folder only. The others
belong to a platform and have no such mode (azure_ml, dagshub, flyte, kubeflow), or are tried by nothing more than
writing files (tensorboard)."""
KNOWN_TO_WORK = {"swanlab": "0.6.13"}
"""Tracker -> a version that works where newer ones do not."""
SECONDS = 120
"""Time limit of a trial, most of which is the import of transformers. A tracker that takes longer is left to the
run."""
OF_A_LAUNCHER = ("ACCELERATE_", "FSDP_", "MASTER_", "TORCHELASTIC_", "PET_")
RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK")
"""Variables of a launched process, which would have the trial wait for the other ranks."""


@cache
def try_tracker(name: str) -> bool:
    """Start a tracker as transformers does, log one value and end it; once in a process, of which phases are part.

    Returns:
        True if it did all that, False if it has no trial, or not in time.

    Raises:
        RecipeError: it fails; the message has its version and the cause.
    """
    if name not in OFFLINE:
        return False
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-m", "qwenvl_ft.training.tracker_trial", name],
                cwd=folder,
                env=_environment(name) | OFFLINE[name],
                capture_output=True,
                text=True,
                stdin=subprocess.DEVNULL,
                timeout=SECONDS,
            )
        except subprocess.TimeoutExpired:
            logger.warning("training.report_to=%s: its trial took more than %d s and was given up.", name, SECONDS)
            return False
    if done.returncode:
        raise RecipeError(f"training.report_to={name}: {_installed(name)} {_cause(name, done.stderr)}")
    return True


def _environment(name: str) -> dict[str, str]:
    """Return this process's environment without what a launcher set, and with this package to be found.

    The tracker's own variables are left out: they name the run to continue and the folder to write into, which the
    trial must not touch.
    """
    root, own = str(Path(__file__).resolve().parents[2]), name.partition("_")[0].upper()
    kept = {
        key: value
        for key, value in os.environ.items()
        if key not in RANKS and not key.startswith(OF_A_LAUNCHER) and own not in key
    }
    path = [root, *([kept["PYTHONPATH"]] if "PYTHONPATH" in kept else [])]
    return kept | {"PYTHONPATH": os.pathsep.join(path), "CUDA_VISIBLE_DEVICES": ""}


def _installed(name: str) -> str:
    for package in (name, name.replace("_", "-")):
        try:
            return f"{package} {version(package)}"
        except PackageNotFoundError:
            continue
    return name


def _cause(name: str, stderr: str) -> str:
    lines = [line for line in stderr.splitlines() if line.strip()]
    cause = one_line(lines[-1] if lines else "it ended without a message").rstrip(".")
    known = f"install {name}=={KNOWN_TO_WORK[name]}" if name in KNOWN_TO_WORK else "install another version"
    return f"does not work with transformers {version('transformers')}: {cause}. Choose another tracker, or {known}."


def _trial(name: str) -> None:
    """Call a tracker's callback as a training run does."""
    from torch import nn
    from transformers import PretrainedConfig, TrainerControl, TrainerState, TrainingArguments, integrations

    class Model(nn.Linear):
        """The smallest model with what trackers ask of one."""

        config = PretrainedConfig()

        def num_parameters(self) -> int:
            return 6

    find: Callable[[list[str]], list[Any]] = integrations.get_reporting_integration_callbacks
    (callback,) = find([name])
    tracker = callback()
    Path("output").mkdir(exist_ok=True)  # a trainer makes it too, and codecarbon requires it
    args = TrainingArguments(output_dir="output", report_to=[], use_cpu=True, run_name="trial")
    state, control, model = TrainerState(max_steps=1), TrainerControl(), Model(2, 2)
    given = {"model": model, "processing_class": None}
    tracker.on_init_end(args, state, control, **given)
    tracker.on_train_begin(args, state, control, **given)
    state.global_step = 1
    tracker.on_log(args, state, control, logs={"loss": 1.0}, **given)
    tracker.on_train_end(args, state, control, **given)


if __name__ == "__main__":
    _trial(sys.argv[1])
