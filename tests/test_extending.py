"""Extensions take exactly the steps of the table in docs/architecture.md, tried on a copy of the package.

Each test runs a command with the package as it is, where it must fail with one clear line, and with the copy that has
the new file and table entry, where it must work.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from cases import picture
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
STEPS = re.compile(
    r"^\| (?P<what>[^|]+) \| (?:one file in `(?P<folder>[^`]+)`, )?one entry of `(?P<table>\w+)` in `(?P<file>[^`]+)`"
)

READER = '''
"""Records with a picture and its caption."""


def matches(record):
    return {"picture", "caption"} <= record.keys()


def rewrite(record, source, media_root):
    turns = [{"role": "user", "content": "<image>Describe it."}, {"role": "assistant", "content": record["caption"]}]
    return {"messages": turns, "images": [record["picture"]], "id": record.get("id")}
'''
METHOD = '''
"""Trains the normalisation layers only."""


def build_norms(model, tuner):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name)
    return model
'''
COMMAND = '''
"""Greets."""

import typer


def greet(name: str) -> None:
    typer.echo(f"Hello, {name}!")
'''
EXTENSIONS = {
    "a record format": (
        "captions.py",
        READER,
        '"captions": Reader(captions.matches, captions.rewrite, (("picture", "caption"),)),',
        "from qwenvl_ft.data.readers import captions",
    ),
    "another tool's flag": (None, "", '"adapter_rank": same("tuner.lora_rank"),', ""),
    "a training method": (
        "norms.py",
        METHOD,
        '"norms": Method(builder="qwenvl_ft.tuning.methods.norms:build_norms", adapter=False),',
        "",
    ),
    "a metric": (
        None,
        "",
        '"starts_with": per_answer("starts_with", lambda answer, expected: float(answer.startswith(expected))),',
        "",
    ),
    "a command": ("greet.py", COMMAND, '"greet": "greet somebody",', ""),
}
"""Row of the table -> name and text of the new file, the entry, and the import that the entry needs."""


def rows():
    """The rows of the table that name one entry of a table: what to add -> folder, table and file."""
    lines = (ROOT / "docs/architecture.md").read_text(encoding="utf-8").splitlines()
    return {found["what"]: found.groupdict() for line in lines if (found := STEPS.match(line))}


def add(package, row, name, text, entry, imports):
    """Do what a row of the table says."""
    if row["folder"]:
        (package / row["folder"] / name).write_text(text, encoding="utf-8")
    file = package / row["file"]
    lines = file.read_text(encoding="utf-8").splitlines()
    (start,) = [number for number, line in enumerate(lines) if re.match(rf"{row['table']}\b.*=", line)]
    opening, closing = lines[start].rstrip().partition("{")[::2]
    lines[start : start + 1] = [imports, f"{opening}{{", f"    {entry}", f"    {closing}"]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """``run(*words, extended=bool)`` runs ``qwenvl-ft`` of the plain package, or of the copy with all extensions."""
    copy = tmp_path_factory.mktemp("extended")
    shutil.copytree(ROOT / "qwenvl_ft", copy / "qwenvl_ft", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "recipes", copy / "recipes")
    for what, extension in EXTENSIONS.items():
        add(copy / "qwenvl_ft", rows()[what], *extension)

    def call(*words, extended, program=("-m", "qwenvl_ft.cli.main")):
        root = copy if extended else ROOT
        command = [sys.executable, *program, *map(str, words)]
        environment = os.environ | {"PYTHONPATH": str(root)}
        done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment, check=False)
        return SimpleNamespace(code=done.returncode, output=done.stdout, error=done.stderr)

    return call


def refused(done, message):
    """True if a command ended with one line that has this message."""
    return done.code == 2 and message in done.error and done.error.count("\n") == 1


def test_the_table_has_a_row_for_each_extension():
    assert EXTENSIONS.keys() <= rows().keys()
    for what in EXTENSIONS:
        assert (EXTENSIONS[what][0] is None) == (rows()[what]["folder"] is None), what


def test_a_metric(run):
    words = [
        "recipe",
        "base",
        "evaluation.metric=starts_with",
        "evaluation.run_after_training=true",
        "data.val=v.jsonl",
    ]
    plain = run(*words, extended=False)
    assert refused(plain, "evaluation.metric: 'starts_with' is not one of the choices. Known: classification, "), (
        plain.error
    )
    assert re.search(r"^evaluation\.metric +starts_with +override$", run(*words, extended=True).output, re.MULTILINE)
    code = (
        "from qwenvl_ft.evaluation.metrics import metric_of; metric = metric_of('starts_with'); "
        "print(metric.score(['A', 'cat', 'A'], ['A cat.'] * 3)['starts_with'])"
    )
    assert float(run(extended=True, program=("-c", code)).output) == pytest.approx(2 / 3)


@pytest.mark.soak
def test_a_flag_of_another_tool(run):
    words = ["recipe", "base", "--adapter_rank", "5"]
    plain = run(*words, extended=False)
    assert refused(plain, "unknown flag --adapter_rank."), plain.error
    assert re.search(r"^tuner\.lora_rank +5 +override$", run(*words, extended=True).output, re.MULTILINE)


def test_a_command(run):
    plain = run("greet", "Ada", extended=False)
    assert refused(plain, "unknown command 'greet'."), plain.error
    assert run("greet", "Ada", extended=True).output == "Hello, Ada!\n"
    assert re.search(r"^ +greet +greet somebody$", run("--help", extended=True).output, re.MULTILINE)


@pytest.mark.soak
@pytest.mark.slow
def test_a_record_format(run, tmp_path):
    picture(64, 64).save(tmp_path / "cat.png")
    file = tmp_path / "captions.jsonl"
    file.write_text(json.dumps({"id": "1", "picture": "cat.png", "caption": "A cat."}) + "\n")
    plain = run("check", file, extended=False)
    assert plain.code == 1
    assert "no format has the keys caption, id, picture." in " ".join(plain.output.split()), plain.output
    assert run("check", file, extended=True).code == 0


@pytest.mark.soak
@pytest.mark.slow
def test_a_training_method(run, tiny_dir, tmp_path):
    """It is chosen by the recipe, trains exactly its own weights, and its checkpoint is saved."""
    file = tmp_path / "data.jsonl"
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cat."}]
    file.write_text(json.dumps({"conversations": turns}) + "\n")
    words = ["train", f"model.model={tiny_dir}", f"data.train={file}", "tuner.train_type=norms"]
    words += [
        "training.max_steps=1",
        "training.learning_rate=0.1",
        "training.use_cpu=true",
        "model.torch_dtype=float32",
    ]
    words += [f"training.output_dir={tmp_path / 'run'}", "training.warmup_steps=0"]
    plain = run(*words, extended=False)
    assert refused(plain, "tuner.train_type: 'norms' is not one of the choices."), plain.error
    done = run(*words, extended=True)
    assert done.code == 0, done.error
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_dir, tmp_path / "run"))
    moved = {name for name, value in after.items() if not value.equal(before[name])}
    assert moved
    assert all("norm" in name for name in moved)
