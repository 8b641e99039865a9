"""docs/performance.md: its commands exist, its table is what the command prints, its plots are there."""

import inspect
import re
from pathlib import Path

from qwenvl_ft.bench.lines import memory_text
from qwenvl_ft.bench.memory import Run, memory
from qwenvl_ft.cli.bench import COMMANDS
from qwenvl_ft.recipe.load import load_recipe

DOCS = Path(__file__).resolve().parents[2] / "docs"
TEXT = (DOCS / "performance.md").read_text(encoding="utf-8")


def test_every_command_exists_with_its_options():
    commands = re.findall(r"^ *qwenvl-ft bench (.+)", TEXT, re.M)
    assert len(commands) > 6
    for command in commands:
        words = command.split("#")[0].split("||")[0].split()
        name = "fit" if words[0] == "--fit" else words[0]
        known = {parameter.removeprefix("as_") for parameter in inspect.signature(COMMANDS[name]).parameters}
        options = {word[2:].replace("-", "_") for word in words[1:] if word.startswith("--")}
        assert options <= known, command


def test_the_memory_table_is_what_the_command_computes():
    line = memory_text([memory("2b", "lora", 4096)]).splitlines()[-1]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in TEXT.splitlines() if line.startswith("|")]
    assert cells in rows


def test_the_plots_exist():
    plots = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", TEXT)
    assert len(plots) == 2
    assert all((DOCS / plot).is_file() for plot in plots)


def test_a_recipe_states_the_memory_that_the_command_computes():
    stated = 0
    for path in sorted((DOCS.parent / "recipes").glob("*.yaml")):
        for gib, words in re.findall(r"(\d+) GiB \(qwenvl-ft bench memory (.+?)\)", path.read_text(encoding="utf-8")):
            size, *options = words.split()
            given = dict(zip(options[::2], options[1::2], strict=True))
            run = Run(given.pop("--engine", "none"), int(given.pop("--gpus", 1)))
            row_length = int(given.pop("--row-length"))
            recipe = load_recipe(path)
            assert not given, path
            assert row_length == recipe.template.max_length, path
            assert recipe.tuner.train_type == "full" or recipe.tuner.lora_rank == 16, path
            assert recipe.model.model.lower().endswith(size), path
            assert int(gib) == round(memory(size, recipe.tuner.train_type, row_length, run=run).total), path
            stated += 1
    assert stated >= 4, "vacuous: recipes state no memory"
