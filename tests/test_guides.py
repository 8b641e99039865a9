"""Settings, messages, commands and files named in the guides exist."""

import re
import shlex
from pathlib import Path

import pytest

from qwenvl_ft.cli.main import COMMANDS
from qwenvl_ft.recipe.argv import recipe_from_argv
from qwenvl_ft.recipe.keys import type_of
from qwenvl_ft.recipe.schema import SECTIONS
from qwenvl_ft.recipe.values import convert

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "recipes/README.md", *sorted((ROOT / "docs").glob("*.md"))]
GUIDES = [ROOT / "docs/guide.md", ROOT / "docs/troubleshooting.md"]
SETTING = re.compile(rf"\b((?:{'|'.join(SECTIONS)})\.[a-z_0-9]+)=([^\s`;,]+)")


def name(path):
    return path.name


def anchors(text):
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files_and_headings(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


@pytest.mark.parametrize("page", GUIDES, ids=name)
def test_settings_exist_and_accept_the_values_shown(page):
    found = SETTING.findall(page.read_text())
    assert found
    for key, value in found:
        assert type_of(key) is not None, key
        assert convert(value, type_of(key), key) is not None, (key, value)


def test_messages_in_troubleshooting_exist_in_the_package():
    text = (ROOT / "docs/troubleshooting.md").read_text()
    first = [line.split("|")[1] for line in text.splitlines() if line.startswith("| ")]
    keys = set(re.findall(r"`([^`]+)`", " ".join(first)))
    source = "".join(path.read_text() for path in (ROOT / "qwenvl_ft").rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # join string literals that span lines
    known = ("Too many open files", "No space left on device")  # messages of the operating system
    messages = {key for key in keys if " " in key and not SETTING.search(key) and key not in known}
    assert len(messages) >= 7
    for message in messages:
        for part in re.split(r" ?\.\.\. ?| N ", message):
            assert part in source, message


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_of_the_pages_exist(page):
    text = page.read_text()
    blocks = "\n".join(re.findall(r"```(?:bash|sh|shell)\n(.*?)```", text, flags=re.DOTALL))
    inline = "\n".join(re.findall(r"`(qwenvl-ft [^`]+)`", text))
    for command in re.findall(r"\bqwenvl-ft ([a-z-]+)", f"{blocks}\n{inline}"):
        assert command in COMMANDS, command
    for script in re.findall(r"\b(?:recipes|examples)/[\w./]+\.(?:sh|py|yaml|ipynb)", text):
        assert (ROOT / script).exists() or Path(script).stem in ("NAME", "mine"), script
    for line in blocks.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if "qwenvl_ft.train" in words and not any("$" in word or word.startswith("recipe=output") for word in words):
            arguments = words[words.index("qwenvl_ft.train") + 1 :]
            recipe_from_argv([word for word in arguments if word != "..."])
