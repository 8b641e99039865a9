"""Locates the media among a draft's tokens: how many tokens each placeholder expands to, and which tokens belong
together.

Letters in shapes: D draft tokens.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwenvl_ft.data.conversation import Source
from qwenvl_ft.data.encode.draft import IMAGE_PAD, VIDEO_PAD, VISION_END, VISION_START
from qwenvl_ft.data.media.grids import Grid
from qwenvl_ft.errors import DataError


def not_rendered(source: Source, given: int, kind: str, rendered: int) -> DataError:
    """Return the error for a chat template that renders a different number of media."""
    return DataError(f"{source}: {given} {kind}s, but the chat template renders {rendered}.")


class MediaTokens:
    """Finds placeholders and vision tokens by their ids.

    Args:
        processor: a Qwen2-VL, Qwen2.5-VL or Qwen3-VL processor.
    """

    def __init__(self, processor: Any) -> None:
        token_id = processor.tokenizer.backend_tokenizer.token_to_id
        self.processor = processor
        self.image_id = token_id(IMAGE_PAD)
        self.video_id = token_id(VIDEO_PAD)
        self.start_id = token_id(VISION_START)
        self.end_id = token_id(VISION_END)

    def spread(
        self, ids: NDArray[np.int64], image_grids: list[Grid], video_grids: list[Grid], source: Source
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return how many tokens each draft token expands to, and the number of tokens in one line of its grid.

        Args:
            ids: [D]

        Returns:
            counts int64[D], 1 for text; widths int64[D], 0 for text.

        Raises:
            DataError: the template renders a different number of images or video frames.
        """
        counts = np.ones(ids.size, dtype=np.int64)
        widths = np.zeros(ids.size, dtype=np.int64)
        frames = [(h, w) for t, h, w in video_grids for _ in range(t)]
        merge = {
            self.image_id: self.processor.image_processor.merge_size,
            self.video_id: self.processor.video_processor.merge_size,
        }
        for token, grids, kind in (
            (self.image_id, [(h, w) for _, h, w in image_grids], "image"),
            (self.video_id, frames, "video frame"),
        ):
            places = np.flatnonzero(ids == token)
            if places.size != len(grids):
                raise not_rendered(source, len(grids), kind, places.size)
            if places.size:
                lines, line = (np.asarray(grids, dtype=np.int64) // merge[token]).T
                counts[places], widths[places] = lines * line, line
        return counts, widths

    def groups(
        self, ids: NDArray[np.int64], num_images: int, frame_pairs: list[int], text: str, encoding: Any
    ) -> NDArray[np.int64]:
        """Return the index of the medium that each draft token belongs to.

        A video is one medium: its frame pairs and the times written between them.

        Args:
            ids: [D]
            frame_pairs: number of frame pairs of each video.
            text: the rendered text, and ``encoding`` its tokens.

        Returns:
            int64[D]; -1 for text, images from 0, then videos.
        """
        group = np.full(ids.size, -1, dtype=np.int64)
        if not num_images and not frame_pairs:
            return group
        opens = np.flatnonzero(ids == self.start_id)
        closes = np.flatnonzero(ids == self.end_id)
        is_image = ids[opens + 1] == self.image_id
        for number, (first, last) in enumerate(zip(opens[is_image], closes[is_image], strict=True)):
            group[first : last + 1] = number
        frame_opens, frame_closes = opens[~is_image], closes[~is_image]
        frame = 0
        for number, count in enumerate(frame_pairs):
            char = text.rfind("<", 0, encoding.token_to_chars(int(frame_opens[frame]))[0])
            first = encoding.char_to_token(char)  # where the first frame pair's time begins
            group[first : frame_closes[frame + count - 1] + 1] = num_images + number
            frame += count
        return group
