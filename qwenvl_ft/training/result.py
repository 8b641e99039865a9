"""The object that `qwenvl_ft.train` returns."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class TrainResult:
    """Output directory, metrics and progress of a run."""

    output_dir: Path
    metrics: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    """Number of optimizer steps, including those before a resume; summed over the phases that this call ran."""
    stopped_by: int | None = None
    """Number of the signal that ended the run early; None if it ran to its end."""
