"""Augment single dense-caption records, images and objects together, to write an augmented data set yourself.

Training needs none of this: it augments as the recipe says.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.random import Generator

from qwenvl_ft.data.augment.pipeline import Augmenter
from qwenvl_ft.data.conversation import Source
from qwenvl_ft.data.dense.compose import DenseImage, augment_record
from qwenvl_ft.data.dense.dense_record import read_dense_record
from qwenvl_ft.data.media.images import MediaPolicy


class AugmentationPreprocessor:
    """Callable that augments a dense-caption record: its images, objects, width, height and summary.

    Args:
        augmenter: from `Augmenter.from_config`.
        rng: source of random numbers.
        media_root: folder that relative image paths start at.
        policy: limits on opening images.

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
        """Return a new record with PIL images; all other keys are kept, and the argument is not changed.

        Args:
            epoch: selects the phase of the augmentation.

        Raises:
            DataError: the record is malformed, or an image is missing or has another size than stated.
        """
        checked = read_dense_record(record, Source("record", str(record.get("id", "record"))), self.media_root)
        augmented = augment_record(checked, self.augmenter.draw(*checked.size, self.rng, epoch))
        width, height = augmented.size
        images = [DenseImage(image, checked.size, augmented.drawn, self.policy).open() for image in checked.images]
        changed = {
            "images": images,
            "objects": [dict(entry) for entry in augmented.objects],
            "width": width,
            "height": height,
        }
        return {**record, **changed} | ({"summary": augmented.summary} if augmented.summary else {})
