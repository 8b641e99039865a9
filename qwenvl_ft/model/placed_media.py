"""Adds the positions of media tokens to a batch, so that the model need not synchronise with the device to find them.

transformers finds image tokens by comparing ids, counts them, and asks the device for the number and positions of each
image's patches: about a dozen synchronisations per training step, in which the CPU cannot run ahead. The dataloader
worker that builds a batch knows all of it. A batch without these tensors takes transformers' own path; how the model
uses them is in upstream/media.py.

Letters: T tokens of the row, P patches, V tokens of media.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qwenvl_ft.model.packed_attention import TEXT_NAME
from qwenvl_ft.upstream.attention import attention_of
from qwenvl_ft.upstream.media import KINDS, place_media, placing_model
from qwenvl_ft.upstream.vision_tables import TABLES, vision_tables

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class MediaPlaces:
    """Computes from a batch's ids and grids what a model would otherwise compute; for a `QwenVLCollator`.

    A call returns, for ``image`` and likewise for ``video``:
        ``image_places`` int64[V], indices of its tokens in the row; and, if the vision tower accepts them,
        ``image_position_ids`` int64[P, 2], ``image_interp_indices`` int64[P, 4] and ``image_interp_weights``
        float32[P, 4].
    """

    token_ids: tuple[int, int]
    """Ids of the image token and of the video token."""
    tables: Callable[[int, int], tuple[Tensor, Tensor, Tensor]] | None
    """(height, width) of a frame, in patches -> its tables; None if the vision tower computes them itself."""

    @classmethod
    def of(cls, model: nn.Module) -> MediaPlaces | None:
        """Return an instance for a model that `use_media_places` prepared, inside any wrappers; None for others."""
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
    """Let each Qwen3-VL in ``model``, dense or MoE, accept batches with `MediaPlaces`, and return their number."""
    return place_media(model, _borders_suffice)


def _borders_suffice(text_config: PreTrainedConfig) -> bool:
    """Return True if the text model's attention isolates samples by ``cu_seq_lens_q`` alone."""
    name = attention_of(text_config)
    return name == TEXT_NAME or name.startswith("flash")
