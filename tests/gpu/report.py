"""Write the results of a GPU day into the documents.

    make gpu-report FILE=.gpu/gpu.json

Tables replace the text between ``<!-- gpu:begin -->`` and ``<!-- gpu:end -->`` in docs/performance.md and
recipes/README.md. Results of a rehearsal are refused, because they were not measured on a GPU.
"""

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = "<!-- gpu:begin -->", "<!-- gpu:end -->"
ORDER = ("packed", "padded", "plain", "compiled", "liger", "unchecked")
NAMES = {
    "compiled": "packed, `torch_compile`",
    "liger": "packed, Liger",
    "unchecked": "packed, no checkpointing",
    "plain": "plain Trainer",
}
SHOWN_REASON = 160


def update(results: dict, root: Path) -> list[Path]:
    """Write the blocks of both documents below a root, and return the written files.

    Raises:
        SystemExit: the results are those of a rehearsal or name no machine, or a document has no markers.
    """
    if results["rehearsal"]:
        raise SystemExit("error: these are results of a rehearsal. Run make gpu on a machine with a GPU.")
    if not results["machines"]:
        raise SystemExit("error: the results do not name a machine. See why the step 'machine' failed in the file.")
    blocks = {
        root / "docs" / "performance.md": performance_block(results),
        root / "recipes" / "README.md": recipes_block(results),
    }
    texts = {path: replaced(path, block) for path, block in blocks.items()}
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    return list(texts)


def replaced(path: Path, block: str) -> str:
    """Return the text of a document with a new block."""
    text = path.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise SystemExit(f"error: {path} needs one line {BEGIN} and one line {END}")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{block.strip()}\n\n{END}{rest.split(END)[1]}"


def performance_block(results: dict) -> str:
    """Return the block of docs/performance.md: machine, bench table, and every step with its outcome."""
    parts = [ran_on(results), bench_table(cells(results)), "All steps:", steps_table(results["steps"])]
    return "\n\n".join(part for part in parts if part)


def recipes_block(results: dict) -> str:
    """Return the block of recipes/README.md: memory and speed of packed rows by model and method."""
    rows = [
        (f"{row['size']} {row['train_type']}", f"{row['row_length']:,}", *figures(row)[:2], figures(row)[3])
        for row in cells(results)
        if row["layout"] == "packed" and row["status"] == "ok"
    ]
    heads = ("model", "row", "peak GiB", "tokens/s", "MFU")
    note = "Packed rows of synthetic records, models with random weights; LoRA has rank 16 on the language model."
    return "\n\n".join([ran_on(results), note, table(heads, rows) if rows else "No row was measured."])


def ran_on(results: dict) -> str:
    """Return date, GPU and versions, for each machine if there are several."""
    dates = sorted(entry["date"][:10] for entry in results["steps"] if "date" in entry)
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    lines: dict[str, None] = {}
    for machine in results["machines"]:
        versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
        lines[f"{machine['device']} ({machine.get('memory_gib', '?')} GiB), Python {machine['python']}, {versions}"] = (
            None
        )
    return f"{when}, commit {results['commit'] or 'unknown'}: {'; '.join(lines)}."


def cells(results: dict) -> list[dict]:
    """Return all bench rows, each with its machine, sorted by size, method, row length and layout."""
    found = [
        row | {"machine": results["machines"][entry["machine"]]["device"]}
        for entry in results["steps"]
        if entry["step"].startswith("bench")
        for row in entry.get("figures", {}).get("rows", [])
    ]
    return sorted(
        found, key=lambda row: (row["size"], row["train_type"], row["row_length"], ORDER.index(row["layout"]))
    )


def bench_table(rows: list[dict]) -> str:
    """Return the table of all rows, with figures or the reason for their absence."""
    if not rows:
        return "No row of the bench was measured."
    several = len({row["machine"] for row in rows}) > 1
    heads = ("model", "row", "layout", "peak GiB", "computed", "tokens/s", "samples/s", "MFU", "run as")
    lines = []
    for row in rows:
        peak, tokens, samples, mfu = figures(row)
        how = ran_as(row) if row["status"] == "ok" else row["reason"][:SHOWN_REASON].replace("|", "/")
        how += f"; {row['machine']}" if several else ""
        computed = f"{row['computed_gib']:.0f}" if row["layout"] == "packed" and "computed_gib" in row else ""
        name = NAMES[row["layout"]] if row["layout"] in NAMES else row["layout"]
        model = f"{row['size']} {row['train_type']}"
        lines.append((model, f"{row['row_length']:,}", name, peak, computed, tokens, samples, mfu, how))
    return table(heads, lines)


def figures(row: dict) -> tuple[str, str, str, str]:
    """Return peak GiB, tokens/s, samples/s and MFU as text, or dashes if the row failed."""
    if row["status"] != "ok":
        return ("-",) * 4
    rates = f"{row['tokens_per_second']:,.0f}", f"{row['samples_per_second']:,.1f}"
    return f"{row['peak_gib']:.1f}", *rates, f"{row['mfu']:.1%}"


def ran_as(row: dict) -> str:
    """Describe what one step consisted of."""
    samples = (
        f"batches of {row['batch']} x {row['accumulation']}" if row["layout"] in ("padded", "plain") else "one row"
    )
    return f"{row['steps']} steps, {samples}, {row['attention']}"


def steps_table(entries: list[dict]) -> str:
    """Return the table of all steps with outcome, duration and reason."""
    rows = []
    for entry in entries:
        numbers = entry.get("figures") or {}
        counts = [f"{numbers[kind]} {kind}" for kind in ("passed", "failed", "skipped") if numbers.get(kind)]
        why = [entry["reason"][:SHOWN_REASON].replace("|", "/")] if entry["reason"] else []
        rows.append((entry["step"], entry["status"], f"{entry.get('seconds', 0):.0f}", "; ".join(counts + why)))
    return table(("step", "result", "seconds", ""), rows)


def table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return a Markdown table in which columns of numbers are right-aligned."""
    right_aligned = [all(re.match(r"^[-\d.,%]*$", row[column]) for row in rows) for column in range(len(heads))]
    rule = "|".join("---:" if right else "---" for right in right_aligned)
    lines = ["| " + " | ".join(row) + " |" for row in (heads, *rows)]
    return "\n".join([lines[0], f"|{rule}|", *lines[1:]])


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the results of a GPU day into the documents.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--root", type=Path, default=ROOT)
    args = parser.parse_args()
    if not args.file.exists():
        raise SystemExit(f"error: there is no {args.file}. Run make gpu first, or name the file: FILE=DIR/gpu.json")
    for path in update(json.loads(args.file.read_text(encoding="utf-8")), args.root):
        print("written:", path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
