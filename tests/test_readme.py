"""The README's figures are those of the guides, and its pictures are there, small, and made by docs/images."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
IMAGES = sorted(path for path in (ROOT / "docs/images").iterdir() if path.suffix in (".svg", ".png"))
ROWS = {
    "planning, records/s": "planning, records/s",
    "encoding and collating, samples/s": "encoding and collating, samples/s",
    "batch size per 1,000 tokens, MB": "batch size per 1,000 tokens, MB",
    "training 54M parameters, tokens/s": "training, 54M parameters, tokens/s",
    "peak memory of that, GiB": "peak memory of these steps, GiB",
    "training 11M parameters, tokens/s": "training, 11M parameters, tokens/s",
}
"""Row of the README -> the row of docs/performance.md with the same figures."""


def section(text, heading):
    return text.split(f"## {heading}\n")[1].split("\n## ")[0]


def table(text):
    """First cell of a row -> the others by the library in the table's head, the first row of that name."""
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    rows = {}
    for cells in lines[2:]:
        rows.setdefault(cells[0], dict(zip([name.split(" ")[0] for name in lines[0][1:]], cells[1:], strict=True)))
    return rows


def test_figures_beside_other_libraries_are_those_of_the_guide():
    ours = table(section(README, "Beside other tools"))
    theirs = table(section((ROOT / "docs/performance.md").read_text(encoding="utf-8"), "Beside other libraries"))
    for row, there in ROWS.items():
        assert set(ours[row]) == set(theirs[there])
        for library, value in ours[row].items():
            assert value == (theirs[there][library] or "nothing to plan"), (row, library)
    cached = theirs["opening 200,000 records, nothing cached / cached, s"]
    for library, value in ours["opening 200,000 records from the cache, s"].items():
        assert value == cached[library].split(" / ")[1]


def test_the_figures_at_the_top_are_the_best_of_each_row():
    rows = table(section(README, "Beside other tools"))
    top = README.split("\n## ")[0]

    def best(row):
        others = {name: value for name, value in rows[row].items() if name != "qwenvl_ft"}
        numbers = {name: float(value) for name, value in others.items() if re.fullmatch(r"[\d.]+", value)}
        return max(numbers, key=numbers.get)

    for row, library in (
        ("planning, records/s", "LLaMA-Factory"),
        ("encoding and collating, samples/s", "plain"),
        ("training 54M parameters, tokens/s", "ms-swift"),
    ):
        assert best(row) == library
        (line,) = [line for line in top.splitlines() if f"**{rows[row]['qwenvl_ft']}**" in line]
        assert re.search(rf"\b{rows[row][library]} \({library}", line), line


def test_the_demo_in_the_table_of_runs_is_the_one_in_the_picture():
    shown = re.findall(r">([^<]+)</text>", (ROOT / "docs/images/run.svg").read_text(encoding="utf-8"))
    words = "".join(shown).replace("&#160;", " ")
    share, seconds = re.search(r"in full by hand, last on [\d-]+: ([\d.]+%) after (\d+) s", README).groups()
    assert f"exact match {share} of 297" in words
    assert f"seconds {seconds}" in words


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.name)
def test_a_picture_is_small_and_loads_nothing(path):
    assert path.stat().st_size < 200_000
    if path.suffix == ".svg":
        text = path.read_text(encoding="utf-8")
        assert set(re.findall(r"https?://[^\s\"'<]+", text)) == {"http://www.w3.org/2000/svg"}
        assert "<title>" in text


def test_every_picture_of_the_pages_says_what_it_shows_and_is_drawn_by_a_script():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    shown = {
        name for page in pages for name in re.findall(r"!\[[^\]]+\]\((?:docs/)?images/([^)]+)\)", page.read_text())
    }
    assert shown == {path.name for path in IMAGES}
    scripts = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs/images").glob("*.py"))
    assert all(f'"{name}"' in scripts for name in shown)
