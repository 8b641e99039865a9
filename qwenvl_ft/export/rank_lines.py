"""Writes the ranks of many layers in few lines."""

import re
from typing import Any

NUMBER = re.compile(r"\.(\d+)\.")
"""The number of a layer within its name."""


def rank_lines(ranks: dict[str, int]) -> list[str]:
    """Return a line for each kind of layer: the ranks of its layers, in the order of the model.

    Example:
        ``  model.language_model.layers.*.self_attn.q_proj: 4 in 0-2, 6; 3 in 3-5`` for seven layers.
    """
    kinds: dict[str, list[tuple[str, int]]] = {}
    for layer, rank in ranks.items():
        number = NUMBER.search(layer)
        kinds.setdefault(NUMBER.sub(".*.", layer, count=1), []).append((number[1] if number else "", rank))
    lines = []
    for kind in sorted(kinds, key=_natural):
        layers = sorted((int(number or 0), rank) for number, rank in kinds[kind])
        by_rank = {rank: [number for number, other in layers if other == rank] for _, rank in layers}
        several = "*" in kind
        shown = (f"{rank} in {_ranges(by_rank[rank])}" if several else str(rank) for rank in sorted(by_rank)[::-1])
        lines.append(f"  {kind}: {'; '.join(shown)}")
    return lines


def _ranges(numbers: list[int]) -> str:
    """Write increasing numbers as ranges: ``0-2, 6``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _natural(name: str) -> list[Any]:
    return [(part.isdigit(), int(part) if part.isdigit() else part) for part in re.split(r"(\d+)", name)]
