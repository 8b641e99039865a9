"""Draw the two pictures of docs/architecture.md: the flow of the data, and which part of the package imports which.

    python docs/images/architecture.py          write flow.svg and imports.svg beside this file (make pictures)

``imports.svg`` is drawn from the imports in the source, ``flow.svg`` by hand from the tables below; a test compares
both with the package. Only the standard library is needed.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parents[1] / "qwenvl_ft"

INK, SOFT, LINE = "#1b1f27", "#5b6472", "#c9cfd8"
FILLS = {"file": "#fff7e6", "recipe": "#eef1f6", "data": "#e9f3ec", "model": "#e8effc", "train": "#f3ecfa"}
"""Kind of a box -> its colour."""


@dataclass(frozen=True)
class Box:
    """A stage of the flow: a part of the package (its folder), or files on disk (kind ``file``)."""

    name: str
    note: str
    kind: str
    column: int
    row: int
    """Grid position; column 2 spans both columns."""


BOXES = (
    Box("recipe.yaml, overrides", "what to train, and how", "file", 0, 0),
    Box("recipe/", "typed and checked", "recipe", 0, 1),
    Box("model/", "model and processor", "model", 0, 2),
    Box("tuning/", "frozen, trained and adapted parts", "model", 0, 3),
    Box("records", "JSON lines, tables, shards, media", "file", 1, 0),
    Box("data/sources/", "mixtures, samples, splits", "data", 1, 1),
    Box("data/readers/", "one file for each record format", "data", 1, 2),
    Box("data/augment/, data/dense/", "training only: new pixels, groups", "data", 1, 3),
    Box("data/encode/, data/media/", "tokens, labels, positions, patches", "data", 1, 4),
    Box("data/plan/", "lengths; the rows of each rank", "data", 0, 4),
    Box("data/collate.py", "samples of a row, end to end", "data", 1, 5),
    Box("training/", "QwenVLTrainer: exact loss, logs, resume", "train", 2, 6),
    Box("checkpoint/, export/", "resume, merge, quantise", "train", 0, 7),
    Box("evaluation/", "answers by generation, metrics", "train", 1, 7),
)
ARROWS = (
    ("recipe.yaml, overrides", "recipe/", ""),
    ("recipe/", "model/", "Recipe"),
    ("model/", "tuning/", "model"),
    ("records", "data/sources/", ""),
    ("data/sources/", "data/readers/", "record"),
    ("data/readers/", "data/augment/, data/dense/", "Conversation"),
    ("data/augment/, data/dense/", "data/encode/, data/media/", "Conversation"),
    ("data/encode/, data/media/", "data/plan/", ""),
    ("data/encode/, data/media/", "data/collate.py", "Sample"),
    ("data/collate.py", "training/", "batch, one row"),
    ("training/", "checkpoint/, export/", ""),
    ("training/", "evaluation/", ""),
)
"""(from, to, type of what is handed on)."""
BESIDE = {
    "assemble": "builds the stages from a recipe",
    "look": "shows the data: check, show, stats",
    "prove": "checks the promises on your model",
    "bench": "measures speed and memory",
    "cli": "one file for each command",
    "flare": "tools for the FLARE25 data",
    "train": "the entry point",
    "upstream": "what is taken from internals of other libraries",
    "errors": "the exceptions",
}
"""Part that is not a stage of the flow -> what it does."""

WIDTH, MARGIN, GAP, HEIGHT, STEP = 590, 22, 22, 48, 76
COLUMN = (WIDTH - 2 * MARGIN - GAP) / 2


def parts() -> list[str]:
    """Return the names of the package's folders and modules, without ``__init__``."""
    return sorted({path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in sources()})


def sources() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def imports() -> dict[str, set[str]]:
    """Return part -> the other parts that its files import, anywhere in them."""
    found: dict[str, set[str]] = {part: set() for part in parts()}
    for path in sources():
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        found[part] |= set(imported(path)) & set(found) - {part}
    return found


def imported(path: Path) -> Iterator[str]:
    """Yield the parts of the package that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "qwenvl_ft":
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("qwenvl_ft."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (name.name.split(".")[1] for name in node.names if name.name.startswith("qwenvl_ft."))


def order(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the parts in levels, the lowest first: a part imports only parts of lower levels.

    Raises:
        ValueError: parts import each other in a circle.
    """
    levels: list[list[str]] = []
    placed: set[str] = set()
    while len(placed) < len(graph):
        level = sorted(part for part in graph if part not in placed and graph[part] <= placed)
        if not level:
            raise ValueError(f"these parts import each other in a circle: {sorted(set(graph) - placed)}")
        levels.append(level)
        placed |= set(level)
    return levels


def svg(width: float, height: float, title: str, body: list[str]) -> str:
    """Return a whole SVG file with a white background; it refers to nothing outside itself."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" role="img" font-family="system-ui, sans-serif" font-size="14">'
    )
    arrow = (
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0L8 4L0 8z" fill="{SOFT}"/></marker></defs>'
    )
    ground = f'<rect width="100%" height="100%" rx="8" fill="#ffffff" stroke="{LINE}"/>'
    return "\n".join([head, f"<title>{escape(title)}</title>", arrow, ground, *body, "</svg>", ""])


def text(x: float, y: float, words: str, *, colour: str = INK, anchor: str = "start", more: str = "") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" fill="{colour}" text-anchor="{anchor}"{more}>{escape(words)}</text>'


def left(box: Box) -> float:
    return MARGIN + (COLUMN + GAP) * (box.column % 2)


def top(box: Box) -> float:
    return MARGIN + STEP * box.row


def middle(box: Box) -> float:
    return WIDTH / 2 if box.column == 2 else left(box) + COLUMN / 2


def draw_box(box: Box) -> list[str]:
    width = WIDTH - 2 * MARGIN if box.column == 2 else COLUMN
    dashes = ' stroke-dasharray="4 3"' if box.kind == "file" else ""
    shape = (
        f'<rect x="{left(box):.0f}" y="{top(box):.0f}" width="{width:.0f}" height="{HEIGHT}" rx="7" '
        f'fill="{FILLS[box.kind]}" stroke="{LINE}"{dashes}/>'
    )
    name = text(middle(box), top(box) + 19, box.name, anchor="middle", more=' font-weight="600"')
    return [shape, name, text(middle(box), top(box) + 37, box.note, colour=SOFT, anchor="middle")]


def line(path: str) -> str:
    return f'<path d="{path}" fill="none" stroke="{SOFT}" stroke-width="1.4" marker-end="url(#tip)"/>'


def draw_arrow(start: Box, end: Box, label: str) -> list[str]:
    """Draw an arrow down, or to the left if both boxes stand in one row."""
    if start.row == end.row:
        y = top(start) + HEIGHT / 2
        return [line(f"M{left(start):.0f} {y:.0f}H{left(end) + COLUMN + 1:.0f}")]
    x = middle(start) if start.column != 2 else middle(end)
    y = top(start) + HEIGHT
    words = [text(x + 9, y + 18, label, colour=SOFT, more=' font-style="italic"')] if label else []
    return [line(f"M{x:.0f} {y:.0f}V{top(end) - 1:.0f}"), *words]


def side_arrows(boxes: dict[str, Box]) -> list[str]:
    """Draw the two long arrows: from the plan and from the prepared model to the trainer."""
    plan, tuning, trainer = boxes["data/plan/"], boxes["tuning/"], boxes["training/"]
    x, y = middle(plan), top(plan) + HEIGHT
    rows = [
        line(f"M{x:.0f} {y:.0f}V{top(trainer) - 1:.0f}"),
        text(x + 9, y + 18, "rows of the epoch", colour=SOFT, more=' font-style="italic"'),
    ]
    x, y = left(tuning) + 16, top(tuning) + HEIGHT
    bend = MARGIN / 2
    down = f"M{left(tuning):.0f} {top(tuning) + HEIGHT / 2:.0f}H{bend:.0f}V{top(trainer) + HEIGHT / 2:.0f}H{MARGIN - 1}"
    return [*rows, line(down), text(x, y + 18, "prepared model", colour=SOFT, more=' font-style="italic"')]


def flow() -> str:
    """Return the picture of how a recipe and records become a trained model."""
    boxes = {box.name: box for box in BOXES}
    body = [part for start, end, label in ARROWS for part in draw_arrow(boxes[start], boxes[end], label)]
    body += side_arrows(boxes)
    body += [part for box in BOXES for part in draw_box(box)]
    y = max(top(box) for box in BOXES) + HEIGHT + 30
    body.append(text(MARGIN, y, "Parts that are not on this path:", colour=SOFT))
    for name, note in BESIDE.items():
        y += 20
        body += [text(MARGIN, y, name, more=' font-weight="600"'), text(MARGIN + 92, y, note, colour=SOFT)]
    return svg(WIDTH, y + MARGIN + 4, "From a recipe and records to a trained model", body)


CELL, NAMES = 24, 106


def matrix() -> str:
    """Return the picture of the imports: a dot in row A and column B says that A imports B."""
    graph = imports()
    levels = order(graph)
    names = [name for level in levels for name in level]
    place = {name: number for number, name in enumerate(names)}
    above = 92
    size = CELL * len(names)
    body = []
    for number, level in enumerate(levels):
        y = above + CELL * place[level[0]]
        shade = "#f4f6f9" if number % 2 else "#ffffff"
        body.append(f'<rect x="8" y="{y}" width="{NAMES + size}" height="{CELL * len(level)}" fill="{shade}"/>')
    for name in names:
        x, y = NAMES + CELL * place[name] + CELL / 2, above + CELL * place[name] + CELL / 2
        body.append(text(NAMES - 8, y + 4, name, anchor="end", more=' font-weight="600"'))
        body.append(text(x + 4, above - 7, name, more=f' transform="rotate(-60 {x + 4:.0f} {above - 7})"'))
        body.append(f'<rect x="{x - 4:.0f}" y="{y - 4:.0f}" width="8" height="8" fill="{LINE}"/>')
        for other in sorted(graph[name], key=place.__getitem__):
            x = NAMES + CELL * place[other] + CELL / 2
            tip = f"<title>{name} imports {other}</title>"
            body.append(f'<circle cx="{x:.0f}" cy="{y:.0f}" r="5" fill="#2f6fde">{tip}</circle>')
    return svg(NAMES + size + 46, above + size + 14, "Which part of the package imports which", body)


PICTURES = {"flow.svg": flow, "imports.svg": matrix}
"""File -> the function that draws it."""


def main() -> None:
    for name, draw in PICTURES.items():
        (HERE / name).write_text(draw(), encoding="utf-8")
        print(HERE / name)


if __name__ == "__main__":
    main()
