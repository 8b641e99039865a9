"""Every command of the guide is one, and what it shows in Python runs."""

import json
import re
import shlex
from pathlib import Path

import pytest

from qwenvl_ft.flare import convert, predict, score, validate
from qwenvl_ft.flare.catalog import FLARE_DATASETS, register_converted, registry_name, select
from qwenvl_ft.look.selection import target_recipe
from qwenvl_ft.recipe.argv import recipe_from_argv

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs/flare25.md").read_text()
README = (ROOT / "examples/flare25/README.md").read_text()
PARSERS = {
    "qwenvl-ft convert flare": convert,
    "qwenvl-ft convert flare-validate": validate,
    "python -m qwenvl_ft.flare.predict": predict,
    "python -m qwenvl_ft.flare.score": score,
    "python examples/flare25/convert_flare_to_qwen3vl.py": convert,
    "python examples/flare25/validate_conversion.py": validate,
}
COMMANDS = [
    line.split("   ")[0].split("  #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", GUIDE + README, flags=re.DOTALL)
    for line in block.splitlines()
]
OTHERS = ("make", "uv", "python -c", "tail", "tensorboard", "nvidia-smi", "qwenvl-ft monitor")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_guide_is_understood(command):
    known = max((name for name in PARSERS if re.match(rf"{name}(\s|$)", command)), key=len, default=None)
    words = shlex.split(command)
    if known is not None:
        PARSERS[known].parser("x").parse_args(words[len(known.split()) :])
        return
    script = next((word for word in words if word.endswith(".sh")), None)
    if script is not None:
        assert (ROOT / script).is_file()
        variables = words[: words.index(script)]
        read = (ROOT / script).read_text() + (ROOT / "recipes/launch.sh").read_text()  # which the scripts call
        assert all(f"${{{word.split('=')[0]}" in read for word in variables)
        recipe_from_argv(["recipe=flare25", *words[words.index(script) + 1 :]])
    elif words[1:2] in (["check"], ["show"]):
        own = {"--json": 1, "--units": 2, "--out": 2}
        rest = words[2:]
        for option in own:
            if option in rest:
                place = rest.index(option)
                del rest[place : place + own[option]]
        assert target_recipe(rest).training.arguments["run_name"] == "qwen3vl_flare25_starter"
    elif words[0] == "accelerate":
        recipe_from_argv(words[words.index("qwenvl_ft.train") + 1 :])
    else:
        assert command.startswith(OTHERS)


def test_the_guide_contains_commands():
    assert len(COMMANDS) > 20
    for name in PARSERS:
        assert any(command.startswith(name) for command in COMMANDS), name


def test_the_python_of_the_guide_runs(full_tree, monkeypatch, capsys):
    assert convert.main(["--input_dir", str(full_tree.base), "--all"]) == 0
    monkeypatch.chdir(full_tree.base.parent)
    capsys.readouterr()
    for code in re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL):
        exec(compile(code, "flare25.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:19]] == [registry_name(name) for name in FLARE_DATASETS]
    assert lines[-2:] == [
        ",".join(map(registry_name, select(category="Xray"))),
        "flare_busi_det,flare_bus_uclm_det,flare_iugc",
    ]


def test_the_record_of_the_guide_is_what_the_converter_writes(full_tree):
    assert convert.main(["--input_dir", str(full_tree.base), "--datasets", "neojaundice", "--splits", "train"]) == 0
    (record,) = json.loads((full_tree.base.parent / "converted_data/neojaundice_train.json").read_text())
    shown = json.loads(re.search(r"```json\n(.*?)```", GUIDE, flags=re.DOTALL)[1])
    assert list(shown) == list(record)
    fixed = ("id", "dataset", "task_type", "modality")
    assert {key: shown[key] for key in fixed} == {key: record[key] for key in fixed}


def test_the_guide_has_its_sections():
    headings = re.findall(r"^## (.*)$", GUIDE, flags=re.MULTILINE)
    assert headings == [
        "Overview",
        "Prerequisites",
        "Data conversion",
        "Training pipeline",
        "Testing and validation",
        "Monitoring training",
        "Troubleshooting",
        "Scaling to more data sets",
    ]


def test_the_guides_table_of_the_starter_set_is_the_catalogs():
    rows = re.findall(r"^\| (\S+) \| `(flare_\w+)` ", GUIDE, flags=re.MULTILINE)
    assert rows == [(name, registry_name(name)) for name in select(starter=True)]


def test_the_guides_links_work():
    for text, folder in ((GUIDE, ROOT / "docs"), (README, ROOT / "examples/flare25")):
        links = re.findall(r"\]\(([^)#:]+)\)", text)
        assert links
        assert all((folder / link).exists() for link in links)


def test_registration_is_from_anywhere(full_tree):
    assert convert.main(["--input_dir", str(full_tree.base)]) == 0
    assert len(register_converted(full_tree.base.parent / "converted_data")) == 10
