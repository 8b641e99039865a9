"""Qwen2-VL and Qwen2.5-VL under the contract: samples, packed rows, attention windows, and what is refused."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from cases import OLDER_KINDS, picture
from label_cases import spans
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.video_utils import VideoMetadata

from qwenvl_ft.data.collate import QwenVLCollator
from qwenvl_ft.data.conversation import Source
from qwenvl_ft.data.encode.encoder import Encoder
from qwenvl_ft.errors import CheckpointError, DataError, RecipeError
from qwenvl_ft.model.load import load_model, load_processor
from qwenvl_ft.model.patch_embed import use_raw_patches
from qwenvl_ft.model.placed_media import MediaPlaces
from qwenvl_ft.model.sequence_parallel import require_model
from qwenvl_ft.model.tiny import make_tiny
from qwenvl_ft.training.loss import loss_sum, split_labels

SIZES = (250, 130), (64, 64), (120, 250), (28, 56), (230, 230)
"""Images of one row, (width, height): 1 to 81 tokens, of which Qwen2.5-VL has up to 9 windows of 4 x 4."""


@pytest.fixture(scope="module", params=OLDER_KINDS)
def kind(request):
    return request.param


def encoder_of(folder, **options):
    return Encoder(load_processor(str(folder)), **options)


@pytest.fixture(scope="module")
def encoder(checkpoints, kind):
    return encoder_of(checkpoints[kind])


def turns(question, answer="It is a blur.\nNo more."):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def records():
    """Return records with one image of each of `SIZES`, with all of them, and without any."""
    images = [picture(*size, seed) for seed, size in enumerate(SIZES)]
    single = [{"image": [image], "conversations": turns("<image>\nWhat?")} for image in images]
    several = {"image": images, "conversations": turns("<image> " * len(images) + "Same?", "No.") + turns("Why?")}
    system = {"from": "system", "value": "Be brief."}
    return [*single[:2], {"conversations": [system, *turns("Say hello.")]}, several, *single[2:]]


def of_processor(processor, record):
    """Return what the processor makes of a record's whole conversation."""
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    messages = []
    for turn in record["conversations"]:
        parts = [part.strip() for part in re.split("(<image>)", turn["value"])]
        content = [{"type": "image"} if part == "<image>" else {"type": "text", "text": part} for part in parts if part]
        messages.append({"role": roles[turn["from"]], "content": content})
    text = processor.apply_chat_template(messages, tokenize=False)
    return processor(text=[text], images=record.get("image"), return_tensors="pt")


def inputs(batch):
    return {key: value for key, value in batch.items() if key not in ("labels", "sources")}


def video_sample(processor, model, seed):
    """Return a sample with a video, made by the processor, with the positions that the model gives it."""
    frames = np.stack([np.array(picture(140, 84, seed + n)) for n in range(6)])
    text = processor.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}], tokenize=False)
    made = processor(
        text=[text + "It moves."],
        videos=[torch.from_numpy(frames).permute(0, 3, 1, 2)],
        video_metadata=[VideoMetadata(total_num_frames=6, fps=2.0, frames_indices=list(range(6)))],
        do_sample_frames=False,
        return_tensors="pt",
    )
    names = "mm_token_type_ids", "video_grid_thw", "second_per_grid_ts"
    positions, _ = model.model.get_rope_index(made["input_ids"], **{name: made[name] for name in names if name in made})
    ids = made["input_ids"][0]
    kept = {name: made[name] for name in ("pixel_values_videos", "video_grid_thw")}
    return kept | {
        "input_ids": ids,
        "labels": torch.where(torch.arange(len(ids)) > len(ids) - 4, ids, -100),
        "position_ids": positions[:, 0],
        "source": Source("video", "video"),
    }


# -- samples -----------------------------------------------------------------------------------------------------------


def test_a_sample_is_what_the_processor_and_the_model_make(checkpoints, kind):
    """Tokens, pixels and grids of transformers' own processor, positions of the model's own ``get_rope_index``."""
    ours, theirs = encoder_of(checkpoints[kind]), AutoProcessor.from_pretrained(checkpoints[kind])
    model = AutoModelForImageTextToText.from_pretrained(checkpoints[kind])
    for record in records():
        sample, expected = ours(record), of_processor(theirs, record)
        assert sample["input_ids"].tolist() == expected["input_ids"][0].tolist()
        assert ours.length(record) == len(sample["input_ids"])
        if "image" not in record:
            continue
        assert sample["image_grid_thw"].tolist() == expected["image_grid_thw"].tolist()
        torch.testing.assert_close(sample["pixel_values"], expected["pixel_values"], rtol=0, atol=0)
        positions, _ = model.model.get_rope_index(
            expected["input_ids"], expected["mm_token_type_ids"], image_grid_thw=expected["image_grid_thw"]
        )
        assert torch.equal(sample["position_ids"], positions[:, 0])
        assert sample["pixel_values"].shape[1] == 3 * 2 * 14 * 14


def test_raw_patches_give_the_features_of_the_processors_patches(checkpoints, kind):
    processor = load_processor(str(checkpoints[kind]))
    model = load_model(checkpoints[kind], torch_dtype="float32", attn_impl="sdpa").eval()
    use_raw_patches(model, processor.image_processor)
    exact, raw = (Encoder(processor, raw_pixels=raw)(records()[3]) for raw in (False, True))
    assert raw["pixel_values"].dtype == torch.uint8
    with torch.no_grad():
        expected, found = (
            model.model.visual(s["pixel_values"].float(), grid_thw=s["image_grid_thw"]).pooler_output
            for s in (exact, raw)
        )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_answers_alone_are_supervised(encoder):
    sample = encoder(records()[3])
    text = [encoder.processor.tokenizer.decode(sample["labels"][b:e].tolist()) for b, e in spans(sample["labels"])]
    assert text == ["No.<|im_end|>\n", "It is a blur.\nNo more.<|im_end|>\n"]


# -- rows --------------------------------------------------------------------------------------------------------------


def gradients(model, batches):
    model.zero_grad(set_to_none=True)
    sum(loss_sum(model, split_labels(batch)) for batch in batches).backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("attention", ["packed_sdpa", "sdpa", pytest.param("eager", marks=pytest.mark.soak)])
def test_a_packed_row_of_text_images_and_videos_equals_its_samples_alone(checkpoints, kind, encoder, attention):
    """Alone with transformers' own attention and its own path of media; packed by this package."""
    plain = load_model(checkpoints[kind], torch_dtype="float32", attn_impl="sdpa").train()
    model = load_model(checkpoints[kind], torch_dtype="float32", attn_impl=attention).train()
    collate, alone = QwenVLCollator(places=MediaPlaces.of(model)), QwenVLCollator()
    videos = [video_sample(encoder.processor, plain, seed) for seed in (0, 9)]
    samples = [encoder(record) for record in records()]
    samples = [videos[0], *samples[:4], videos[1], *samples[4:]]
    assert "image_places" in collate(samples), "vacuous: the media go transformers' own way"
    with torch.no_grad():
        expected = torch.cat([plain(**inputs(alone([sample]))).logits for sample in samples], dim=1)
        row = inputs(collate(samples))
        found = model(**row).logits
        leaked = plain(**(inputs(alone(samples)) | {"position_ids": row["position_ids"][1:]})).logits
    assert float((found - expected).abs().max()) <= 1e-5
    assert float((leaked - expected).abs().max()) > 1e-2, "vacuous: plain attention agrees too"
    singly, packed = gradients(plain, [alone([sample]) for sample in samples]), gradients(model, [collate(samples)])
    assert singly.keys() == packed.keys() == {name for name, _ in model.named_parameters()}
    for name, gradient in singly.items():
        largest = float(gradient.abs().max())
        assert float((packed[name] - gradient).abs().max()) <= 1e-5 * largest, name
    assert any("visual.blocks" in name and float(value.abs().max()) > 1e-3 for name, value in singly.items())


def patch_places(grid):
    """Return (image, line, column) of each patch, int64[P, 3]: blocks of 2 x 2 patches, line by line."""
    return torch.tensor(
        [
            (image, 2 * line + y, 2 * column + x)
            for image, (_, height, width) in enumerate(grid)
            for line in range(height // 2)
            for column in range(width // 2)
            for y in range(2)
            for x in range(2)
        ]
    )


def tower_by_hand(visual, pixels, grid, side):
    """Compute Qwen2.5-VL's tower in the order of the patches, with masks in place of sorted windows.

    Args:
        side: of a window, in merged patches.
    """
    places = patch_places(grid)
    windows = torch.cat([places[:, :1], places[:, 1:] // (2 * side)], dim=1)
    full, window = ((key[:, None] == key[None]).all(-1) for key in (places[:, :1], windows))
    hidden = pixels @ visual.patch_embed.proj.weight.flatten(1).T
    heads = visual.config.num_heads
    size = hidden.shape[1] // heads
    speeds = 1e4 ** -(torch.arange(0, size // 2, 2) / (size // 2))
    angles = torch.cat([places[:, 1:2] * speeds, places[:, 2:] * speeds], dim=1)  # [P, size / 2]
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]

    def rotated(x):
        pairs = torch.complex(x[..., : size // 2], x[..., size // 2 :]) * turn
        return torch.cat([pairs.real, pairs.imag], dim=-1)

    for number, block in enumerate(visual.blocks):
        mask = full if number in visual.config.fullatt_block_indexes else window
        query, key, value = block.attn.qkv(block.norm1(hidden)).view(-1, 3, heads, size).unbind(1)
        scores = torch.einsum("qhd,khd->hqk", rotated(query), rotated(key)) / size**0.5
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        hidden = hidden + block.attn.proj(torch.einsum("hqk,khd->qhd", weights, value).flatten(1))
        hidden = hidden + block.mlp(block.norm2(hidden))
    return visual.merger(hidden)


@pytest.mark.parametrize("attention", ["sdpa", "packed_sdpa"])
def test_windows_of_a_packed_row_are_those_of_each_image(checkpoints, attention):
    """Reference by hand: in blocks with windows, a mask lets patches see those of their own image and window."""
    folder = checkpoints["qwen2_5_vl"]
    model, encoder = load_model(folder, torch_dtype="float32", attn_impl=attention).eval(), encoder_of(folder)
    visual, row = model.model.visual, QwenVLCollator()([encoder(record) for record in records()])
    pixels, grid = row["pixel_values"], row["image_grid_thw"]
    with torch.no_grad():
        for block in visual.blocks:
            block.attn.qkv.weight.mul_(8)  # so that it matters which patches a patch sees
        found = visual(pixels, grid_thw=grid).pooler_output
        expected, others = (tower_by_hand(visual, pixels, grid.tolist(), side) for side in (4, 5))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, others, atol=1e-2), "vacuous: other windows give the same features"


# -- checkpoints as released, and what is refused ----------------------------------------------------------------------


def changed_config(folder, target, **changes):
    """Copy a checkpoint with a flat config.json, as these families were released: the text model's keys at the top."""
    shutil.copytree(folder, target)
    file = target / "config.json"
    config = json.loads(file.read_text())
    text = config.pop("text_config")
    scaling = text.pop("rope_scaling")
    text["rope_scaling"] = {"type": "mrope", "mrope_section": scaling["mrope_section"]}
    file.write_text(json.dumps(text | config | changes))
    return target


def test_a_config_as_released_loads_as_the_same_model(checkpoints, kind, encoder, tmp_path):
    folder = changed_config(checkpoints[kind], tmp_path / "flat")
    row = inputs(QwenVLCollator()([encoder(record) for record in records()]))
    with torch.no_grad():
        nested, flat = (
            load_model(str(path), torch_dtype="float32")(**row).logits for path in (checkpoints[kind], folder)
        )
    assert torch.equal(nested, flat)
    assert "text_config" not in json.loads((folder / "config.json").read_text())


def test_sliding_windows_of_the_language_model_are_refused(checkpoints, kind, tmp_path):
    windows = {"use_sliding_window": True, "max_window_layers": 2, "sliding_window": 16, "layer_types": None}
    folder = changed_config(checkpoints[kind], tmp_path / "flat", **windows)
    with pytest.raises(CheckpointError, match=r"sets use_sliding_window: layers .* are not supported"):
        load_model(str(folder))


def test_videos_are_refused_in_one_line(encoder):
    """The rules for videos differ between versions of transformers: sampled frames, their size, and positions."""
    record = {"video": [[picture(64, 64, seed) for seed in range(4)]], "conversations": turns("<video>\nWhat?")}
    with pytest.raises(DataError, match=r"videos need a Qwen3-VL processor, not Qwen2VLVideoProcessor: .* as images"):
        encoder(record)
    with pytest.raises(DataError, match="videos need a Qwen3-VL processor"):
        encoder.length(record)


def test_processes_cannot_share_a_row(checkpoints, kind):
    config = AutoConfig.from_pretrained(checkpoints[kind])
    with pytest.raises(RecipeError, match=f"=2 is for Qwen3-VL, but the model is a {kind}. Remove the key"):
        require_model(config, "packed_sdpa", 2)


def test_a_tiny_mixture_of_experts_is_refused(kind, tmp_path):
    with pytest.raises(CheckpointError, match=f"the family '{kind}' has no mixture of experts"):
        make_tiny(tmp_path, family=kind, moe=True)
