"""Augment the pixels and coordinates of a record as a recipe's ``augmentation`` section says, in two stages.

`Augmenter.draw` makes all random decisions from the size of the image alone. The resulting `Drawn` is deterministic: it
gives the size of the augmented image, the coordinates of its objects, and its pixels. A plan that needs sizes and texts
can thus be made before any pixel is read, and agrees with the pixels read later.

```yaml
augmentation:
  enabled: true
  ops:
    - {name: hflip, params: {prob: 0.5}}
    - rotate: {max_deg: 8, prob: 0.25}       # the short form
    - {name: pad_to_multiple, params: {multiple: 32}}
```
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.random import Generator
from PIL import Image

from qwenvl_ft.data.augment.geometry import IDENTITY, Size, Step, map_objects
from qwenvl_ft.data.augment.operations import OPERATIONS, Numbers, Operation
from qwenvl_ft.data.augment.render import Colour, render
from qwenvl_ft.data.augment.settings import Phase, read_settings
from qwenvl_ft.errors import DataError

WHERE = "data.augmentation"


@dataclass(frozen=True, slots=True)
class Drawn:
    """The augmentation of one record; it applies to all its images, which must have the same size."""

    source_size: Size
    steps: tuple[Step, ...] = ()
    colours: tuple[tuple[Any, Numbers], ...] = ()
    """Colour operations in the recipe's order, with the numbers that they drew."""
    fill: Colour = (128, 128, 128)
    min_visible: float = 0.3

    @property
    def size(self) -> Size:
        """(width, height) of the augmented image."""
        return self.steps[-1].size if self.steps else self.source_size

    def objects(self, objects: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[int]]:
        """Return the record's objects in the augmented image, and the indices of those that left it.

        Without geometric steps the coordinates are bit-equal. See `map_objects` for the clipping.
        """
        return map_objects(objects, self.steps, self.min_visible)

    def image(self, image: Image.Image) -> Image.Image:
        """Return the augmented image, or the image itself if nothing changes.

        Raises:
            DataError: the image does not have the size that this was drawn for.
        """
        if image.size != self.source_size:
            stated, found = ("x".join(str(side) for side in size) for size in (self.source_size, image.size))
            raise DataError(
                f"an image has {found} pixels, but its record states {stated}. Correct the record's width and height; "
                "images that share objects must have the same size."
            )
        image = image.convert("RGB") if image.mode != "RGB" else image
        for step in self.steps:
            image = render(image, step, self.fill)
        return self.coloured(image)

    def coloured(self, image: Image.Image) -> Image.Image:
        """Apply only the colour operations, to an RGB image of any size."""
        for operation, numbers in self.colours:
            image = operation.apply(image, *numbers)
        return image


@dataclass(frozen=True, kw_only=True)
class Augmenter:
    """Draws augmentations. The caller must use it for training only."""

    phases: tuple[Phase, ...]
    enabled: bool = True
    bypass_prob: float = 0.0
    """Share of the records that stay unchanged."""
    min_visible: float = 0.3
    """Drop objects of which a smaller share (of area or length) would stay in the frame."""
    fill: Colour = (128, 128, 128)
    """RGB colour of areas outside the image; mid grey is about 0 after the processor's normalisation."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | None, where: str = WHERE) -> "Augmenter":
        """Read the section of a recipe, whose keys are the fields of `Settings`.

        None or ``enabled: false`` gives an augmenter that changes nothing.

        Args:
            where: key of the section, for messages.

        Raises:
            RecipeError: an operation, a parameter or a value is wrong; the message names its place.
        """
        settings, phases = read_settings(config or {}, where)
        return cls(
            phases=phases,
            enabled=settings.enabled and config is not None,
            bypass_prob=settings.bypass_prob,
            min_visible=settings.min_visible,
            fill=settings.colour,
        )

    def draw(self, width: int, height: int, rng: Generator, epoch: int = 0) -> Drawn:
        """Draw the augmentation of a record whose images have this size in pixels.

        Args:
            rng: seeded by the caller with (seed, epoch, index), on which alone a record's augmentation depends.
            epoch: selects the phase.
        """
        unchanged = Drawn((width, height), fill=self.fill, min_visible=self.min_visible)
        if not self.enabled or rng.random() < self.bypass_prob:
            return unchanged
        steps = _StepCollector((width, height))
        colours: list[tuple[Any, Numbers]] = []
        for operation in self._operations_of(epoch):
            applied = rng.random() < operation.prob
            numbers = operation.draw(rng)
            if not applied:
                continue
            if operation.kind == "colour":
                colours.append((operation, numbers))
            else:
                steps.add(operation, numbers)
        return Drawn((width, height), steps.done(), tuple(colours), self.fill, self.min_visible)

    @property
    def moving(self) -> list[str]:
        """Names of the operations, of any phase, that move pixels and thus coordinates."""
        names = {kind: name for name, kind in OPERATIONS.items()}
        geometric = [op for phase in self.phases for op in phase.ops if self.enabled and op.kind != "colour"]
        return list(dict.fromkeys(names[type(op)] for op in geometric))

    def _operations_of(self, epoch: int) -> tuple[Operation, ...]:
        return next(p.ops for p in self.phases if p.until_epoch is None or epoch < p.until_epoch)


class _StepCollector:
    """Collects geometric operations: consecutive affine ones become one step, and steps without effect are dropped."""

    def __init__(self, size: Size) -> None:
        self.finished: list[Step] = []
        self.size = size
        self.pending = Step(IDENTITY, size)

    def add(self, operation: Any, numbers: Numbers) -> None:
        if operation.kind == "barrier":
            self._flush()
        self.pending = self.pending.then(operation.step(self.pending.size, *numbers))
        if operation.kind == "barrier":
            self._flush()

    def done(self) -> tuple[Step, ...]:
        self._flush()
        return tuple(self.finished)

    def _flush(self) -> None:
        if (self.pending.matrix, self.pending.size) != (IDENTITY, self.size):
            self.finished.append(self.pending)
        self.size = self.pending.size
        self.pending = Step(IDENTITY, self.size)
