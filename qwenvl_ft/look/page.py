"""Pages that hold all they show: one HTML file, light and dark, no script, nothing from elsewhere."""

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from qwenvl_ft import __version__

FOLDER = Path(__file__).parent / "templates"
COLOURS = 10
"""Colours of classes in page.css, ``.c0`` and on."""


def render(template: str, **values: Any) -> str:
    """A page; every value is escaped."""
    return environment().get_template(template).render(version=__version__, **values)


@cache
def environment() -> Environment:
    pages = Environment(loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined)
    pages.trim_blocks = pages.lstrip_blocks = True
    pages.filters |= {"colour": colour, "percent": percent, "visible": visible}
    return pages


def colour(label: str) -> str:
    """CSS class of a class's colour: the same in every page."""
    return f"c{sum(map(ord, label)) % COLOURS}"


def percent(share: float, digits: int = 1) -> str:
    """``0.123`` -> ``12.3%``."""
    return f"{share * 100:.{digits}f}%"


def visible(text: str) -> str:
    """A token's text with its line ends to be seen; they still break the line."""
    return text.replace("\t", "→\t").replace("\n", "↵\n")
