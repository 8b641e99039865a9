"""Draw every picture of the README and the docs (make pictures).

    python docs/images/draw.py [--demo .demo]

``run.svg`` shows lines of the training.log that `make demo` left in DEMO/run, and an answer of the trained model;
``show.png`` is the page that ``qwenvl-ft show`` makes of the demo's data, as chromium renders it. Without a demo or
without chromium these two are left as they are. flow.svg and imports.svg: see architecture.py.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from io import StringIO
from pathlib import Path

import architecture
from rich.console import Console
from rich.text import Text

HERE = Path(__file__).resolve().parent
COLUMNS = 100
"""Width of the terminal; longer lines are cut, as `less -S` does."""
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
QUIET = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
PAGE = (1000, 852)
"""Pixels of the page's upper part that show.png holds."""
SVG = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">
<title>make demo, in a terminal</title>
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: {char_height}px; line-height: {line_height}px; font-variant-east-asian: full-width; }}
.{unique_id}-title {{ font-family: system-ui, sans-serif; font-size: 18px; font-weight: bold; }}
{styles}
</style>
<defs><clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/></clipPath>{lines}</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g></g>
</svg>
"""
"""rich's SVG without its web fonts: a picture must not load anything."""


def log_lines(log: str) -> list[str]:
    """Return the lines of a training.log that tell its story, without their times.

    These are all lines before the first step, the first step, each step before an evaluation with that evaluation, and
    everything after the last step; a lone "..." stands for the lines between.
    """
    lines = [line[21:] for line in log.splitlines() if re.match(r"\d{4}-\d\d-\d\d ", line)]
    steps = [number for number, line in enumerate(lines) if line.startswith("step ") and "  loss " in line]
    evaluated = {number for number in steps if number + 1 < len(lines) and "eval_loss" in lines[number + 1]}
    kept: list[str] = []
    for number, line in enumerate(lines):
        outside = number <= steps[0] or number > steps[-1]
        if outside or number in evaluated or number - 1 in evaluated:
            kept.append(line)
        elif kept[-1] != "...":
            kept.append("...")
    return kept


def terminal(demo: Path) -> str:
    """Return run.svg: the demo's log and the answer to one image that the model never saw."""
    image = f"{demo.name}/digits/images/1500.png"
    command = ["infer", "--model", f"{demo}/run", "--image", f"{demo}/digits/images/1500.png"]
    answer = qwenvl_ft(*command, "--prompt", "Which digit is this?").strip().splitlines()[-1]
    console = Console(record=True, width=COLUMNS, file=StringIO())
    show = [
        prompt("make demo"),
        *log_lines((demo / "run" / "training.log").read_text(encoding="utf-8")),
        prompt(f"qwenvl-ft infer --model {demo.name}/run --image {image} \\"),
        Text('    --prompt "Which digit is this?"', style="bold"),
        answer,
    ]
    for line in show:
        console.print(line, no_wrap=True, overflow="ellipsis", highlight=isinstance(line, str), markup=False)
    return console.export_svg(title="make demo", code_format=SVG, unique_id="run")


def prompt(command: str) -> Text:
    return Text.assemble(("$ ", "bold green"), (command, "bold"))


def qwenvl_ft(*arguments: str) -> str:
    command = [sys.executable, "-m", "qwenvl_ft.cli.main", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def photograph(demo: Path, browser: str, target: Path) -> None:
    """Write show.png: the upper part of the page that ``qwenvl-ft show`` makes of the demo's data."""
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder, "show.html")
        words = [f"model.model={demo}/tiny", f"data.train={demo}/digits/train.jsonl", "--samples", "1", "--rows", "1"]
        qwenvl_ft("show", "digits", *words, "--out", str(page))
        size = f"--window-size={PAGE[0]},{PAGE[1]}"
        profile = f"--user-data-dir={folder}/profile"
        command = [browser, *QUIET, profile, size, f"--screenshot={target}", page.as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
    shrink(target)


def shrink(picture: Path) -> None:
    """Store a PNG with a palette of 128 colours, a third of its size."""
    from PIL import Image

    Image.open(picture).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(picture, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path(".demo"), help="the folder of make demo")
    demo = parser.parse_args().demo
    architecture.main()
    if not (demo / "run" / "training.log").is_file():
        print(f"run.svg and show.png stay as they are: {demo}/run is not there, make demo makes it")
        return
    (HERE / "run.svg").write_text(terminal(demo), encoding="utf-8")
    print(HERE / "run.svg")
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        print(f"show.png stays as it is: none of {', '.join(BROWSERS)} is installed")
        return
    photograph(demo, browser, HERE / "show.png")
    print(HERE / "show.png")


if __name__ == "__main__":
    main()
