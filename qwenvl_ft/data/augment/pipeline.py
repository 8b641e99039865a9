"""From a recipe's ``augmentation`` to the pixels and coordinates of one record, in two parts.

`Augmenter.draw` makes all random decisions from the size of the image alone. `Drawn` then answers, without another
random number: how large the image will be, where its objects will be, and what its pixels will be. So a plan that
needs sizes and texts is made before any pixel is read, and agrees with what is read later.

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

from qwenvl_ft.data.augment.canvas import Colour, render
from qwenvl_ft.data.augment.geometry import IDENTITY, Size, Step, map_objects
from qwenvl_ft.data.augment.operations import OPERATIONS, Numbers, Operation
from qwenvl_ft.data.augment.settings import Phase, read_settings
from qwenvl_ft.errors import DataError

WHERE = "data.augmentation"


@dataclass(frozen=True, slots=True)
class Drawn:
    """What happens to one record: the same for all its images, which must have one size."""

    source_size: Size
    steps: tuple[Step, ...] = ()
    colours: tuple[tuple[Any, Numbers], ...] = ()
    """Colour operations in the recipe's order, with what they drew."""
    fill: Colour = (128, 128, 128)
    min_visible: float = 0.3

    @property
    def size(self) -> Size:
        """(width, height) of the augmented image."""
        return self.steps[-1].size if self.steps else self.source_size

    def objects(self, objects: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[int]]:
        """The record's objects in the augmented image, and the indices of those that are no longer in it.

        Without geometry the values are the given ones, to the bit. See `map_objects` for what is clipped and how.
        """
        return map_objects(objects, self.steps, self.min_visible)

    def image(self, image: Image.Image) -> Image.Image:
        """The augmented image; one in which nothing changes is given back as it is.

        Raises:
            DataError: it has not the size that this was drawn for.
        """
        if image.size != self.source_size:
            told, found = ("x".join(str(side) for side in size) for size in (self.source_size, image.size))
            raise DataError(
                f"an image of {found} pixels stands in a record of {told}. Correct the record's width and height; "
                "images that share objects must have the same size."
            )
        image = image.convert("RGB") if image.mode != "RGB" else image
        for step in self.steps:
            image = render(image, step, self.fill)
        return self.coloured(image)

    def coloured(self, image: Image.Image) -> Image.Image:
        """An RGB image of any size after the operations on colours alone."""
        for operation, numbers in self.colours:
            image = operation.apply(image, *numbers)
        return image


@dataclass(frozen=True, kw_only=True)
class Augmenter:
    """Draws augmentations. Applied in training only, that is the caller's part."""

    phases: tuple[Phase, ...]
    enabled: bool = True
    bypass_prob: float = 0.0
    """Share of the records that stay as they are."""
    min_visible: float = 0.3
    """Objects of which less (a share of area or length) would be kept in the frame are dropped."""
    fill: Colour = (128, 128, 128)
    """RGB of what no pixel of the image covers; mid grey is about 0 after the processor's normalisation."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | None, where: str = WHERE) -> "Augmenter":
        """Read the section of a recipe; None, or ``enabled: false``, changes nothing.

        The keys are the fields of `Settings`.

        Args:
            where: key of the section, for messages.

        Raises:
            RecipeError: an operation, a parameter or a value is wrong; one line that says where.
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
        """Decide what happens to a record of this size.

        Args:
            rng: made from (seed, epoch, index) by the caller, so that a record's augmentation depends on nothing else.
            epoch: chooses the phase.
        """
        plain = Drawn((width, height), fill=self.fill, min_visible=self.min_visible)
        if not self.enabled or rng.random() < self.bypass_prob:
            return plain
        steps = _Steps((width, height))
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
        """Names of the operations, of any phase, that move pixels and with them coordinates."""
        names = {kind: name for name, kind in OPERATIONS.items()}
        told = [op for phase in self.phases for op in phase.ops if self.enabled and op.kind != "colour"]
        return list(dict.fromkeys(names[type(op)] for op in told))

    def _operations_of(self, epoch: int) -> tuple[Operation, ...]:
        return next(p.ops for p in self.phases if p.until_epoch is None or epoch < p.until_epoch)


class _Steps:
    """Collects geometry; affine operations that follow each other become one step, one that changes nothing none."""

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
