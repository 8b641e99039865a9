"""Samples equal the official outputs and hand-made expectations."""

import json

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional
from cases import SHARED, picture
from label_cases import spans
from qwen_vl_utils.vision_process import fetch_image
from torchvision.transforms import InterpolationMode

from qwenvl_ft.data.encode.draft import TooLong, Unsupervised
from qwenvl_ft.data.encode.encoder import Encoder
from qwenvl_ft.errors import RecipeError
from qwenvl_ft.model.load import load_processor

CASES = SHARED / "parity" / "expected.json"


@pytest.fixture(scope="module")
def real_processors():
    """Return the released processor for (min_pixels, max_pixels)."""
    if not CASES.exists():
        pytest.skip("the official cases are missing: set QWENVL_FT_SHARED")
    processors = {}

    def get(low, high):
        if (low, high) not in processors:
            processors[low, high] = load_processor(str(SHARED / "qwen3vl_processor"), min_pixels=low, max_pixels=high)
        return processors[low, high]

    return get


@pytest.mark.parametrize("index", range(16))
def test_official_cases_are_reproduced(real_processors, index):
    case = json.loads(CASES.read_text())[index]
    encoder = Encoder(real_processors(case["min_pixels"], case["max_pixels"]))
    root = str(SHARED / "parity" / "images")
    sample = encoder(case["record"], root)
    assert sample["input_ids"].tolist() == case["input_ids"]
    assert spans(sample["labels"]) == case["label_spans"]
    assert sample["position_ids"].tolist() == case["position_ids"]
    assert sample["image_grid_thw"].tolist() == case["image_grid_thw"]
    assert list(sample["pixel_values"].shape) == case["pixel_values_shape"]
    step = max(1, len(sample["pixel_values"]) // 16)  # the cases keep about sixteen rows
    means = sample["pixel_values"].float().mean(dim=1).numpy()[::step]
    np.testing.assert_allclose(means, case["pixel_values_row_mean"], atol=1e-3)
    assert encoder.length(case["record"], root) == len(case["input_ids"])


def test_video_text_has_the_form_of_the_released_models(encoder, processor, mixed_records):
    """A time before each frame pair and no outer pair of vision tokens; five frames at 2 per second are three pairs."""
    sample = encoder(mixed_records[3])
    text = processor.tokenizer.decode(sample["input_ids"].tolist()).replace("<|video_pad|>", "")
    frame = "<|vision_start|><|vision_end|>"
    assert text.startswith(f"<|im_start|>user\n<0.2 seconds>{frame}<1.2 seconds>{frame}<2.0 seconds>{frame}What moves?")


def test_video_tokens_equal_the_processor_without_its_outer_borders(processor, encoder, mixed_records):
    """The reference is the installed processor's own text, without its outer pair of vision tokens."""
    frames = mixed_records[3]["video"][0]
    video = torch.stack([torch.from_numpy(np.array(frame)).permute(2, 0, 1) for frame in frames])
    from transformers.video_utils import VideoMetadata

    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What moves?"}]}]
    text = processor.apply_chat_template(messages, tokenize=False)
    out = processor(
        text=[text],
        videos=[video],
        video_metadata=[VideoMetadata(total_num_frames=5, fps=2.0, frames_indices=list(range(5)))],
        do_sample_frames=False,
        return_tensors="pt",
    )
    sample = encoder(mixed_records[3])
    ids = out["input_ids"][0].tolist()
    start, end = processor.vision_start_token_id, processor.vision_end_token_id
    outer = ids.index(start)
    last = len(ids) - 1 - ids[::-1].index(end)
    if ids[outer + 1] != processor.video_token_id:  # transformers 5.9 and older write no outer pair
        ids = ids[:outer] + ids[outer + 1 : last] + ids[last + 1 :]
    assert sample["input_ids"][: len(ids)].tolist() == ids
    torch.testing.assert_close(sample["pixel_values_videos"], out["pixel_values_videos"])
    assert sample["video_grid_thw"].tolist() == out["video_grid_thw"].tolist()


def test_prompt_is_the_sample_up_to_the_answer(encoder, mixed_records):
    sample, prompt = encoder(mixed_records[2]), encoder.prompt(mixed_records[2])
    begin = spans(sample["labels"])[-1][0]
    assert prompt["input_ids"].tolist() == sample["input_ids"][:begin].tolist()
    assert (prompt["labels"] == -100).all()
    torch.testing.assert_close(prompt["pixel_values"], sample["pixel_values"])


def test_too_long_is_an_error_that_says_what_to_do(processor, mixed_records):
    for strategy in ("raise", "delete"):
        with pytest.raises(
            TooLong, match=r"tokens, .*template\.max_length is 20\. Raise it, lower template\.max_pixels"
        ):
            Encoder(processor, max_length=20, truncation_strategy=strategy)(mixed_records[0])


@pytest.mark.parametrize("strategy", ["left", "right"])
def test_cutting_never_goes_through_a_medium(processor, encoder, mixed_records, strategy):
    """For every length limit: at most max_length tokens, whole media, and the kept tokens are unchanged."""
    whole = encoder(mixed_records[2])
    ids = whole["input_ids"].tolist()
    pad, merge = processor.image_token_id, processor.image_processor.merge_size**2
    seen = set()
    for limit in range(1, len(ids)):
        try:
            sample = Encoder(processor, max_length=limit, truncation_strategy=strategy)(mixed_records[2])
        except Unsupervised:
            seen.add("unsupervised")
            continue
        cut = sample["input_ids"].tolist()
        assert len(cut) <= limit
        assert cut == (ids[: len(cut)] if strategy == "right" else ids[-len(cut) :])
        grids = sample["image_grid_thw"] if "image_grid_thw" in sample else torch.zeros(0, 3, dtype=torch.long)
        assert cut.count(pad) == int(grids.prod(dim=1).sum()) // merge
        assert cut.count(processor.vision_start_token_id) == cut.count(processor.vision_end_token_id) == len(grids)
        seen.add(len(grids))
    assert len(seen) >= 2, "vacuous: no cut fell among the media"


@pytest.mark.parametrize("strategy", ["left", "right"])
def test_a_video_is_kept_whole_or_not_at_all(processor, encoder, mixed_records, strategy):
    length = encoder.length(mixed_records[4])
    for limit in range(1, length):
        try:
            sample = Encoder(processor, max_length=limit, truncation_strategy=strategy)(mixed_records[4])
        except Unsupervised:
            continue
        frames = int((sample["input_ids"] == processor.vision_start_token_id).sum())
        images = len(sample["image_grid_thw"]) if "image_grid_thw" in sample else 0
        assert frames - images in (0, 2)


def test_an_unknown_strategy_is_an_error(processor):
    with pytest.raises(RecipeError, match=r"unknown template\.truncation_strategy 'rigth'\. Did you mean 'right'\?"):
        Encoder(processor, truncation_strategy="rigth")


def test_the_default_system_prompt_does_not_replace_the_records_own(processor, mixed_records):
    encoder = Encoder(processor, system_prompt="You see.")
    decode = lambda record: processor.tokenizer.decode(encoder(record)["input_ids"].tolist())  # noqa: E731
    assert decode(mixed_records[0]).startswith("<|im_start|>system\nYou see.<|im_end|>\n<|im_start|>user\n")
    assert decode(mixed_records[4]).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")


@pytest.mark.parametrize(("low", "high"), [(784, 50_176), (392, 25_088), (1568, 100_352), (1, 1), (65_536, 65_536)])
def test_any_pixel_budget_gives_whole_patches(tiny_dir, low, high):
    """Also a budget below a single merged patch of 32 x 32."""
    processor = load_processor(str(tiny_dir), min_pixels=low, max_pixels=high)
    record = {
        "image": [picture(130, 70)],
        "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}],
    }
    sample = Encoder(processor)(record)
    assert len(sample["input_ids"]) == Encoder(processor).length(record)
    assert sample["pixel_values"].shape[0] == int(sample["image_grid_thw"].prod())


def shown(image, **limits):
    part = {"type": "image", "image": image} | limits
    question = {"role": "user", "content": [part, {"type": "text", "text": "what"}]}
    return {"messages": [question, {"role": "assistant", "content": "x"}]}


SHOWN = [
    {"max_pixels": 4096},
    {"min_pixels": 40_000},
    {"min_pixels": 20_000, "max_pixels": 20_000},
    {"max_pixels": 1},
    {"min_pixels": 784, "max_pixels": 784},
    {"resized_height": 100, "resized_width": 40},
    {"resized_height": 8, "resized_width": 8},
]


@pytest.mark.parametrize("limits", SHOWN)
@pytest.mark.parametrize("raw", [False, True])
def test_one_image_is_shown_as_its_part_says(processor, limits, raw):
    """Sizes equal those of qwen-vl-utils (where it does not crash), pixels those of the processor at that size."""
    image = picture(130, 70)
    sample = Encoder(processor, raw_pixels=raw)(shown(image, **limits))
    part = processor.image_processor
    side = part.patch_size
    height, width = (int(n) * side for n in sample["image_grid_thw"][0, 1:])
    if limits.get("max_pixels", 9999) > 1024:
        lone = {"image": image} | {"min_pixels": part.size["shortest_edge"], "max_pixels": part.size["longest_edge"]}
        assert fetch_image(lone | limits, image_patch_size=side).size == (width, height)
    assert Encoder(processor).length(shown(image, **limits)) == len(sample["input_ids"])
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    pixels = torchvision.transforms.v2.functional.resize(pixels, [height, width], InterpolationMode.BICUBIC)
    expected = part(images=[pixels], do_resize=False, return_tensors="pt")["pixel_values"]
    if raw:
        half = expected.reshape(len(expected), 3, 2, -1)[:, :, 0].flatten(1)
        mean, std = part.image_mean[0], part.image_std[0]
        torch.testing.assert_close((sample["pixel_values"] / 255 - mean) / std, half)
    else:
        assert torch.equal(sample["pixel_values"], expected)
    assert (height, width) != tuple(int(n) * side for n in Encoder(processor)(shown(image))["image_grid_thw"][0, 1:])


def test_limits_of_one_image_leave_the_others_alone(encoder):
    plain, small = picture(130, 70), picture(200, 90, 1)
    first, second = encoder(shown(plain)), encoder(shown(small, max_pixels=4096))
    content = [{"image": plain}, {"image": small, "max_pixels": 4096}, {"image": plain}, {"text": "what"}]
    both = encoder({"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "x"}]})
    expected = torch.cat([first["pixel_values"], second["pixel_values"], first["pixel_values"]])
    assert torch.equal(both["pixel_values"], expected)
