"""The README of data/ names every module, in the section of its folder."""

import re
from pathlib import Path

DATA = Path(__file__).resolve().parents[2] / "qwenvl_ft" / "data"


def named_modules(text):
    """Paths of the modules that a README names; a section's heading gives the folder."""
    found = set()
    for section in re.split(r"^## ", text, flags=re.M):
        heading = section.partition("\n")[0]
        folder = re.search(r"`(\w+/)`", heading)
        found |= {(folder[1] if folder else "") + name for name in re.findall(r"`(\w+\.py)`", section)}
    return found


def test_every_module_is_named_and_every_name_is_a_module():
    text = (DATA / "README.md").read_text(encoding="utf-8")
    modules = {path.relative_to(DATA).as_posix() for path in DATA.rglob("*.py") if path.name != "__init__.py"}
    named = {name for name in named_modules(text) if not name.endswith("__init__.py")}
    assert sorted(modules - named) == [], "not in qwenvl_ft/data/README.md"
    assert sorted(named - modules) == [], "in qwenvl_ft/data/README.md, but not in the folder"
    assert len(modules) > 30


def test_a_name_belongs_to_the_folder_of_its_section():
    text = "`top.py`\n## 1. `a/`: one\n`x.py`, `y.py`\n## 2. `b.py`: two\n"
    assert named_modules(text) == {"top.py", "a/x.py", "a/y.py", "b.py"}
