"""A misspelt key in code is found by mypy, because recipes and their sections are typed everywhere."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy")

ROOT = Path(__file__).resolve().parents[2]
CODE = """
from qwenvl_ft.recipe.argv import recipe_from_argv
from qwenvl_ft.recipe.load import load_recipe
from qwenvl_ft.recipe.schema import Recipe, TrainingConfig, TunerConfig

def of_a_parameter(recipe: Recipe) -> bool:
    return recipe.training.paking

def of_a_section(training: TrainingConfig, tuner: TunerConfig) -> object:
    return training.learning_rate, tuner.lora_rank, training.learning_rte

def of_a_loaded_recipe() -> int:
    return load_recipe("lora_4b").tuner.lora_rnak

def of_a_phase() -> list[int]:
    return [run.template.max_lenght for run in recipe_from_argv([]).by_phase().values()]

def of_no_type(recipe: Recipe) -> str:
    return recipe.evaluation.batch_size
"""
EXPECTED = [
    (7, '"TrainingConfig" has no attribute "paking"'),
    (10, '"TrainingConfig" has no attribute "learning_rte"'),
    (13, '"TunerConfig" has no attribute "lora_rnak"'),
    (16, '"TemplateConfig" has no attribute "max_lenght"'),
    (19, 'Incompatible return value type (got "int", expected "str")'),
]


@pytest.mark.soak
@pytest.mark.slow
def test_mypy_finds_every_misspelt_key(tmp_path):
    file = tmp_path / "planted.py"
    file.write_text(CODE)
    options = ["--ignore-missing-imports", "--follow-imports=silent", "--cache-dir", str(tmp_path / "cache")]
    done = subprocess.run([sys.executable, "-m", "mypy", *options, str(file)], capture_output=True, text=True, cwd=ROOT)
    found = re.findall(r"planted\.py:(\d+): error: (.*?)(?:;.*)?  \[", done.stdout)
    assert [(int(line), message) for line, message in found] == EXPECTED, done.stdout + done.stderr


def test_every_parameter_that_is_a_recipe_says_so():
    types = {}
    for path in sorted((ROOT / "qwenvl_ft").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                for parameter in [*node.args.args, *node.args.kwonlyargs]:
                    if parameter.arg == "recipe":
                        types[f"{path.name}:{node.name}"] = ast.unparse(parameter.annotation or ast.Constant(None))
    wrong = {where: kind for where, kind in types.items() if kind not in ("Recipe", "'Recipe'", "Recipe | None")}
    assert len(types) > 40
    assert not wrong
