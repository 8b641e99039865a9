"""Media put into their places without waiting for the device.

transformers finds the tokens of images by comparing ids, counts them, and asks the device how many patches and which
positions each image has: a dozen waits in a training step, in which the processor cannot run ahead. The worker that
makes a batch knows all of it. A batch without what `MediaPlaces` adds goes transformers' way.

Letters: T tokens of the row, P patches, V tokens of media, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from qwenvl_ft.model.packed_attention import TEXT_NAME

KINDS = {"image": "pixel_values", "video": "pixel_values_videos"}


@dataclass(frozen=True)
class MediaPlaces:
    """What the towers of a model would compute from a batch's ids and grids; for a `QwenVLCollator`.

    Returns (of a call), for ``image`` and ``video``:
        ``image_places`` int64[V], its tokens in the row; ``image_position_ids`` int64[P, 2], ``image_interp_indices``
        int64[P, 4] and ``image_interp_weights`` float32[P, 4], as transformers' vision tower takes them.
    """

    token_ids: tuple[int, int]
    """Of an image's and of a video's tokens."""
    merge: int
    """Patches on a side of a token's square."""
    side: int
    """Rows of the learned position table."""

    @classmethod
    def of(cls, model: nn.Module) -> MediaPlaces | None:
        """Those of a model that `use_media_places` changed, looked for inside wrappers; None for any other."""
        inner: Any = next((module for module in model.modules() if _is_changed(module)), None)
        if inner is None:
            return None
        ids = inner.config.image_token_id, inner.config.video_token_id
        return cls(ids, inner.visual.spatial_merge_size, inner.visual.num_grid_per_side)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        told: dict[str, Tensor] = {}
        for kind, token in zip(KINDS, self.token_ids, strict=True):
            if f"{kind}_grid_thw" not in batch:
                continue
            tables = [(t, *_frame(h, w, self.merge, self.side)) for t, h, w in batch[f"{kind}_grid_thw"].tolist()]
            for column, name in enumerate(("position_ids", "interp_indices", "interp_weights"), 1):
                told[f"{kind}_{name}"] = torch.cat([table[column] for table in tables for _ in range(table[0])])
            told[f"{kind}_places"] = (batch["input_ids"][0] == token).nonzero(as_tuple=True)[0]
        return told


@lru_cache(maxsize=256)
def _frame(height: int, width: int, merge: int, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """What transformers computes of one frame of ``height * width`` patches."""
    from transformers import vision_utils

    grid = torch.tensor([[1, height, width]])
    positions = vision_utils.get_vision_position_ids(grid, merge)
    indices, weights = vision_utils.get_vision_interpolation_indices_and_weights(
        grid, side, mode="bilinear", align_corners=True, spatial_merge_size=merge
    )
    return positions, indices, weights


def use_media_places(model: nn.Module) -> int:
    """Let each Qwen3-VL in ``model``, dense or MoE, take batches with `MediaPlaces`; returns how many there are.

    Not one that is spread over devices: there accelerate stands before its forward.
    """
    found = 0
    for module in model.modules():
        inner: Any = module
        text: Any = getattr(inner, "language_model", None)
        visual: Any = getattr(inner, "visual", None)
        if "forward" in vars(inner) or not hasattr(text, "_deepstack_process") or not _interpolates_as_known(visual):
            continue
        inner.forward = _PlacedForward(inner)
        text._deepstack_process = _AddAtPlaces(text._deepstack_process)
        found += 1
    return found


def _is_changed(module: nn.Module) -> bool:
    return isinstance(vars(module).get("forward"), _PlacedForward)


def _interpolates_as_known(visual: Any) -> bool:
    told = getattr(visual, "interpolation_mode", ""), getattr(visual, "interpolation_align_corners", None)
    return told == ("bilinear", True)


class _PlacedForward:
    """``Qwen3VLModel.forward`` of a row whose places are known; the class's own of anything else.

    An object, because a method that is put onto an instance cannot be pickled.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, input_ids: Tensor | None = None, **given: Any) -> Any:
        kinds = [kind for kind in KINDS if f"{kind}_places" in given]
        if not kinds:
            return type(self.model).forward(self.model, input_ids=input_ids, **given)
        return _placed(self.model, input_ids, given, kinds)


def _placed(model: Any, input_ids: Tensor | None, given: dict[str, Any], kinds: list[str]) -> Any:
    embeds = model.get_input_embeddings()(input_ids)  # [1, T, D]
    media = [_seen(model, kind, given) for kind in kinds]
    own = [name for name in given if name.startswith(tuple(f"{kind}_" for kind in KINDS))]
    rest = {name: value for name, value in given.items() if name not in (*own, *KINDS.values())}
    for name in ("mm_token_type_ids", "mm_encoder_outputs"):
        rest.pop(name, None)
    attention = model.config.get_text_config()._attn_implementation
    if "cu_seq_lens_q" in rest and (attention == TEXT_NAME or attention.startswith("flash")):
        rest["position_ids"] = rest["position_ids"][-3:]  # with the text's, transformers looks for borders, and waits
    places = torch.cat([given[f"{kind}_places"] for kind in kinds])
    merged, *deep = (torch.cat(features).to(embeds.dtype) for features in zip(*media, strict=True))
    return model.language_model(
        **(rest | {"input_ids": None, "inputs_embeds": embeds.index_copy(1, places.to(embeds.device), merged[None])}),
        visual_pos_masks=places,
        deepstack_visual_embeds=deep,
    )


def _seen(model: Any, kind: str, given: dict[str, Any]) -> list[Tensor]:
    """Features of a kind's media: those that take the tokens' places, and those that are added to deeper layers."""
    grid = given[f"{kind}_grid_thw"]
    known = ("position_ids", "interp_indices", "interp_weights", "cu_seqlens", "max_seqlen")
    told = {name: given[f"{kind}_{name}"] for name in known if f"{kind}_{name}" in given}
    pixels = given[KINDS[kind]].type(model.visual.dtype)
    seen = model.visual(pixels, grid_thw=grid, return_dict=True, **told)
    return [seen.pooler_output, *seen.deepstack_features]


class _AddAtPlaces:
    """``_deepstack_process`` of a text model that takes places, int64[V], where it takes a mask."""

    def __init__(self, original: Any) -> None:
        self.original = original

    def __call__(self, hidden: Tensor, places: Tensor, features: Tensor) -> Tensor:
        if places.dtype == torch.bool:
            return self.original(hidden, places, features)
        places, features = places.to(hidden.device), features.to(hidden.device, hidden.dtype)
        return hidden.index_copy(1, places, hidden.index_select(1, places) + features[None])
