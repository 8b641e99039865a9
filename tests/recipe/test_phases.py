"""Phases of a recipe: each is the recipe around it with its own keys, and its errors name it."""

import json

import pytest
import yaml

from qwenvl_ft.cli.main import main
from qwenvl_ft.errors import RecipeError
from qwenvl_ft.recipe.argv import recipe_from_argv
from qwenvl_ft.recipe.load import load_recipe

TEXT = """
    model: {model: tiny}
    data: {train: all.jsonl}
    tuner: {train_type: lora, lora_rank: 4, freeze_llm: true, freeze_aligner: false}
    training: {output_dir: out, learning_rate: 1.0e-4, logging_dir: tb}
    phases:
    - name: simple
      data: {train: simple.jsonl}
      training: {num_train_epochs: 30}
    - name: medium
      custom: {train: medium.jsonl, val: v.jsonl}
      training: {gradient_checkpointing: false, learning_rate: 2.0e-4}
      tuner: {freeze_llm: false}
    - tuner: {train_type: full, freeze_llm: false}
      global_max_length: 2048
"""


@pytest.fixture
def path(write):
    return write("curriculum.yaml", TEXT)


def test_a_phase_is_the_recipe_with_its_own_keys(path, write):
    """Compared with a recipe that extends the base by the same keys."""
    recipe = load_recipe(path)
    base = yaml.safe_load(path.read_text())
    phases = base.pop("phases")
    assert [run.phase for run in recipe.phases] == ["1/3 simple", "2/3 medium", "3/3 3"]
    for run, keys, folder in zip(recipe.phases, phases, ("1_simple", "2_medium", "3"), strict=True):
        write("base.yaml", yaml.safe_dump(base))
        keys.pop("name", None)
        alone = load_recipe(write("alone.yaml", yaml.safe_dump({"extends": "base.yaml"} | keys)))
        assert run.training.arguments.pop("output_dir") == f"out/phase_{folder}"
        assert alone.training.arguments.pop("output_dir") == "out"
        assert (run.training.logging_dir, alone.training.logging_dir) == (f"tb/phase_{folder}", "tb")
        run.training.logging_dir, run.phase = "tb", ""
        assert run == alone
    assert recipe.phases[2].tuner.lora_rank != 4, "a phase of another type keeps keys that it does not read"
    assert recipe.data.train == "all.jsonl"


def test_a_saved_recipe_has_the_same_phases(path, write):
    recipe = load_recipe(path, ["training.seed=7", "phases.medium.data.train=other.jsonl"])
    saved = write("saved.yaml", recipe.to_yaml())
    assert load_recipe(saved) == recipe
    assert load_recipe(saved, ["phases.medium.data.train=medium.jsonl"]) != recipe
    phases = yaml.safe_load(saved.read_text())["phases"]
    assert phases[0] == {"name": "simple", "data": {"train": "simple.jsonl"}, "training": {"num_train_epochs": 30}}
    assert phases[1]["training"]["eval_strategy"] == "steps", "what follows from data.val is lost"


def test_the_command_line_overrides_all_phases_or_one(path):
    recipe = recipe_from_argv(
        [
            f"recipe={path}",
            "training.learning_rate=1e-6",
            "phases.medium.training.learning_rate=3e-6",
            "--max_length",
            "99",
        ]
    )
    assert [run.training.learning_rate for run in recipe.phases] == [1e-6, 3e-6, 1e-6]
    assert [run.template.max_length for run in recipe.phases[:2]] == [99, 99]
    assert load_recipe(path).phases[1].training.learning_rate == 2e-4


def test_a_recipe_that_extends_keeps_replaces_or_drops_the_phases(path, write):
    inherited = load_recipe(write("mine.yaml", "extends: curriculum.yaml\ntemplate: {max_length: 512}\n"))
    assert [run.template.max_length for run in inherited.phases] == [512, 512, 2048]
    one = load_recipe(write("one.yaml", "extends: curriculum.yaml\nphases: [{name: only}]\n"))
    assert [run.phase for run in one.phases] == ["1/1 only"]
    assert not load_recipe(write("none.yaml", "extends: curriculum.yaml\nphases: null\n")).phases


WRONG = {
    "an unknown key": (
        "[{name: a}, {name: b, tuner: {lora_rnk: 8}}]",
        r"phase 2 \(b\): tuner.lora_rnk: unknown key. Did",
    ),
    "a wrong value": ("[{name: b, tuner: {lora_rank: x}}]", r"phase 1 \(b\): tuner.lora_rank: 'x' is not a whole"),
    "an unknown section": ("[{tunner: {}}]", "phase 1: unknown section 'tunner'. Did you mean 'tuner'"),
    "a contradiction": ("[{name: b, training: {save_strategy: best}}]", "phase 1/1 b: .*save_strategy=best"),
    "no list": ("{name: a}", "phases is .*but it is a list. Example: phases"),
    "no mapping": ("[simple]", "phase 1 is 'simple', not a mapping"),
    "a name with a slash": ("[{name: a/b}]", r"phase 1 \(a/b\): a name begins with a letter"),
    "another's number": ("[{name: 2}, {}]", "phase 1 .2.: a name begins with a letter"),
    "a name twice": ("[{name: a}, {name: a}]", "phase 2 .a.: another phase has that name"),
    "a folder": ("[{name: a, training: {output_dir: b}}]", "training.output_dir applies to all phases"),
    "a model": ("[{name: a, model: {model: b}}]", "model.model applies to the first phase only"),
    "phases in a phase": ("[{name: a, phases: []}]", "phases belongs at the top of a recipe"),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_error_in_a_phase_is_one_line_that_names_it(write, case):
    phases, match = WRONG[case]
    with pytest.raises(RecipeError, match=match):
        load_recipe(write("wrong.yaml", f"model: {{model: tiny}}\nphases: {phases}\n"))


@pytest.mark.parametrize(
    ("override", "match"),
    [
        ("phases.medum.training.seed=1", "unknown phase 'medum'. Did you mean 'medium'"),
        ("phases.medium=1", "is not phases.NAME.section.key=value"),
        ("phases=1", "is not phases.NAME.section.key=value"),
        ("phases.medium.training.sed=1", "phases.medium: training.sed: unknown key. Did you mean 'seed'"),
        ("phases.medium.training.output_dir=a", "training.output_dir applies to all phases"),
    ],
)
def test_a_wrong_override_of_a_phase_is_one_line(path, override, match):
    with pytest.raises(RecipeError, match=match):
        load_recipe(path, [override])


def test_the_recipe_command_prints_the_changes_of_each_phase(path, capsys, write):
    assert main(["recipe", str(path), "phases.medium.training.seed=3"]) == 0
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert rows["data.train"] == ["all.jsonl", str(path)]
    assert rows["phases.simple.data.train"] == ["simple.jsonl", f"{path}:", "phase", "1", "(simple)"]
    assert rows["phases.medium.training.seed"] == ["3", "override:", "phases.medium"]
    assert "phases.simple.tuner.freeze_llm" not in rows
    assert main(["recipe", str(path), "--plain"]) == 0
    assert load_recipe(write("plain.yaml", capsys.readouterr().out)) == load_recipe(path)


def test_check_show_and_stats_cover_each_phase(tiny_dir, write, tmp_path, capsys):
    record = {"conversations": [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}]}
    for name, number in (("simple", 2), ("all", 3)):
        lines = [json.dumps(record | {"id": f"{name} {k}"}) for k in range(number)]
        write(f"{name}.jsonl", "\n".join(lines) + "\n")
    broken = write("broken.jsonl", '{"conversations": ')
    data = f"data: {{train: {tmp_path}/all.jsonl}}\n"
    phases = f"phases: [{{name: simple, data: {{train: {tmp_path}/simple.jsonl}}}}, {{}}]\n"
    path = write("look.yaml", f"model: {{model: {tiny_dir}}}\n{data}{phases}")
    allow = ["--allow", "duplicate"]
    assert main(["check", str(path), "--json", *allow]) == 0
    reports = json.loads(capsys.readouterr().out)
    assert {name: report["records"] for name, report in reports.items()} == {"phase_1_simple": 2, "phase_2": 3}
    assert main(["check", str(path), *allow, f"phases.simple.data.train={broken}"]) == 1, (
        "a fault in a phase is not seen"
    )
    assert "phase_2\n" in capsys.readouterr().out
    assert main(["stats", str(path), "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"phase_1_simple", "phase_2"}
    assert main(["show", str(path), "--out", str(tmp_path / "page.html")]) == 0
    pages = [(tmp_path / f"page_{name}.html").read_text() for name in ("phase_1_simple", "phase_2")]
    assert "simple.jsonl" in pages[0]
    assert "simple.jsonl" not in pages[1]
