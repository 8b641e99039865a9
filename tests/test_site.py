"""The site of `make docs`: its pages, and the links that docs/site.py leads to their places there.

`make docs` itself builds the site and fails on a broken link; .ci/run does that. These tests need no mkdocs.
"""

import configparser
import importlib.util
import posixpath
import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]


def load_hook():
    spec = importlib.util.spec_from_file_location("site_hook", ROOT / "docs" / "site.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


site = load_hook()
DOCS = [path.relative_to(ROOT / "docs").as_posix() for path in sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [*DOCS, *site.PAGES.values()]


def source(page):
    return (ROOT / site.origin(page)).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("page", "before", "after"),
    [
        ("index.md", "[a](docs/data.md#formats)", "[a](data.md#formats)"),
        ("index.md", "![a](docs/images/run.svg)", "![a](images/run.svg)"),
        ("index.md", "[a](recipes/README.md)", "[a](recipes/index.md)"),
        ("training.md", "[a](../recipes/sft_8b.yaml)", "[a](files/recipes/sft_8b.yaml.txt)"),
        ("training.md", "[a](data.md)", "[a](data.md)"),
        ("recipes/index.md", "[a](../docs/reference.md)", "[a](../reference.md)"),
        ("recipes/index.md", "[a](base.yaml)", "[a](../files/recipes/base.yaml.txt)"),
        ("index.md", "[a](https://example.org/docs/data.md)", "[a](https://example.org/docs/data.md)"),
        ("index.md", "[a](#promises)", "[a](#promises)"),
        ("training.md", "[a](../recipes/none.yaml)", "[a](../recipes/none.yaml)"),
    ],
)
def test_a_link_leads_to_its_place_on_the_site(page, before, after):
    assert site.relink(before, page) == after


@pytest.mark.parametrize("page", PAGES)
def test_every_link_of_a_page_has_a_place_on_the_site(page):
    places = set(PAGES) | {site.place(path) for path in site.linked(source(page), page)}
    for path in site.linked(source(page), page):
        assert (ROOT / path).exists(), path
        assert site.place(path) is not None, path
    for match in site.LINK.finditer(site.relink(source(page), page)):
        if "://" not in match[2]:
            assert posixpath.normpath(posixpath.join(posixpath.dirname(page), match[2])) in places, match[0]


def test_the_menu_names_every_page_once():
    sections = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    named = [
        page for section in sections for entries in section.values() for entry in entries for page in entry.values()
    ]
    assert sorted(named) == sorted(PAGES)


def test_a_page_outside_of_docs_is_found_again():
    assert site.PAGES["README.md"] == "index.md"
    for path, page in site.PAGES.items():
        assert (ROOT / path).is_file(), path
        assert site.origin(page) == path


def test_the_environment_of_the_site_is_the_docs_extra():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    extra = [line for line in config["options.extras_require"]["docs"].splitlines() if line]
    rule = re.search(r"sed -n '([^']+)' setup.cfg", (ROOT / "Makefile").read_text())
    done = subprocess.run(["sed", "-n", rule[1], ROOT / "setup.cfg"], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines() == extra
    assert any(line.startswith("mkdocs-material") for line in extra)
