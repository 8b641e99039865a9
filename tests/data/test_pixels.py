"""Raw patches, normalised on the device, are bit-equal to the processor's, at an eighth of the bytes."""

import copy

import pyarrow
import pytest
import torch
from cases import KINDS, picture
from PIL import Image as PILImage

from qwenvl_ft.data.collate import QwenVLCollator, vision_fillers
from qwenvl_ft.data.encode.encoder import Encoder
from qwenvl_ft.data.media.patches import obstacle, raw_patches
from qwenvl_ft.errors import RecipeError
from qwenvl_ft.model.load import load_model
from qwenvl_ft.model.patch_embed import RawPatches, use_raw_patches
from qwenvl_ft.training.trainer import QwenVLTrainer


def record(*sizes):
    images = [picture(width, height, number) for number, (width, height) in enumerate(sizes)]
    turns = [{"from": "human", "value": "<image>" * len(images) + "What?"}, {"from": "gpt", "value": "this and that"}]
    return {"image": images, "conversations": turns}


@pytest.mark.parametrize("size", [(64, 64), (640, 480), (37, 301), (1000, 90), (96, 33)])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
def test_normalised_and_repeated_they_are_the_processors(processor, size, mode):
    image = picture(*size).convert(mode)
    expected = processor.image_processor(images=[image], return_tensors="pt")
    raw = raw_patches(image.convert("RGB"), tuple(expected["image_grid_thw"][0].tolist()), processor.image_processor)
    part = processor.image_processor
    projection = torch.nn.Conv3d(3, 4, (2, part.patch_size, part.patch_size))
    mean, std = torch.tensor(part.image_mean) * 255, torch.tensor(part.image_std) * 255
    made = RawPatches(projection, mean, std)(projection, (raw,))
    if mode == "RGBA":  # the processor pastes it on white; our media layer does so earlier
        return
    assert torch.equal(made.flatten(1), expected["pixel_values"])
    assert raw.dtype == torch.uint8
    assert raw.nbytes * 8 == expected["pixel_values"].nbytes


def test_an_image_that_pil_holds_in_several_blocks_is_the_same(processor, monkeypatch):
    image, part = picture(640, 480), processor.image_processor
    grid = tuple(part(images=[image], return_tensors="pt")["image_grid_thw"][0].tolist())
    shared = raw_patches(image, grid, part)
    big = PILImage.new("RGB", (4000, 3000), (1, 2, 3))
    assert raw_patches(big, (1, 4, 6), part)[0, ::256].tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match=r"contiguous|multiple array blocks"):
        pyarrow.array(big)
    monkeypatch.setattr(pyarrow, "array", refuse)
    assert torch.equal(raw_patches(image, grid, part), shared)


def refuse(image):
    raise ValueError("Image rows are not contiguous in memory.")


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_those_of_the_processors_pixels(checkpoints, processor, kind):
    samples = {
        raw: [Encoder(processor, raw_pixels=raw)(entry) for entry in (record((64, 96), (120, 50)), record((33, 70)))]
        for raw in (False, True)
    }
    found = {}
    for raw, patch_embed in ((False, "conv3d"), (False, "linear"), (True, "conv3d"), (True, "linear")):
        model = load_model(str(checkpoints[kind]), torch_dtype="float32", patch_embed=patch_embed)
        use_raw_patches(model, processor.image_processor)
        batch = QwenVLCollator()(samples[raw])
        logits = model(**{key: value for key, value in batch.items() if key not in ("labels", "sources")}).logits
        logits.square().mean().backward()
        weight = dict(model.named_parameters())["model.visual.patch_embed.proj.weight"]
        found[raw, patch_embed] = logits.detach(), weight.grad
    logits, gradient = found[False, "conv3d"]
    for other in found.values():
        torch.testing.assert_close(other[0], logits, rtol=0, atol=1e-5)
        assert float((other[1] - gradient).abs().max()) <= 1e-5 * float(gradient.abs().max())
    upside_down = [copy.copy(sample) for sample in samples[True]]
    for sample in upside_down:
        sample["pixel_values"] = 255 - sample["pixel_values"]
    batch = QwenVLCollator()(upside_down)
    other = model(**{key: value for key, value in batch.items() if key not in ("labels", "sources")}).logits
    assert not torch.allclose(other, logits, atol=1e-3), "vacuous: pixels do not matter"


def test_a_model_that_knows_no_raw_patches_refuses_them(tiny_model, processor):
    batch = QwenVLCollator()([Encoder(processor, raw_pixels=True)(record((64, 64)))])
    with pytest.raises((RuntimeError, ValueError)):
        tiny_model(**{key: value for key, value in batch.items() if key not in ("labels", "sources")})


def test_fillers_are_raw_beside_raw_samples(processor):
    (raw,) = vision_fillers(processor, raw_pixels=True)
    (plain,) = vision_fillers(processor)
    assert raw["pixel_values"].nbytes * 8 == plain["pixel_values"].nbytes
    text = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "hello"}]}
    encoder = Encoder(processor, raw_pixels=True)
    assert QwenVLCollator([raw])([encoder(text)])["pixel_values"].dtype == torch.uint8
    assert torch.cat([raw["pixel_values"], encoder(record((64, 64)))["pixel_values"]]).dtype == torch.uint8


def test_other_processors_are_left_alone(processor):
    assert obstacle(processor.image_processor) == ""
    for name, value in (("do_normalize", False), ("rescale_factor", 1 / 127), ("do_resize", False)):
        other = copy.deepcopy(processor.image_processor)
        setattr(other, name, value)
        assert f"{name}={value}" in obstacle(other)
    assert "not of torchvision" in obstacle(object())


def test_data_sets_of_both_kinds_in_one_run_are_refused(tmp_path, tiny_dir, processor, encoder):
    from cases import RECORDS, make_trainer

    trainer = make_trainer(tmp_path, tiny_dir, encoder)
    other = copy.copy(trainer.train_dataset)
    other.encoder = Encoder(processor, raw_pixels=True)
    assert len(RECORDS) == len(other)
    with pytest.raises(RecipeError, match="raw pixels"):
        QwenVLTrainer(
            trainer.model, trainer.args, processor=processor, train_dataset=trainer.train_dataset, eval_dataset=other
        )
