"""Media put into their places without waiting for the device.

transformers finds the tokens of images by comparing ids, counts them, and asks the device how many patches and which
positions each image has: a dozen waits in a training step, in which the processor cannot run ahead. The worker that
makes a batch knows all of it. A batch without what `MediaPlaces` adds goes transformers' way; how the model takes it is
upstream/media.py.

Letters: T tokens of the row, P patches, V tokens of media.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qwenvl_ft.model.packed_attention import TEXT_NAME
from qwenvl_ft.upstream.attention import attention_of
from qwenvl_ft.upstream.media import KINDS, TABLES, place_media, placing_model, vision_tables


@dataclass(frozen=True)
class MediaPlaces:
    """What the towers of a model would compute from a batch's ids and grids; for a `QwenVLCollator`.

    Returns (of a call), for ``image`` and ``video``:
        ``image_places`` int64[V], its tokens in the row; and, where the vision tower takes them,
        ``image_position_ids`` int64[P, 2], ``image_interp_indices`` int64[P, 4] and ``image_interp_weights``
        float32[P, 4].
    """

    token_ids: tuple[int, int]
    """Of an image's and of a video's tokens."""
    tables: Callable[[int, int], tuple[Tensor, Tensor, Tensor]] | None
    """Height and width of a frame, in patches -> its tables; None where the vision tower computes them itself."""

    @classmethod
    def of(cls, model: nn.Module) -> MediaPlaces | None:
        """Those of a model that `use_media_places` prepared, looked for inside wrappers; None for any other."""
        inner = placing_model(model)
        if inner is None:
            return None
        ids = inner.config.image_token_id, inner.config.video_token_id
        return cls(ids, vision_tables(inner.visual))

    def __call__(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for kind, token in zip(KINDS, self.token_ids, strict=True):
            if f"{kind}_grid_thw" not in batch:
                continue
            if self.tables is not None:
                frames = [(t, self.tables(h, w)) for t, h, w in batch[f"{kind}_grid_thw"].tolist()]
                for column, name in enumerate(TABLES[:3]):
                    found[f"{kind}_{name}"] = torch.cat([table[column] for t, table in frames for _ in range(t)])
            found[f"{kind}_places"] = (batch["input_ids"][0] == token).nonzero(as_tuple=True)[0]
        return found


def use_media_places(model: nn.Module) -> int:
    """Let each Qwen3-VL in ``model``, dense or MoE, take batches with `MediaPlaces`; returns how many there are."""
    return place_media(model, _borders_suffice)


def _borders_suffice(text_config: Any) -> bool:
    """Whether the text model's attention isolates samples by ``cu_seq_lens_q`` alone."""
    name = attention_of(text_config)
    return name == TEXT_NAME or name.startswith("flash")
