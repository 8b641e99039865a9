"""From a recipe to a batch: the answers' boxes match the pixels of the batch."""

import json
import re

import numpy as np
import pytest
import torch
from cases import ListRecords, picture
from dense_cases import COLOURS, dense_record, dense_settings, write_dense

from qwenvl_ft.assemble import build_datasets, build_processor
from qwenvl_ft.data.collate import QwenVLCollator
from qwenvl_ft.data.dense.groups import DenseGroups
from qwenvl_ft.data.plan.epochs import JoinedEpochs, RecordEpochs, open_epochs
from qwenvl_ft.errors import DataError, RecipeError
from qwenvl_ft.look.pictures import pictures
from qwenvl_ft.recipe.load import load_recipe

GEOMETRY = [
    {"name": "hflip", "params": {"prob": 0.5}},
    {"rotate": {"max_deg": 15, "prob": 0.5}},
    {"scale": {"lo": 0.8, "hi": 1.5, "prob": 0.5}},
    {"resize_by_scale": {"lo": 0.7, "hi": 1.5, "prob": 0.5}},
    {"random_crop": {"lo": 0.6, "prob": 0.5}},
    {"name": "pad_to_multiple", "params": {"multiple": 32}},
]
COLOUR = [
    {"color_jitter": {"prob": 1}},
    {"gamma": {"prob": 1}},
    {"hsv": {"prob": 1}},
    {"clahe": {"prob": 1}},
    {"sharpness": {"prob": 1}},
    {"solarize": {"prob": 1}},
    {"posterize": {"prob": 1}},
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dense(tmp_path_factory.mktemp("dense"), 30)


@pytest.fixture
def dataset_of(tiny_dir, data, tmp_path):
    def build(*more, data=data):
        recipe = load_recipe(None, dense_settings(tiny_dir, data, tmp_path, *more))
        return build_datasets(recipe, build_processor(recipe), 42)[0]

    return build


def answer_of(sample, tokenizer):
    supervised = sample["input_ids"][sample["labels"] >= 0]
    return json.loads(tokenizer.decode(supervised, skip_special_tokens=True))


def shown(sample, processor):
    """Return the pictures of a sample as the model sees them, in RGB."""
    images = pictures(sample["pixel_values"], sample["image_grid_thw"], processor.image_processor)
    return [np.asarray(image).astype(int) for image, *_ in images]


def extent(pixels, colour):
    """Return [x1, y1, x2, y2] in pixels of the area with a colour; None if it is too small."""
    mask = np.abs(pixels - COLOURS[colour]).sum(axis=2) < 90
    ys, xs = np.nonzero(mask)
    return None if len(xs) < 30 else (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)


def errors_of(dataset, epochs, shift=0.0):
    """Return the largest distance, in pixels, of each box in the answers from the visible extent of its object."""
    tokenizer = dataset.encoder.processor.tokenizer
    found = []
    for epoch in epochs:
        for k in range(len(dataset.at(epoch))):
            sample = dataset[dataset.ticket(epoch, k)]
            batch = QwenVLCollator()([sample])
            answer = answer_of(sample, tokenizer)
            images = shown(batch, dataset.encoder.processor)
            assert list(answer) == [f"图片_{i + 1}" for i in range(len(images))]
            for pixels, objects in zip(images, answer.values(), strict=True):
                height, width, _ = pixels.shape
                for entry in objects.values():
                    seen = extent(pixels, entry["desc"].split("/")[0])
                    if seen is not None:
                        box = np.array(entry["bbox_2d"]) / 1000 * [width, height, width, height] + shift
                        found.append(np.abs(box - seen).max())
    return np.array(found)


def test_boxes_of_the_answers_are_where_the_pixels_of_the_batch_show_them(dataset_of):
    """Rounding to thousandths and blurred edges account for 2 pixels; a shift of 5 more is detected."""
    dataset = dataset_of(f"data.augmentation={json.dumps({'ops': GEOMETRY})}")
    found = errors_of(dataset, range(3))
    assert len(found) > 100
    assert np.quantile(found, 0.99) < 2.5
    assert found.mean() < 1.2
    assert errors_of(dataset, [0], shift=5).min() > 2.5, "vacuous: positions are not compared"


def test_every_visible_object_is_in_the_answer_and_no_other(dataset_of):
    """Also in summaries, which are rebuilt where an object left the picture."""
    ops = [{"random_crop": {"lo": 0.5, "hi": 0.6, "prob": 1}}]
    for mode, ratio in (("dense", 0), ("summary", 1)):
        dataset = dataset_of(f"data.augmentation={json.dumps({'ops': ops})}", f"data.summary_ratio={ratio}")
        dropped = 0
        for k in range(len(dataset)):
            sample = dataset[k]
            answer = answer_of(sample, dataset.encoder.processor.tokenizer)
            for pixels, entry in zip(shown(sample, dataset.encoder.processor), answer.values(), strict=True):
                text = entry if mode == "summary" else " ".join(found["desc"] for found in entry.values())
                area = pixels.shape[0] * pixels.shape[1]
                for colour in COLOURS:
                    seen = (np.abs(pixels - COLOURS[colour]).sum(axis=2) < 90).sum() / area
                    assert colour in text or seen < 0.05, "visible, but not in the answer"
                    assert colour not in text or seen > 0.001, "in the answer, but not visible"
                dropped += len(re.findall("red|green|blue", text)) < 3
        assert dropped > 5, "vacuous: nothing left the picture"


def test_colours_change_pixels_and_no_coordinate(dataset_of):
    plain, coloured = dataset_of(), dataset_of(f"data.augmentation={json.dumps({'ops': COLOUR})}")
    for k in range(5):
        one, other = plain[k], coloured[k]
        assert torch.equal(one["input_ids"], other["input_ids"])
        assert torch.equal(one["image_grid_thw"], other["image_grid_thw"])
        assert not torch.equal(one["pixel_values"], other["pixel_values"])


def test_validation_is_never_augmented_and_the_same_in_all_epochs(tiny_dir, data, tmp_path):
    ops = json.dumps({"ops": GEOMETRY + COLOUR})
    recipe = load_recipe(None, dense_settings(tiny_dir, data, tmp_path, f"data.val={data}", f"data.augmentation={ops}"))
    _, val = build_datasets(recipe, build_processor(recipe), 42)
    assert val.measured_as(3) == 0
    assert errors_of(val, [0]).max() < 1.1


@pytest.mark.parametrize("norm", ["none", "norm100", "norm1000"])
def test_emit_norm_and_patterns_reach_the_answer(dataset_of, data, norm):
    dataset = dataset_of(
        f"data.emit_norm={norm}",
        "data.images_per_user_turn=3",
        "data.label_pattern=Picture {i}",
        "prompts.scheme=b",
        "prompts.user=Which parts?",
    )
    assert len(dataset) == 10
    sample = dataset[0]
    answer = answer_of(sample, dataset.encoder.processor.tokenizer)
    assert list(answer) == ["Picture 1", "Picture 2", "Picture 3"]
    boxes = {entry["desc"]: entry["bbox_2d"] for objects in answer.values() for entry in objects.values()}
    scale = {"none": (1, 1), "norm100": (100 / 160, 100 / 128), "norm1000": (1000 / 160, 1000 / 128)}[norm]
    for line in data.read_text().splitlines():
        for entry in json.loads(line)["objects"]:
            if entry["desc"] in boxes:
                expected = [value * scale[k % 2] for k, value in enumerate(entry["bbox_2d"])]
                assert np.abs(np.array(boxes.pop(entry["desc"])) - expected).max() <= 0.5
    assert not boxes
    text = dataset.encoder.processor.tokenizer.decode(sample["input_ids"])
    assert "Which parts?" in text
    assert "Order the objects from top to bottom" in text, "scheme B"


def turn(number):
    return {
        "image": picture(64, 64, number),
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a blur"}],
    }


def test_only_colour_operations_are_allowed_for_records_without_objects(encoder):
    from qwenvl_ft.data.augment.pipeline import Augmenter

    records = ListRecords([turn(k) for k in range(3)])
    moving = Augmenter.from_config({"ops": ["gamma", "hflip"]})
    with pytest.raises(DataError, match=r"list\[0\]: data.augmentation has hflip, which moves pixels"):
        open_epochs(records, augmenter=moving)
    assert isinstance(open_epochs(records, augmenter=moving, training=False), RecordEpochs)
    epochs = open_epochs(records, augmenter=Augmenter.from_config({"ops": [{"gamma": {"gamma": [0.3, 0.5]}}]}))
    one, other, again = (encoder(epochs.conversation(epoch, 1)) for epoch in (0, 1, 0))
    assert torch.equal(one["input_ids"], other["input_ids"])
    assert not torch.equal(one["pixel_values"], other["pixel_values"])
    assert torch.equal(one["pixel_values"], again["pixel_values"])


def test_files_of_several_formats_stand_side_by_side(tiny_dir, data, tmp_path, write_jsonl):
    picture(64, 64).save(tmp_path / "0.png")
    other = write_jsonl([turn(k) | {"image": "0.png"} for k in range(5)], name="other.jsonl")
    recipe = load_recipe(None, dense_settings(tiny_dir, f"{other},{data}", tmp_path))
    dataset, _ = build_datasets(recipe, build_processor(recipe), 42)
    assert isinstance(dataset.epochs, JoinedEpochs)
    assert [type(part) for part in dataset.epochs.parts] == [RecordEpochs, DenseGroups]
    assert len(dataset) == 5 + 15
    assert len(dataset[4]["image_grid_thw"]) == 1
    assert len(dataset[5]["image_grid_thw"]) == 2
    mixed = write_jsonl([turn(0) | {"image": "0.png"}, dense_record(1, tmp_path)], name="mixed.jsonl")
    mixed_recipe = load_recipe(None, dense_settings(tiny_dir, mixed, tmp_path, "data.emit_norm=none"))
    alone, _ = build_datasets(mixed_recipe, build_processor(recipe), 42)
    assert max(answer_of(alone[1], alone.encoder.processor.tokenizer)["图片_1"]["object_2"]["bbox_2d"]) < 128
    mixed_recipe.data.summary_ratio = 0.5
    with pytest.raises(DataError, match=r"mixed.jsonl:2: a dense-caption record in a file that begins with another"):
        build_datasets(mixed_recipe, build_processor(recipe), 42)
    mixed = write_jsonl([dense_record(1, tmp_path), turn(0) | {"image": "0.png"}], name="other_way.jsonl")
    with pytest.raises(DataError, match=r"other_way.jsonl:2: not a dense-caption record \(keys image, conversations\)"):
        build_datasets(load_recipe(None, dense_settings(tiny_dir, mixed, tmp_path)), build_processor(recipe), 42)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ('data.augmentation={"ops": [{"rotat": {}}]}', r"data.augmentation.ops\[0\]: unknown operation 'rotat'"),
        ("prompts.system=nowhere.txt", "prompts.system='nowhere.txt' cannot be read"),
        ("data.label_pattern=picture", r"data.label_pattern='picture' must contain \{i\} once"),
    ],
)
def test_settings_that_the_schema_does_not_check_are_refused_before_data_are_measured(
    tiny_dir, data, tmp_path, setting, message
):
    from qwenvl_ft.training.prepare import prepare_run

    with pytest.raises(RecipeError, match=message):
        prepare_run(load_recipe(None, dense_settings(tiny_dir, data, tmp_path, setting)))


def test_a_system_prompt_that_no_dense_caption_would_use_is_refused(dataset_of, data, tmp_path, write_jsonl):
    with pytest.raises(RecipeError, match=r"template.system_prompt is of no use in data.train: .* Give prompts.system"):
        dataset_of("template.system_prompt=Be brief.")
    dataset = dataset_of("prompts.system=Be brief.")
    assert "Be brief." in dataset.encoder.processor.tokenizer.decode(dataset[0]["input_ids"])
    other = write_jsonl([turn(0) | {"image": str(data.parent / "0.png")}], name="other.jsonl")
    joined = dataset_of("template.system_prompt=Be brief.", data=f"{other},{data}")
    texts = [joined.encoder.processor.tokenizer.decode(joined[k]["input_ids"]) for k in (0, 1)]
    assert ["Be brief." in text for text in texts] == [True, False]


@pytest.mark.parametrize("setting", ["data.summary_ratio=1.5", "prompts.scheme=C", "data.emit_norm=norm10"])
def test_settings_that_the_schema_checks_are_refused_when_the_recipe_is_read(setting):
    with pytest.raises(RecipeError, match=setting.partition("=")[0]):
        load_recipe(None, [setting])
