"""``qwenvl-ft`` finds its commands, prints recipes with origins, and reports errors in one line."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import qwenvl_ft
from qwenvl_ft.cli.main import COMMANDS, main
from qwenvl_ft.recipe import reference
from qwenvl_ft.recipe.load import load_recipe
from qwenvl_ft.recipe.schema import SECTIONS

ROOT = Path(__file__).resolve().parents[2]


def test_help_lists_every_command_and_each_command_has_help(capsys):
    assert main([]) == 0
    output = capsys.readouterr().out
    assert all(f"  {name} " in output for name in COMMANDS)
    for name in COMMANDS:
        assert main([name, "--help"]) == 0
        assert "usage" in capsys.readouterr().out.lower()
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"qwenvl-ft {qwenvl_ft.__version__}\n"


def test_help_imports_nothing_heavy():
    code = "import sys; from qwenvl_ft.cli.main import main; main(['--help']); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = done.stdout.splitlines()[-1]
    assert "'qwenvl_ft.cli.main'" in loaded
    assert not any(f"'{name}'" in loaded for name in ("torch", "transformers", "omegaconf", "typer"))


def test_an_unknown_command_and_a_missing_option_are_errors_without_a_traceback(capsys):
    assert main(["trian"]) == 2
    assert capsys.readouterr().err == (
        f"error: unknown command 'trian'. Did you mean 'train'? Known: {', '.join(sorted(COMMANDS))}.\n"
    )
    assert main(["infer"]) == 2
    said = capsys.readouterr().err
    assert "Missing option '--model'" in said
    assert "Traceback" not in said


def test_a_recipe_is_printed_aligned_with_the_file_of_each_value(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(["recipe", "lora_4b", "tuner.lora_rank=4", "--lora_alpha", "8", "--bf16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line for line in lines}
    assert rows["tuner.lora_rank"].split() == ["tuner.lora_rank", "4", "override"]
    assert rows["tuner.lora_alpha"].split() == ["tuner.lora_alpha", "8", "override"]
    assert rows["training.bf16"].split() == ["training.bf16", "true", "override"]
    assert rows["template.max_length"].split() == ["template.max_length", "4096", "recipes/lora_4b.yaml"]
    assert rows["tuner.lora_dropout"].split() == ["tuner.lora_dropout", "0.05", "recipes/base.yaml"]
    assert rows["tuner.use_dora"].split() == ["tuner.use_dora", "false", "default"]
    assert rows["data.train"].split() == ["data.train", '""', "recipes/base.yaml"]
    origins = [line.rindex(line.split()[-1]) for line in lines]
    assert len(set(origins)) == 1, "the last column is not aligned"
    assert len(rows) == len(lines)


def test_a_plain_recipe_is_a_recipe(capsys, tmp_path):
    assert main(["recipe", "sft_8b", "data.train=a.jsonl", "--plain"]) == 0
    path = tmp_path / "again.yaml"
    path.write_text(capsys.readouterr().out)
    assert load_recipe(path) == load_recipe("sft_8b", ["data.train=a.jsonl"])


@pytest.mark.parametrize("section", SECTIONS)
def test_every_field_has_a_help_text(section):
    kind = SECTIONS[section]
    texts = reference.helps(kind)
    for name in kind.__dataclass_fields__:
        assert texts[name].endswith("."), f"{section}.{name}"


def test_the_reference_is_current():
    """The last section depends on the installed transformers and is compared only for the version that it names."""
    written, built = (ROOT / "docs" / "reference.md").read_text(), reference.reference()
    marker = "\n## Fields of TrainingArguments\n"
    assert written.split(marker)[0] == built.split(marker)[0], "run: python -m qwenvl_ft.recipe.reference"
    if f"transformers {version('transformers')}," in written:
        assert written == built
