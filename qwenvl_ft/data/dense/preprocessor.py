"""One record at a time: its images and its objects augmented together, for those who write augmented data themselves.

Training augments on its own, from the recipe; this is the same without a recipe.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.random import Generator

from qwenvl_ft.data.augment.pipeline import Augmenter
from qwenvl_ft.data.conversation import Source
from qwenvl_ft.data.dense.compose import DenseImage, seen
from qwenvl_ft.data.dense.dense_record import read_dense_record
from qwenvl_ft.data.media.images import MediaPolicy


class AugmentationPreprocessor:
    """Dense-caption record -> the same record augmented, as one: images, objects, width, height, summary.

    Args:
        augmenter: what happens, as `Augmenter.from_config` reads it.
        rng: where the random numbers come from.
        media_root: folder that relative images start at.

    Example:
        ::

            augmenter = Augmenter.from_config({"ops": [{"hflip": {"prob": 1}}]})
            augment = AugmentationPreprocessor(augmenter, np.random.default_rng(0), media_root="images")
            changed = augment({"images": ["a.png"], "width": 640, "height": 480, "objects": [...]})
    """

    def __init__(
        self,
        augmenter: Augmenter,
        rng: Generator,
        *,
        media_root: str | Path | None = None,
        policy: MediaPolicy | None = None,
    ) -> None:
        self.augmenter = augmenter
        self.rng = rng
        self.media_root = media_root
        self.policy = policy or MediaPolicy()

    def __call__(self, record: Mapping[str, Any], *, epoch: int = 0) -> dict[str, Any]:
        """A new record with PIL images; the given one stays as it is. Keys of no meaning here are kept.

        Args:
            epoch: chooses the augmentation's phase.

        Raises:
            DataError: the record is malformed, or an image is not there or of another size than stated.
        """
        checked = read_dense_record(record, Source("record", str(record.get("id", "record"))), self.media_root)
        told = seen(checked, self.augmenter.draw(*checked.size, self.rng, epoch))
        width, height = told.size
        images = [DenseImage(image, checked.size, told.drawn, self.policy).open() for image in checked.images]
        changed = {
            "images": images,
            "objects": [dict(entry) for entry in told.objects],
            "width": width,
            "height": height,
        }
        return {**record, **changed} | ({"summary": told.summary} if told.summary else {})
