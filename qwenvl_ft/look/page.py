"""Renders self-contained HTML pages: one file, light and dark, no script, no external resources."""

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from qwenvl_ft import __version__

FOLDER = Path(__file__).parent / "templates"
COLOURS = 10
"""Number of label colours in page.css: ``.c0`` to ``.c9``."""


def render(template: str, **values: Any) -> str:
    """Render a template; every value is escaped."""
    return environment().get_template(template).render(version=__version__, **values)


@cache
def environment() -> Environment:
    pages = Environment(loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined)
    pages.trim_blocks = pages.lstrip_blocks = True
    pages.filters |= {"colour": colour, "percent": percent, "visible": visible}
    return pages


def colour(label: str) -> str:
    """Return the CSS class of a label's colour, the same on every page."""
    return f"c{sum(map(ord, label)) % COLOURS}"


def percent(share: float, digits: int = 1) -> str:
    """Format a share: ``0.123`` -> ``12.3%``."""
    return f"{share * 100:.{digits}f}%"


def visible(text: str) -> str:
    """Make tabs and line ends of a token visible; line ends still break the line."""
    return text.replace("\t", "→\t").replace("\n", "↵\n")
