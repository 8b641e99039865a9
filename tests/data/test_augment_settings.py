"""The recipe's section: every spelling in the guides, phases, one-line errors, and reproducible draws."""

import json
import pickle

import numpy as np
import pytest
from cases import picture

from qwenvl_ft.data.augment.colour import ColorJitter, Gamma
from qwenvl_ft.data.augment.operations import OPERATIONS, HFlip, PadToMultiple, ResizeByScale, Rotate, Scale
from qwenvl_ft.data.augment.pipeline import Augmenter, Drawn
from qwenvl_ft.errors import RecipeError

DENSE = [
    {"name": "hflip", "params": {"prob": 0.3}},
    {"name": "vflip", "params": {"prob": 0.1}},
    {"name": "rotate", "params": {"max_deg": 15.0, "prob": 0.3}},
    {"name": "scale", "params": {"lo": 1.05, "hi": 1.25, "prob": 0.2}},
    {"name": "color_jitter", "params": {"brightness": [0.85, 1.15], "contrast": [0.85, 1.15], "prob": 0.3}},
    {"name": "pad_to_multiple", "params": {"multiple": 32}},
]
APPEARANCE = [
    {"name": "hflip", "params": {"prob": 0.5}},
    {"name": "rotate", "params": {"max_deg": 8.0, "prob": 0.25}},
    {"name": "scale", "params": {"lo": 1.02, "hi": 1.15, "prob": 0.2}},
    {"name": "resize_by_scale", "params": {"lo": 0.9, "hi": 1.1, "align_multiple": 32, "prob": 0.5}},
    {
        "name": "color_jitter",
        "params": {"brightness": [0.6, 1.4], "contrast": [0.6, 1.4], "saturation": [0.6, 1.4], "prob": 0.8},
    },
    {"name": "gamma", "params": {"gamma": [0.6, 1.5], "prob": 0.5}},
    {"name": "hsv", "params": {"hue_delta_deg": [-25, 25], "sat": [0.6, 1.5], "val": [0.6, 1.5], "prob": 0.6}},
    {"name": "clahe", "params": {"clip_limit": 4.0, "tile_grid_size": [8, 8], "prob": 0.3}},
    {"name": "sharpness", "params": {"factor": [0.5, 1.8], "prob": 0.4}},
    {"name": "solarize", "params": {"threshold": 128, "prob": 0.15}},
    {"name": "posterize", "params": {"bits": 4, "prob": 0.15}},
    {"name": "pad_to_multiple", "params": {"multiple": 32}},
]


def rng(*key):
    return np.random.default_rng(key or 0)


def operations(config):
    (phase,) = Augmenter.from_config(config).phases
    return phase.ops


@pytest.mark.parametrize("ops", [DENSE, APPEARANCE])
def test_the_guides_lists_are_read_value_by_value(ops):
    read = operations({"enabled": True, "ops": ops})
    assert [type(operation) for operation in read] == [OPERATIONS[entry["name"]] for entry in ops]
    for operation, entry in zip(read, ops, strict=True):
        for key, value in entry["params"].items():
            found = getattr(operation, key)
            assert (list(found) if isinstance(value, list) else found) == value


def test_short_forms_mean_the_same():
    full = operations({"ops": [{"name": "rotate", "params": {"max_deg": 5.0}}, {"name": "scale"}, {"name": "hflip"}]})
    short = operations({"ops": [{"rotate": {"max_deg": 5.0}}, {"scale": None}, "hflip"]})
    assert full == short == (Rotate(max_deg=5.0), Scale(), HFlip())


def test_values_may_be_given_as_text():
    assert operations({"ops": [{"rotate": {"max_deg": "5e-1", "expand": "true"}}]}) == (
        Rotate(max_deg=0.5, expand=True),
    )


def test_the_defaults_are_the_documented_ones():
    defaults = {name: kind() for name, kind in OPERATIONS.items()}
    assert defaults["hflip"].prob == 0.5
    assert defaults["vflip"].prob == 0.1
    assert defaults["rotate"] == Rotate(max_deg=10.0, expand=False, prob=0.5)
    assert defaults["scale"] == Scale(lo=0.9, hi=1.1, prob=0.5)
    assert defaults["resize_by_scale"] == ResizeByScale(lo=0.8, hi=1.2, scales=None, align_multiple=32, prob=1.0)
    assert defaults["pad_to_multiple"] == PadToMultiple(multiple=32)
    assert defaults["color_jitter"] == ColorJitter(
        brightness=(0.7, 1.3), contrast=(0.7, 1.3), saturation=(0.7, 1.3), prob=1.0
    )
    assert defaults["gamma"] == Gamma(gamma=(0.7, 1.4), gain=1.0, prob=1.0)
    assert (defaults["clahe"].clip_limit, defaults["clahe"].tile_grid_size, defaults["clahe"].prob) == (
        3.0,
        (8, 8),
        0.5,
    )
    assert (defaults["hsv"].hue_delta_deg, defaults["hsv"].sat, defaults["hsv"].val) == (
        (-20, 20),
        (0.7, 1.4),
        (0.7, 1.4),
    )
    assert (defaults["sharpness"].factor, defaults["sharpness"].prob) == ((0.5, 1.8), 0.4)
    assert (defaults["solarize"].threshold, defaults["solarize"].prob) == (128, 0.3)
    assert (defaults["posterize"].bits, defaults["posterize"].prob) == (4, 0.3)


@pytest.mark.parametrize("config", [None, {}, {"enabled": False, "ops": DENSE}, {"enabled": True, "ops": []}])
def test_augmentation_that_is_off_changes_nothing(config):
    augmenter = Augmenter.from_config(config)
    assert all(augmenter.draw(64, 48, rng(i)) == Drawn((64, 48)) for i in range(20))


WRONG = [
    ({"ops": [{"rotat": {}}]}, r"data\.augmentation\.ops\[0\]: unknown operation 'rotat'\. Did you mean 'rotate'\?"),
    ({"ops": ["hflip", {"name": "hue"}]}, r"ops\[1\]: unknown operation 'hue'"),
    ({"ops": [{"rotate": {"max_degs": 1}}]}, r"ops\[0\] rotate: unknown key 'max_degs'\. Did you mean 'max_deg'\?"),
    ({"ops": [{"rotate": {"max_deg": -1}}]}, r"rotate\.max_deg: -1 must not be negative"),
    ({"ops": [{"rotate": {"max_deg": "far"}}]}, r"rotate\.max_deg: 'far' is not a number"),
    ({"ops": [{"name": "rotate", "params": [15]}]}, r"ops\[0\] rotate: \[15\] is not a mapping"),
    ({"ops": [{"name": "rotate", "max_deg": 1}]}, r"unknown key max_deg beside name\. Parameters belong in params"),
    ({"ops": [{"rotate": {}, "scale": {}}]}, r"ops\[0\]: .* is not an operation\. Write {name: rotate"),
    ({"ops": [7]}, r"ops\[0\]: 7 is not an operation"),
    ({"ops": {"rotate": {}}}, r"data\.augmentation\.ops: .* is not a list"),
    ({"ops": [{"hflip": {"prob": 30}}]}, r"ops\[0\] hflip: prob: 30 is not between 0 and 1"),
    ({"ops": [{"scale": {"lo": 1.2, "hi": 1.1}}]}, r"scale: lo: 1\.2 is above hi: 1\.1\. Swap them"),
    ({"ops": [{"scale": {"lo": 0}}]}, r"scale\.lo: 0 must be above 0"),
    ({"ops": [{"random_crop": {"hi": 1.5}}]}, r"random_crop: hi: 1\.5 is not between 0 and 1"),
    ({"ops": [{"resize_by_scale": {"scales": []}}]}, r"resize_by_scale: scales: \[\] has nothing to choose from"),
    ({"ops": [{"pad_to_multiple": {"multiple": 0}}]}, r"pad_to_multiple\.multiple: 0 must be above 0"),
    ({"ops": [{"pad_to_multiple": {"prob": 1}}]}, r"pad_to_multiple: unknown key 'prob'\. Known: multiple"),
    ({"ops": [{"hsv": {"sat": 1.4}}]}, r"hsv\.sat: 1\.4 is not a list"),
    (
        {"ops": [{"hsv": {"sat": [1, 2, 3]}}]},
        r"hsv: sat: \[1.*3.*\] is not a range\. Write \[lowest, highest\]",
    ),
    ({"ops": [{"gamma": {"gamma": [-1, 2]}}]}, r"gamma: gamma: -1 is below 0"),
    ({"ops": [{"clahe": {"tile_grid_size": [8]}}]}, r"clahe: tile_grid_size: \[8\] is not \[across, down\]"),
    ({"ops": [{"posterize": {"bits": 9}}]}, r"posterize: bits: 9 is more than the 8 bits of a level"),
    ({"ops": [{"auto_contrast": {"cutoff": 50}}]}, r"auto_contrast: cutoff: 50 percent at either end leaves nothing"),
    ({"op": []}, r"data\.augmentation: unknown key 'op'\. Did you mean 'ops'\?"),
    ({"fill": 300}, r"fill: 300 is neither a level from 0 to 255"),
    ({"bypass_prob": 2}, r"data\.augmentation: bypass_prob: 2 is not between 0 and 1"),
    ({"ops": ["hflip"], "phases": [{"ops": []}]}, r"both ops and phases are given"),
    ({"phases": [{"until_epoch": 2, "ops": []}]}, r"phases: until_epoch is \[2\]\. Every phase but the last needs one"),
    ({"phases": [{"ops": []}, {"ops": []}]}, r"phases: until_epoch is \[None, None\]"),
    ({"phases": [{"until_epoch": 2}, {"until_epoch": 2}, {}]}, r"until_epoch must increase from phase to phase"),
    ({"phases": [{"until_epoch": 2, "ops": ["hflop"]}, {}]}, r"phases\[0\]\.ops\[0\]: unknown operation 'hflop'"),
]


@pytest.mark.parametrize(("config", "message"), WRONG)
def test_an_error_is_one_line_that_names_the_place(config, message):
    with pytest.raises(RecipeError, match=message) as raised:
        Augmenter.from_config(config)
    assert "\n" not in str(raised.value)


def test_messages_begin_with_the_key_that_the_caller_gives():
    with pytest.raises(RecipeError, match=r"^custom\.augmentation\.ops\[0\]"):
        Augmenter.from_config({"ops": ["x"]}, "custom.augmentation")


PHASES = [
    {"until_epoch": 1, "ops": [{"rotate": {"max_deg": 5.0, "prob": 1}}]},
    {"until_epoch": 3, "ops": [{"rotate": {"max_deg": 40.0, "prob": 1}}]},
    {"ops": []},
]


def test_phases_change_with_the_epoch():
    augmenter = Augmenter.from_config({"phases": PHASES})
    largest = []
    for epoch in range(5):
        drawn = [augmenter.draw(64, 48, rng(epoch, i), epoch) for i in range(100)]
        turns = [abs(np.degrees(np.arcsin(d.steps[0].matrix[3]))) if d.steps else 0.0 for d in drawn]
        largest.append(max(turns))
    assert 4 < largest[0] <= 5
    assert all(30 < turn <= 40 for turn in largest[1:3])
    assert largest[3:] == [0.0, 0.0]


def test_bypass_leaves_its_share_of_records_as_they_are():
    augmenter = Augmenter.from_config({"ops": [{"hflip": {"prob": 1}}], "bypass_prob": 0.25})
    plain = sum(augmenter.draw(64, 48, rng(i)) == Drawn((64, 48)) for i in range(2_000))
    assert 440 < plain < 560


def test_operations_are_applied_as_often_as_their_probability_says():
    augmenter = Augmenter.from_config({"ops": APPEARANCE})
    counts = dict.fromkeys(OPERATIONS, 0)
    names = {kind: name for name, kind in OPERATIONS.items()}
    for i in range(2_000):
        for operation, _ in augmenter.draw(64, 64, rng(i)).colours:
            counts[names[type(operation)]] += 1
    for entry in APPEARANCE[4:-1]:
        assert abs(counts[entry["name"]] / 2_000 - entry["params"]["prob"]) < 0.04


def test_resize_chooses_among_scales_and_aligns():
    augmenter = Augmenter.from_config({"ops": [{"resize_by_scale": {"scales": [0.5, 2]}}]})
    sizes = {augmenter.draw(100, 60, rng(i)).size for i in range(50)}
    assert sizes == {(64, 32), (224, 128)}


def test_the_same_generator_gives_the_same_result():
    augmenter = Augmenter.from_config({"ops": APPEARANCE, "bypass_prob": 0.1})
    image = picture(96, 64)
    drawn = [augmenter.draw(96, 64, rng(3, 1, i)) for i in range(30)]
    again = [augmenter.draw(96, 64, rng(3, 1, i)) for i in range(30)]
    assert drawn == again
    assert all(a.image(image).tobytes() == b.image(image).tobytes() for a, b in zip(drawn, again, strict=True))
    assert len({json.dumps([d.steps, repr(d.colours)], default=repr) for d in drawn}) > 20, "vacuous: all alike"
    assert drawn != [augmenter.draw(96, 64, rng(3, 2, i)) for i in range(30)]


def test_draws_do_not_depend_on_content_and_applying_draws_nothing():
    augmenter = Augmenter.from_config({"ops": APPEARANCE})
    generator = rng(7)
    drawn = augmenter.draw(96, 64, generator)
    state = generator.bit_generator.state
    first = drawn.image(picture(96, 64, 0)).tobytes()
    drawn.objects([{"bbox_2d": [1, 2, 3, 4]}])
    drawn.image(picture(96, 64, 1))
    assert drawn.image(picture(96, 64, 0)).tobytes() == first
    assert generator.bit_generator.state == state


def test_one_operations_probability_does_not_change_what_the_others_draw():
    last = [{"gamma": {"prob": 1}}]
    for name in OPERATIONS:
        if name in ("pad_to_multiple", "gamma"):
            continue
        never, always = (
            Augmenter.from_config({"ops": [{name: {"prob": prob}}, *last]}).draw(960, 640, rng(1)) for prob in (0, 1)
        )
        assert never.colours[-1] == always.colours[-1]
        assert never != always, "vacuous: it is not applied"


def test_a_drawn_augmentation_can_be_pickled():
    drawn = Augmenter.from_config({"ops": APPEARANCE}).draw(96, 64, rng(2))
    assert pickle.loads(pickle.dumps(drawn)) == drawn
