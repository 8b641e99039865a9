"""Writes a table between two markers of a page of docs/."""

from pathlib import Path


def write_between(page: Path, begin: str, end: str, table: str) -> None:
    """Replace what stands between two lines of a page.

    Raises:
        ValueError: ``begin`` does not stand there exactly once.
    """
    before, rest = page.read_text(encoding="utf-8").split(begin)
    page.write_text(f"{before}{begin}\n\n{table}\n\n{end}{rest.split(end, 1)[1]}", encoding="utf-8")
