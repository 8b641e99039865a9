"""Is an image of a question fit for training, and is the record made of the question? The encoder's own questions."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenvl_ft.data.media.images import MediaPolicy, image_size, open_image
from qwenvl_ft.data.media.refused import TooLarge
from qwenvl_ft.errors import DataError

if TYPE_CHECKING:
    from qwenvl_ft.data.conversation import Source

CHECKS = ("decode", "header", "none")
KINDS = {"corrupt": "corrupted_image", "too_large": "too_large_image", "too_thin": "too_thin_image"}
"""Reason of ``check`` -> its name in FLARE's reports."""
UNKNOWN = (1, 2, 2)
"""Stands for the grid of an image that is not opened."""


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
        max_image_pixels: largest stored image, in pixels.
    """

    def __init__(self, how: str, max_image_pixels: int = MediaPolicy.max_image_pixels) -> None:
        from qwenvl_ft.data.encode.encoder import Encoder
        from qwenvl_ft.look.reference import reference_processor

        self.how = how
        self.encoder = Encoder(reference_processor(), policy=MediaPolicy(max_image_pixels=max_image_pixels))
        self.looked: dict[Path, Looked] = {}

    def look(self, paths: Iterable[Path], num_workers: int) -> None:
        """Check many files in threads; Pillow releases the GIL while it decodes."""
        new = list(dict.fromkeys(path for path in paths if path not in self.looked))
        with ThreadPoolExecutor(num_workers) as pool:
            self.looked.update(zip(new, pool.map(self._look, new), strict=True))

    def fault(self, path: Path) -> Looked:
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
            grids = [self.fault(Path(image.value)).grid for image in conversation.media(Image)]
            message = next((text for _, text in text_cases(conversation, MediaPlan(grids), self.encoder)), "")
        except DataError as error:
            message = str(error)
        return message.removeprefix(f"{source}: ")

    def _look(self, path: Path) -> Looked:
        from qwenvl_ft.data.conversation import Image
        from qwenvl_ft.data.media.grids import grid_of_size
        from qwenvl_ft.look.reference import reason_of

        if self.how == "none":
            return Looked()
        try:
            if self.how == "decode":
                width, height = open_image(str(path), self.encoder.policy).size
            else:
                height, width = image_size(str(path), self.encoder.policy)
            return Looked(grid=grid_of_size(Image(str(path)), height, width, self.encoder.processor.image_processor))
        except DataError as error:
            option = " The limit is --max_image_pixels here." if isinstance(error, TooLarge) else ""
            return Looked(KINDS[reason_of(error)], f"{error}{option}")
