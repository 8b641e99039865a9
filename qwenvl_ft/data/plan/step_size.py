"""How much does an optimizer step hold? Its rows and samples, also where an epoch has fewer rows than would fit."""

from dataclasses import dataclass

from qwenvl_ft.data.plan.packing import RunShape


@dataclass(frozen=True)
class StepSize:
    """The optimizer steps of one epoch."""

    shape: RunShape
    rows: int
    """Rows of the epoch; without packing, its samples."""
    samples: int
    packing: bool

    @property
    def room(self) -> int:
        """Rows that a step would hold if the epoch had enough."""
        return self.shape.rows_per_pass * self.shape.accumulation

    @property
    def steps(self) -> int:
        return -(-self.rows // self.room)

    @property
    def last(self) -> int:
        """Rows of the epoch's last step."""
        return self.rows - self.room * (self.steps - 1)

    @property
    def samples_per_step(self) -> float:
        """Samples of a step, on average over the epoch."""
        return self.samples / self.steps

    def __str__(self) -> str:
        """Describe a step as ``4 rows, 12.5 samples on average (2 x 2 accumulated x 1 processes)``."""
        held = self._counted(min(self.room, self.rows))
        if self.packing and self.steps > 1:
            held += f", {self.samples_per_step:,.1f} samples on average"
        elif self.packing:
            held += f", {self.samples:,} samples"
        shape = self.shape
        ranks = "processes" if shape.ranks_per_row == 1 else f"groups of {shape.ranks_per_row} processes"
        product = f"{shape.rows_per_batch} x {shape.accumulation} accumulated x {shape.data_ranks} {ranks}"
        if self.rows < self.room:
            return f"{held}: the whole epoch, although {self._counted(self.room)} would fit ({product})"
        last = f"; the last of an epoch holds {self._counted(self.last)}" if self.last < self.room else ""
        return f"{held} ({product}{last})"

    def _counted(self, number: int) -> str:
        unit = "row" if self.packing else "sample"
        return f"{number:,} {unit}" + ("" if number == 1 else "s")
