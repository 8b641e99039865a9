"""Every tracker of transformers is started, fed and ended in its offline mode before data is measured."""

import importlib.util
import os
from importlib.metadata import version
from typing import get_args

import pytest
from packaging.version import Version

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.recipe.trainer_fields import Tracker
from qwenvl_ft.training import tracker_trial
from qwenvl_ft.training.tracker_trial import OFFLINE, try_tracker

WITHOUT_TRIAL = {
    "tensorboard": "it only writes files",
    "none": "it is none",
    "all": "TrainingArguments replaces it by the installed ones",
    "azure_ml": "it belongs to a platform",
    "dagshub": "it belongs to a platform",
    "flyte": "it belongs to a platform",
    "kubeflow": "it belongs to a platform",
}


def test_every_value_of_report_to_has_a_trial_or_a_reason_for_none():
    assert OFFLINE.keys() | WITHOUT_TRIAL.keys() == set(get_args(Tracker))
    assert not OFFLINE.keys() & WITHOUT_TRIAL.keys()


@pytest.mark.soak
@pytest.mark.slow
@pytest.mark.parametrize("name", OFFLINE)
def test_an_installed_tracker_runs_in_its_offline_mode_and_leaves_nothing_behind(name, tmp_path, monkeypatch):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tracker_trial, "SECONDS", 500)
    if name == "swanlab" and Version(version("swanlab")) >= Version("0.7"):
        with pytest.raises(RecipeError, match=r"swanlab 0\.\S+ does not work with transformers .*swanlab==0\.6\.13\."):
            try_tracker(name)
    else:
        assert try_tracker(name), "vacuous: it was given up"
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(autouse=True)
def _forget():
    """Make each test try its trackers anew."""
    try_tracker.cache_clear()
    yield
    try_tracker.cache_clear()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """``package(text)`` has the trial find a package with this text."""

    monkeypatch.setattr(tracker_trial, "SECONDS", 500)

    def make(text, name="wandb"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(text)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))

    return make


def test_a_tracker_that_lacks_a_function_is_refused_with_its_version_and_the_cause(package):
    package("__version__ = '9.9'\nrun = None\ndef init(**_): raise TypeError('init has no project')\n")
    with pytest.raises(
        RecipeError, match=r"report_to=wandb: .* does not work with transformers .*: \S*Error: .+ Choose"
    ):
        try_tracker("wandb")


def test_a_tracker_finds_the_output_folder_that_a_trainer_makes(package):
    package(
        "import os\nclass EmissionsTracker:\n    def __init__(self, output_dir): assert os.path.isdir(output_dir)\n"
        "    def start(self): pass\n    def stop(self): pass\n",
        "codecarbon",
    )
    assert try_tracker("codecarbon")


def test_a_trial_that_hangs_is_given_up_with_a_word(monkeypatch, caplog):
    monkeypatch.setattr(tracker_trial, "SECONDS", 0.01)
    assert not try_tracker("wandb")
    assert "report_to=wandb: its trial took more than" in caplog.text


def test_a_trial_does_not_wait_for_the_ranks_of_a_launched_process(monkeypatch):
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.setenv(variable, "2")
    environment = tracker_trial._environment("wandb")
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "ACCELERATE_USE_DEEPSPEED"} & environment.keys()
    assert environment["PATH"] == os.environ["PATH"], "vacuous: nothing is kept"


def test_a_trial_touches_neither_the_run_nor_the_folder_that_the_environment_names(package, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "mine"))
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    monkeypatch.setenv("MLFLOW_RUN_ID", "other")
    package(
        "__version__ = '9.9'\nrun = None\nimport os\n"
        "raise ValueError(*(key for key in ('WANDB_MODE', 'WANDB_DIR', 'WANDB_RUN_ID', 'MLFLOW_RUN_ID') "
        "if key in os.environ))\n"
    )
    with pytest.raises(RecipeError, match=r"ValueError: \('WANDB_MODE', 'MLFLOW_RUN_ID'\)"):
        try_tracker("wandb")


def test_phases_try_a_tracker_once(monkeypatch):
    from types import SimpleNamespace

    from qwenvl_ft.training import preflight

    monkeypatch.setattr(tracker_trial, "SECONDS", 0.01)
    started = []
    run = tracker_trial.subprocess.run
    monkeypatch.setattr(tracker_trial.subprocess, "run", lambda *a, **k: (started.append(a), run(*a, **k)))
    for _ in range(3):
        preflight._tracker_trials(None, SimpleNamespace(report_to=["wandb"], process_index=0))
    assert len(started) == 1


def test_preflight_tries_the_trackers_of_the_first_process_only(monkeypatch):
    from types import SimpleNamespace

    from qwenvl_ft.training import preflight

    tried = []
    monkeypatch.setattr(preflight, "try_tracker", tried.append)
    for index in (0, 1):
        preflight._tracker_trials(None, SimpleNamespace(report_to=["wandb", "mlflow"], process_index=index))
    assert tried == ["wandb", "mlflow"]
    assert preflight._tracker_trials in preflight.CHECKS
