"""The record of `make upstream`: tested versions, the message about others, and the page."""

import importlib.util
import json
from pathlib import Path

import pytest

from qwenvl_ft.cli.main import main
from qwenvl_ft.recipe.load import load_recipe
from qwenvl_ft.train import train
from qwenvl_ft.upstream import proven

NOW = {"torch": "2.14.0", "transformers": "5.19.0", "peft": "0.19.1"}


def run(versions, **more):
    kept = {"python": "3.12.1", "versions": versions, "date": "2026-11-27", "passed": 9, "failed": 0, "skipped": 1}
    return kept | {"seconds": 60, "failures": [], "fallbacks": [], "fault": ""} | more


@pytest.fixture
def kept(monkeypatch):
    """Set the recorded runs and the installed versions."""
    record: dict = {}
    monkeypatch.setattr(proven, "runs", lambda: record)
    monkeypatch.setattr(proven, "here", lambda: NOW)
    return record


def page_module():
    path = Path(__file__).with_name("compatibility_page.py")
    spec = importlib.util.spec_from_file_location("compatibility_page", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_versions_that_were_run_are_not_spoken_of(kept):
    kept["one"] = run(NOW)
    assert proven.unproven_line() == ""


def test_a_version_that_was_not_run_is_named_with_its_neighbours(kept):
    kept["older"] = run(NOW | {"transformers": "5.9.0"})
    kept["newer"] = run(NOW | {"transformers": "5.21.0"})
    kept["newest"] = run(NOW | {"transformers": "5.24.0"})
    line = proven.unproven_line()
    assert "transformers 5.19.0 (nearest: 5.9.0, 5.21.0)" in line
    assert "torch" not in line
    assert "\n" not in line


@pytest.mark.parametrize("bad", [{"failed": 1}, {"passed": 0}, {"fault": "no wheel"}])
def test_a_run_that_failed_proves_nothing(kept, bad):
    kept["one"] = run(NOW, **bad)
    assert set(proven.unproven()) == set(NOW)


def test_a_build_of_a_version_is_that_version(monkeypatch):
    monkeypatch.setattr(proven, "version", lambda name: "2.14.0+cu130")
    assert set(proven.here().values()) == {"2.14.0"}


def test_the_kept_record_is_what_the_page_shows():
    """Vacuous only if `make upstream` has never run."""
    record = json.loads(proven.RECORD.read_text())
    page = (Path(__file__).parents[2] / "docs/compatibility.md").read_text()
    for name, entry in record.items():
        row = next(line for line in page.splitlines() if line.startswith(f"| {name}:"))
        assert all(version in row for version in (*entry["versions"].values(), entry["date"])), row


def test_the_page_says_what_failed_and_what_is_slower(tmp_path):
    record = {
        "good": run(NOW, fallbacks=["compiled layers: torch 2.8.0 has no x; the plain ones"]),
        "bad": run(NOW, failed=1, failures=["test_media::test_order"]),
        "never": run({}, passed=0, fault="no wheel | at all"),
    }
    reasons = dict.fromkeys(record, "why")
    page_module().write_page(tmp_path / "page.md", record, reasons)
    page = (tmp_path / "page.md").read_text()
    assert "- good: compiled layers: torch 2.8.0 has no x; the plain ones" in page
    assert "- bad: `test_media::test_order` fails" in page
    assert "**1 failed**, 9 passed" in page
    assert "| not run: no wheel \\| at all |" in page
    widths = {line.replace("\\|", "").count("|") for line in page.splitlines() if line.startswith("|")}
    assert len(widths) == 1, "a row has another number of cells"


def test_doctor_says_which_of_the_installed_versions_were_run(kept, monkeypatch, capsys):
    monkeypatch.setattr(proven, "PACKAGES", tuple(NOW))
    kept["one"] = run(NOW | {"peft": "0.21.2"})
    main(["doctor"])
    said = capsys.readouterr().out
    assert "  transformers 5.19.0: tested\n" in said
    assert "  peft 0.19.1: not tested; tested versions: 0.21.2\n" in said
    assert "all of them together, with this Python: not tested" in said


def test_a_training_run_says_so_in_one_line(kept, tiny_dir, write_jsonl, tmp_path, capsys):
    kept["one"] = run(NOW | {"peft": "0.21.2"})
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
    data = write_jsonl([{"conversations": turns}])
    settings = [f"model.model={tiny_dir}", f"data.train={data}", f"training.output_dir={tmp_path / 'run'}"]
    settings += ["training.max_steps=1", "training.report_to=none", "training.dataloader_num_workers=0"]
    train(load_recipe(None, [*settings, "template.max_length=160"]))
    said = [line for line in capsys.readouterr().out.splitlines() if "not tested" in line]
    assert len(said) == 1
    assert said[0].startswith("not tested: peft 0.19.1 (nearest: 0.21.2). `qwenvl-ft prove --model DIR`")
