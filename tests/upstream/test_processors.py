"""upstream/processors.py: sizes planned from headers are those of the installed processors."""

import random

import numpy as np
import pytest
import torch
from cases import picture
from transformers import Qwen3VLVideoProcessor
from transformers.image_utils import pil_torch_interpolation_mapping

from qwenvl_ft.data.encode.encoder import Encoder
from qwenvl_ft.errors import RecipeError
from qwenvl_ft.model.load import load_processor
from qwenvl_ft.upstream import processors
from qwenvl_ft.upstream.processors import CAP, IMAGE_RULE, RESIZING, VIDEO_RULE

SIZES = [(17, 40), (64, 64), (480, 641), (1200, 90), (90, 1200), (33, 1000)]


@pytest.fixture
def without_rules(monkeypatch):
    """A made-up later transformers whose resizing functions have moved."""
    processors._rule.cache_clear()
    monkeypatch.setattr(processors, "import_module", lambda _: (_ for _ in ()).throw(ImportError()))
    RESIZING.missing.cache_clear()
    yield
    monkeypatch.undo()
    processors._rule.cache_clear()
    RESIZING.missing.cache_clear()


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_an_image_becomes_as_large_as_the_processor_makes_it(processor, height, width):
    part = processor.image_processor
    made = part(images=[picture(width, height)], return_tensors="pt")["image_grid_thw"][0].tolist()
    areas = {"min_pixels": part.size["shortest_edge"], "max_pixels": part.size["longest_edge"]}
    size = processors.image_size(height, width, factor=part.patch_size * part.merge_size, **areas)
    assert [1, size[0] // part.patch_size, size[1] // part.patch_size] == made


@pytest.mark.parametrize("frames", [2, 5, 8])
@pytest.mark.parametrize(("height", "width"), SIZES[1:4])
def test_a_video_becomes_as_large_as_the_processor_makes_it(processor, frames, height, width):
    part = processor.video_processor
    film = torch.from_numpy(np.stack([np.array(picture(width, height))] * frames)).permute(0, 3, 1, 2)
    out = part(videos=[film], do_sample_frames=False, return_tensors="pt")
    size = processors.video_size(
        frames,
        height,
        width,
        temporal_factor=part.temporal_patch_size,
        factor=part.patch_size * part.merge_size,
        min_pixels=part.size["shortest_edge"],
        max_pixels=processors.most_of_video(part, frames),
    )
    assert out["video_grid_thw"][0, 1:].tolist() == [size[0] // part.patch_size, size[1] // part.patch_size]


def test_the_copied_rules_are_those_of_5_24():
    rule, film_rule = processors._rule(IMAGE_RULE), processors._rule(VIDEO_RULE)
    draw = random.Random(0)
    if answer(film_rule, 5, 64, 64, 2, 32, 1, 64 * 64 * 4) != (64, 64):
        pytest.skip("this transformers counts an odd number of frames as one more, as up to 5.12")
    for _ in range(500):
        size = draw.randint(8, 2000), draw.randint(8, 2000)
        areas = 32, draw.randint(1, 100) * 1024, draw.randint(100, 1000) * 1024
        frames = draw.randint(1, 20)
        assert answer(rule, *size, *areas) == answer(processors._image_rule, *size, *areas)
        assert answer(film_rule, frames, *size, 2, *areas) == answer(processors._video_rule, frames, *size, 2, *areas)


def answer(rule, *given):
    try:
        return rule(*given)
    except ValueError as error:
        return str(error)


def test_moved_rules_are_replaced_where_the_processor_counts_alike(processor, without_rules):
    assert "a copy of transformers 5.24's rule is used" in RESIZING.line()
    if not hasattr(processor.video_processor, "get_num_of_video_patches"):  # 5.15 and older count no patches
        with pytest.raises(RecipeError, match=r"Qwen3VLVideoProcessor of transformers .* makes None patches"):
            Encoder(processor)
        return
    record = {"image": [picture(200, 90)], "conversations": [{"from": "human", "value": "<image>"}, ANSWER]}
    sample = Encoder(processor)(record)
    processors._rule.cache_clear()
    part = processor.image_processor
    made = part(images=[picture(200, 90)], return_tensors="pt")
    assert sample["image_grid_thw"].tolist() == made["image_grid_thw"].tolist()


ANSWER = {"from": "gpt", "value": "It."}


def test_another_rule_is_refused_in_one_line(processor, without_rules, monkeypatch):
    counts = lambda self, height, width, images_kwargs=None: 7  # noqa: E731
    monkeypatch.setattr(type(processor.image_processor), "get_number_of_image_patches", counts)
    with pytest.raises(
        RecipeError, match=r"makes 7 patches of 40 x 17 pixels, but \d+ are expected. Install a version"
    ):
        Encoder(processor)


def test_pillow_and_torchvision_name_resizing_as_transformers_pairs_them(processor):
    assert dict(pil_torch_interpolation_mapping) == processors.INTERPOLATIONS
    assert processors.interpolation(processor.image_processor).name == "BICUBIC"


def test_the_backend_of_an_image_processor_is_public(processor):
    from transformers import Qwen2VLImageProcessorPil

    assert processors.is_torchvision(processor.image_processor)
    assert not processors.is_torchvision(Qwen2VLImageProcessorPil())


def test_a_cap_that_is_always_on_needs_no_switch(tiny_dir, monkeypatch):
    """As announced, the cap is always on and its switch is gone."""
    part = load_processor(tiny_dir).video_processor
    part.max_video_tokens = 4
    for name in ("cap_pixels_per_frame",):
        monkeypatch.delattr(Qwen3VLVideoProcessor, name, raising=False)
        vars(part).pop(name, None)
    per_frame = (part.patch_size * part.merge_size) ** 2 * 4
    least = int(part.size["shortest_edge"] * 1.05)
    assert processors.most_of_video(part, 6) == max(min(per_frame, part.size["longest_edge"] // 6), least) * 6


def test_a_version_without_a_cap_refuses_one_and_shows_the_rest(tiny_dir, monkeypatch):
    """As in transformers 5.15 and older."""
    part = load_processor(tiny_dir).video_processor
    for name in ("cap_pixels_per_frame", "max_video_tokens"):
        monkeypatch.delattr(Qwen3VLVideoProcessor, name, raising=False)
        vars(part).pop(name, None)
    assert processors.most_of_video(part, 6) == part.size["longest_edge"]
    processors._no_cap.cache_clear()
    with pytest.raises(RecipeError, match=r"^template.video_frame_max_pixels: .*max_video_tokens"):
        processors.set_frame_cap(part, 4)
    monkeypatch.undo()
    processors._no_cap.cache_clear()
    assert CAP.missing() == "" or not hasattr(Qwen3VLVideoProcessor, "max_video_tokens")
