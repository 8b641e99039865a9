"""upstream/image_positions.py: a transformers that moves images in time is refused where such a model is loaded."""

import pytest
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.model.load import load_model
from qwenvl_ft.upstream import image_positions


@pytest.fixture
def asked_anew():
    image_positions._moved.cache_clear()
    yield
    image_positions._moved.cache_clear()


def test_a_transformers_that_moves_images_in_time_is_refused(checkpoints, monkeypatch, asked_anew):
    """As transformers 5.5 does: the start is multiplied too."""
    plain = Qwen2_5_VLModel.get_vision_position_ids

    def moved(self, start_position, *args, time_interval=1, **kwargs):
        positions = plain(self, start_position, *args, time_interval=time_interval, **kwargs)
        positions[0] = start_position * time_interval
        return positions

    monkeypatch.setattr(Qwen2_5_VLModel, "get_vision_position_ids", moved)
    with pytest.raises(RecipeError, match=r"a Qwen2.5-VL model: .* puts images at other positions in time"):
        load_model(checkpoints["qwen2_5_vl"], torch_dtype="float32")
    load_model(checkpoints["qwen2_vl"], torch_dtype="float32")


@pytest.mark.parametrize("change", ["gone", "other arguments"])
def test_a_release_that_cannot_be_asked_is_refused(checkpoints, monkeypatch, asked_anew, change):
    if change == "gone":
        monkeypatch.delattr(Qwen2_5_VLModel, "get_vision_position_ids")
    else:
        monkeypatch.setattr(Qwen2_5_VLModel, "get_vision_position_ids", lambda self, grid: grid)
    with pytest.raises(RecipeError, match=r"does not work with transformers .* has (no|another) .*get_vision_position"):
        load_model(checkpoints["qwen2_5_vl"], torch_dtype="float32")
