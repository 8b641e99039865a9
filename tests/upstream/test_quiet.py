"""upstream/quiet.py: bars and notices of other libraries are hidden inside the context, and as before outside."""

import importlib.util
import logging
import warnings
from pathlib import Path

import pytest
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from run_cases import run_settings, write_records
from transformers.utils import logging as transformers_logging

from qwenvl_ft.cli.main import main as command
from qwenvl_ft.errors import DataError
from qwenvl_ft.look import selection
from qwenvl_ft.train import main
from qwenvl_ft.upstream.quiet import NOTICES, WARNINGS, quiet, without_notices


@pytest.fixture(autouse=True)
def bars():
    enabled, downloads = transformers_logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    transformers_logging.enable_progress_bar()
    yield
    if not enabled:
        transformers_logging.disable_progress_bar()
    (enable_progress_bars if downloads else disable_progress_bars)()


def shown(capfd):
    """Return what a bar of transformers writes."""
    capfd.readouterr()
    list(transformers_logging.tqdm(range(3), desc="Loading weights"))
    return capfd.readouterr().err


def test_bars_of_transformers_are_hidden_and_those_of_downloads_stay(capfd):
    assert "Loading weights" in shown(capfd), "vacuous"
    with quiet():
        assert shown(capfd) == ""
        assert not are_progress_bars_disabled()
    assert "Loading weights" in shown(capfd)


def test_bars_that_the_user_has_switched_off_stay_off(capfd):
    transformers_logging.disable_progress_bar()
    with quiet():
        assert are_progress_bars_disabled()
    assert shown(capfd) == ""
    assert are_progress_bars_disabled()


@pytest.fixture
def heard():
    """Return the list of what a logger writes from now on, whatever other tests have made of its level and parents."""
    handlers = []

    def listen(name):
        logger, seen = logging.getLogger(name), []
        handler = logging.Handler()
        handler.emit = lambda record: seen.append(record.getMessage())
        handlers.append((logger, handler, logger.level, logger.disabled))
        logger.addHandler(handler)
        logger.setLevel(logging.WARNING)
        logger.disabled = False
        return seen

    yield listen
    for logger, handler, level, disabled in handlers:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.disabled = disabled


@pytest.mark.parametrize("name", NOTICES)
def test_notices_are_dropped_and_other_messages_are_not(name, heard):
    seen, logger = heard(name), logging.getLogger(name)
    for inside in (True, False):
        with quiet() if inside else pytest.MonkeyPatch.context():
            for beginning in NOTICES[name]:
                logger.warning("%s and so on", beginning)
            logger.warning("the disk is full")
        assert len(seen) == (1 if inside else 2 + len(NOTICES[name]))


@pytest.mark.parametrize("inside", [True, False])
def test_warnings_for_the_authors_of_libraries_are_dropped(inside):
    with (
        warnings.catch_warnings(record=True) as seen,
        without_notices() if inside else pytest.MonkeyPatch.context(),
    ):
        for text in (*WARNINGS, "the disk is full"):
            warnings.warn(f"{text} and so on", FutureWarning, stacklevel=1)
    assert len(seen) == (1 if inside else 1 + len(WARNINGS))


@pytest.mark.parametrize("name", NOTICES)
def test_the_libraries_still_write_these_messages(name):
    """If this fails, a library has changed its words: correct or remove the entry."""
    files = {"DeepSpeed": ("deepspeed", "accelerator/real_accelerator.py")}
    own, _, module = name.partition(".")
    package, file = files.get(name, (own, f"{module.replace('.', '/')}.py"))
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"{package} is not installed")
    text = (Path(spec.origin).parent / file).read_text()
    assert [beginning for beginning in NOTICES[name] if beginning not in text] == []


@pytest.mark.parametrize("name", NOTICES)
def test_every_command_drops_these_messages(name, monkeypatch, heard):
    seen = heard(name)

    def noisy(words):
        for beginning in ("The disk is full", *NOTICES[name]):
            logging.getLogger(name).warning("%s and so on", beginning)
        raise DataError("enough")

    monkeypatch.setattr(selection, "target_recipe", noisy)
    assert command(["check", "data.jsonl"]) == 2
    assert seen == ["The disk is full and so on"]


def test_a_tiny_model_is_written_without_a_bar(tmp_path, capfd):
    assert command(["tiny", str(tmp_path / "tiny")]) == 0
    assert capfd.readouterr() == (f"{tmp_path / 'tiny'}\n", "")


def test_a_run_prints_only_its_own_lines_while_it_loads_and_saves(tiny_dir, tmp_path, capfd):
    words = run_settings(tiny_dir, write_records(tmp_path), tmp_path / "out", "training.save_strategy=steps")
    assert main([*words, "training.max_steps=2", "training.save_steps=1"]) == 0
    out, err = capfd.readouterr()
    assert "saved " in out
    for text in ("Loading weights", "Writing model shards", "new PAD/BOS/EOS", "mtime may not", "Warning:"):
        assert text not in out + err
