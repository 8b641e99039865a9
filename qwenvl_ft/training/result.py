"""The object that `qwenvl_ft.train` returns."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class TrainResult:
    """Where a run wrote its checkpoint, its metrics, and how far it came."""

    output_dir: Path
    metrics: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    """Optimizer steps, those before a resume included; summed over the phases that ran now."""
    stopped_by: int | None = None
    """Number of the signal that ended the run early; None if it ran to its end."""
