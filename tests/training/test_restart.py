"""Which runs were started again, and what training.resume_from_checkpoint means to them."""

import pytest

from qwenvl_ft.checkpoint.restart import COUNTERS, restarts, resume_setting


@pytest.fixture(autouse=True)
def first_start(monkeypatch):
    for name in COUNTERS:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("setting", [None, False, "false", "None", "", True, "auto", "out/checkpoint-2"])
def test_a_first_start_means_what_it_says(setting, monkeypatch):
    assert resume_setting(setting) == setting
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's first start
    assert resume_setting(setting) == setting


@pytest.mark.parametrize("variable", COUNTERS)
@pytest.mark.parametrize(
    ("setting", "meant"),
    [
        (None, "auto"),
        (False, "auto"),
        ("False", "auto"),
        ("", "auto"),
        (True, True),
        ("o/checkpoint-2", "o/checkpoint-2"),
    ],
)
def test_a_fresh_start_that_was_started_again_resumes(variable, setting, meant, monkeypatch):
    monkeypatch.setenv(variable, "2")
    assert restarts() == {COUNTERS[variable]: 2}
    assert resume_setting(setting) == meant
