"""The report of a proof: a row for each comparison, with its figure, its tolerance and a verdict."""

import textwrap
from dataclasses import asdict, dataclass, field
from typing import Any

OK, FAILED, UNCLEAR, SKIPPED = "ok", "FAILED", "unclear", "skipped"
"""Verdicts. ``unclear`` means that the comparison could not have found a fault; it does not count as passed."""

HEADINGS = ("check", "what was compared", "figure", "tolerance", "with a fault", "")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison."""

    check: str
    compared: str
    figure: float | str = ""
    """A relative difference, or a count in words."""
    tolerance: float | str = ""
    fault: float | str = ""
    """The figure that a fault gives on this model and data, to judge the tolerance by."""
    verdict: str = OK
    note: str = ""

    @classmethod
    def judged(cls, check: str, compared: str, *, figure: float, tolerance: float, **more: Any) -> "Row":
        """Make a row of a difference. It fails above the tolerance, and is unclear if a fault would pass too."""
        fault = more["fault"] if "fault" in more else None
        verdict = OK if figure <= tolerance else FAILED  # NaN fails
        if verdict == OK and isinstance(fault, float) and not fault > tolerance:
            verdict = UNCLEAR
        return cls(check=check, compared=compared, figure=figure, tolerance=tolerance, verdict=verdict, **more)


@dataclass(kw_only=True)
class Report:
    """All rows, and facts about the model, data and environment."""

    facts: dict[str, str]
    """Name -> model, method, data, precision, device and versions."""
    rows: list[Row] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return bool(self.rows) and all(row.verdict in (OK, SKIPPED) for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """Return the report as a dict for JSON; NaN and infinity become strings."""
        rows = [{key: _plain(value) for key, value in asdict(row).items()} for row in self.rows]
        return {"ok": self.ok, **asdict(self), "seconds": round(self.seconds, 1), "rows": rows}

    def text(self, width: int = 120) -> str:
        """Return the facts, the table and the overall verdict."""
        width_of_names = max(map(len, self.facts), default=0)
        facts = [f"{name:<{width_of_names}}  {value}" for name, value in self.facts.items()]
        bad = [row.check for row in self.rows if row.verdict in (FAILED, UNCLEAR)]
        last = f"NOT PROVEN: {', '.join(dict.fromkeys(bad)) or 'nothing was compared'}" if not self.ok else "PROVEN"
        return "\n".join([*facts, "", *_table(self.rows, width), "", f"{last} in {self.seconds:.0f} s"])


def _table(rows: list[Row], width: int) -> list[str]:
    """Format the rows as a table; what was compared and the notes are wrapped to fit ``width``."""
    cells = [
        (row.check, row.compared, _figure(row.figure), _figure(row.tolerance), _figure(row.fault), row.verdict)
        for row in rows
    ]
    widths = [max(len(line[k]) for line in [HEADINGS, *cells]) for k in range(len(HEADINGS))]
    widths[1] = max(24, min(widths[1], width - sum(widths) + widths[1] - 2 * (len(widths) - 1)))
    lines = [_line(HEADINGS, widths), _line(tuple("-" * size for size in widths), widths)]
    for row, (check, compared, *rest) in zip(rows, cells, strict=True):
        first, *others = textwrap.wrap(compared, widths[1]) or [""]
        lines.append(_line((check, first, *rest), widths))
        lines += [_line(("", other, "", "", "", ""), widths) for other in others]
        indent = " " * (widths[0] + 2)
        lines += textwrap.wrap(row.note, width, initial_indent=f"{indent}> ", subsequent_indent=f"{indent}  ")
    return lines


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    return "  ".join(cell.ljust(size) for cell, size in zip(cells, widths, strict=True)).rstrip()


def _figure(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.1e}"


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not abs(value) < float("inf") else value
