"""Is an image of a question fit for training, and is the record made of the question? The encoder's own questions."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenvl_ft.data.media.images import MediaPolicy, file_of, image_size, open_image, stored_mode
from qwenvl_ft.data.media.reading import ReadAs, read_as, reading_of
from qwenvl_ft.data.media.refused import TooLarge
from qwenvl_ft.errors import DataError

if TYPE_CHECKING:
    from qwenvl_ft.data.conversation import Source

CHECKS = ("decode", "header", "none")
KINDS = {
    "corrupt": "corrupted_image",
    "high_bit_depth": "high_bit_depth",
    "too_large": "too_large_image",
    "too_thin": "too_thin_image",
}
"""Reason of ``check`` -> its name in FLARE's reports."""
UNKNOWN = (1, 2, 2)
"""Stands for the grid of an image that is not opened."""
Value = Path | ReadAs
"""The file of an image, or the file and how a record says that it is read."""


def image_value(path: Path, record: Any) -> Value:
    """Return a record's image as its keys say that it is read; malformed keys are ignored, reading it reports them."""
    try:
        value: Value = read_as(path, reading_of(record, ""))
    except DataError:
        return path
    return value


@dataclass(frozen=True, slots=True)
class Looked:
    """Result of checking an image."""

    kind: str = ""
    """Value of `KINDS`; empty if nothing is wrong."""
    message: str = ""
    grid: tuple[int, int, int] = UNKNOWN
    """Number of patches along time, height, width."""


class ImageCheck:
    """Checks images and remembers the results, so that each file is checked once.

    Args:
        how: ``decode`` the whole image, read the ``header``, or only check that the file exists (``none``).
        policy: how images are opened.
    """

    def __init__(self, how: str, policy: MediaPolicy | None = None) -> None:
        from qwenvl_ft.data.encode.encoder import Encoder
        from qwenvl_ft.look.reference import reference_processor

        self.how = how
        self.encoder = Encoder(reference_processor(), policy=policy or MediaPolicy())
        self.looked: dict[Value, Looked] = {}

    def look(self, paths: Iterable[Value], num_workers: int) -> None:
        """Check many files in threads; Pillow releases the GIL while it decodes."""
        new = list(dict.fromkeys(path for path in paths if path not in self.looked))
        with ThreadPoolExecutor(num_workers) as pool:
            self.looked.update(zip(new, pool.map(self._look, new), strict=True))

    def fault(self, path: Value) -> Looked:
        """Return what is wrong with an image."""
        if path not in self.looked:
            self.looked[path] = self._look(path)
        return self.looked[path]

    def refusal(self, record: dict[str, Any], source: "Source", folder: Path) -> str:
        """Return why the encoder refuses a record whose images are sound; empty if it does not.

        Args:
            folder: folder to which image paths are relative.
        """
        from qwenvl_ft.data.conversation import Image
        from qwenvl_ft.data.readers import read_record
        from qwenvl_ft.look.reference import MediaPlan, text_cases

        try:
            conversation = read_record(record, source, str(folder))
            paths = [Path(str(file_of(image.value))) for image in conversation.media(Image)]
            grids = [self.fault(image_value(path, record)).grid for path in paths]
            message = next((text for _, text in text_cases(conversation, MediaPlan(grids), self.encoder)), "")
        except DataError as error:
            message = str(error)
        return message.removeprefix(f"{source}: ")

    def is_deep(self, path: Path) -> bool:
        """Return True for an image deeper than 8 bits; False too if only its existence is checked and it is damaged."""
        try:
            return bool(stored_mode(path, self.encoder.policy)[1])
        except DataError:
            return False

    def _look(self, value: Value) -> Looked:
        from qwenvl_ft.data.conversation import Image
        from qwenvl_ft.data.media.grids import grid_of_size
        from qwenvl_ft.look.reference import reason_of

        if self.how == "none":
            return Looked()
        try:
            if self.how == "decode":
                width, height = open_image(value, self.encoder.policy).size
            else:
                height, width = image_size(value, self.encoder.policy)
            return Looked(grid=grid_of_size(Image(value), height, width, self.encoder.processor.image_processor))
        except DataError as error:
            option = " The limit is --max_image_pixels here." if isinstance(error, TooLarge) else ""
            return Looked(KINDS[reason_of(error)], f"{error}{option}")
