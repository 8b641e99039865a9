"""Refuses Qwen2.5-VL with a transformers that places its images elsewhere than training does.

Samples have positions of this package's own (data/encode/rope.py): an image has one position in time, that of its first
token. transformers 5.5 multiplies this position by the rate of videos (``tokens_per_second``) when it generates, so a
model would answer at other positions than it was trained at. 4.57 and 5.6 to 5.24 compute as training does.

Relies on ``Qwen2_5_VLModel.get_vision_position_ids``, a public method that reads nothing of the model, 5.5 to 5.24.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from qwenvl_ft.upstream.probe import Feature, lacks

MOVED = ("qwen2_5_vl",)
"""Model types whose images some version of transformers moves in time."""


def require_image_positions(model_type: str) -> None:
    """Raise RecipeError in one line if the installed transformers moves the images of a family in time."""
    if model_type in MOVED:
        IMAGES.require("model.model=a Qwen2.5-VL model")


@cache
def _moved() -> str:
    module = "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl"
    if missing := lacks(module, ("Qwen2_5_VLModel",)):
        return missing
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

    if missing := lacks(Qwen2_5_VLModel, ("get_vision_position_ids",)):
        return missing
    start, grid, no_model = 3, torch.tensor([1, 4, 4]), None
    model_class: Any = Qwen2_5_VLModel
    try:
        time = model_class.get_vision_position_ids(no_model, start, grid, 1, 2, time_interval=2)[0]
    except (TypeError, ValueError, AttributeError) as error:
        return f"has another get_vision_position_ids ({error})"
    return "" if time.tolist() == [start] * 4 else "puts images at other positions in time than training does"


IMAGES = Feature(name="the position of an image", missing=_moved)
