"""Scores of boxes, quads and lines: areas against pixel counts, distances by hand, each kind separately."""

import json

import numpy as np
import pytest
from PIL import Image, ImageDraw

from qwenvl_ft.errors import DataError
from qwenvl_ft.evaluation.localization import geometry_accuracy, line_distance, parse_objects, quad_iou
from qwenvl_ft.evaluation.matching import box_iou

REFERENCE = {
    "图片_1": {
        "object_1": {"desc": "switch/vendorA,fully visible", "bbox_2d": [75, 150, 350, 450]},
        "object_2": {"desc": "cable/tied", "line_points": 3, "line": [50, 875, 250, 800, 433, 862]},
    },
    "图片_2": {"object_1": {"desc": "label/readable", "quad": [10, 20, 90, 22, 88, 60, 9, 58]}},
}


def text(value):
    return json.dumps(value, ensure_ascii=False)


def changed(image, name, **values):
    """The reference with an object changed."""
    copy = json.loads(text(REFERENCE))
    copy[image][name] |= values
    return text(copy)


def drawn(points, side=1500, scale=15):
    """The pixels of a polygon on a fine raster."""
    image = Image.new("1", (side, side))
    ImageDraw.Draw(image).polygon([(x * scale, y * scale) for x, y in points], fill=1)
    return np.asarray(image)


def ordered(points):
    around = points - points.mean(axis=0)
    return points[np.argsort(np.arctan2(around[:, 1], around[:, 0]))]


def test_quad_iou_is_that_of_pixels():
    rng = np.random.default_rng(0)
    seen = []
    for trial in range(30):
        quads = [ordered(rng.uniform(0, 100, (4, 2))) for _ in range(2)]  # star-shaped, so simple; many not convex
        pixels = [drawn(quad) for quad in quads]
        expected = (pixels[0] & pixels[1]).sum() / (pixels[0] | pixels[1]).sum()
        turned = quads[0][::-1] if trial % 2 else np.roll(quads[0], trial, axis=0)
        assert quad_iou(turned, quads[1]) == pytest.approx(expected, abs=0.005)
        seen.append(expected)
    assert max(seen) > 0.4
    assert min(seen) < 0.1


def test_quad_iou_by_hand():
    square = np.array([[0, 0], [10, 0], [10, 10], [0, 10]], dtype=float)
    arrow = np.array([[0, 0], [10, 0], [2, 2], [0, 10]], dtype=float)  # not convex: area 20
    crossed = square[[0, 2, 1, 3]]
    assert quad_iou(square, square + [5, 0]) == pytest.approx(50 / 150)
    assert quad_iou(square, arrow) == quad_iou(arrow, square) == pytest.approx(20 / 100)
    assert quad_iou(arrow, arrow) == pytest.approx(1)
    assert quad_iou(crossed, square) == pytest.approx(1), "crossing itself it counts as its hull"
    assert quad_iou(square, square + 20) == 0.0
    assert quad_iou(square * 0, square * 0) == 0.0


def test_axis_aligned_quads_have_the_iou_of_boxes():
    rng = np.random.default_rng(1)
    for _ in range(50):
        a, b = (np.sort(rng.uniform(0, 10, (2, 2)), axis=0).ravel() for _ in range(2))
        quads = [np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]]) for x1, y1, x2, y2 in (a, b)]
        assert quad_iou(*quads) == pytest.approx(box_iou([tuple(a)], [tuple(b)]).item())


def test_line_distance_by_hand():
    """Parallel lines 3 apart in an image of 30 x 40, whose diagonal is 50."""
    line = np.array([[0, 0], [30, 0]], dtype=float)
    size = np.array([30.0, 40.0])
    assert line_distance(line, line + [0, 3], size) == pytest.approx(3 / 50)
    more_points = np.array([[30, 3], [20, 3], [19, 3], [0, 3]], dtype=float)
    assert line_distance(line, more_points, size) == pytest.approx(3 / 50), "direction and points do not matter"
    assert line_distance(line, line, size) == pytest.approx(0, abs=1e-12)
    half = np.array([[0, 0], [15, 0]], dtype=float)
    # one way the second half is 0 to 15 away (mean 7.5 of it, up to the steps), the other way nothing is
    assert line_distance(line, half, size) == pytest.approx(7.5 / 2 / 2 / 50, rel=0.02)
    point = np.array([[0, 4], [0, 4]], dtype=float)
    assert line_distance(point, line, size) > 0.0


def test_each_kind_is_scored_separately():
    scores = geometry_accuracy([text(REFERENCE)], [text(REFERENCE)])
    for kind in ("bbox", "quad", "line"):
        assert scores[kind]["f1"] == 1.0
        assert scores[kind]["mean_likeness"] == pytest.approx(1)
    assert scores["f1"] == 1.0
    for kind, answer in (
        ("bbox", changed("图片_1", "object_1", bbox_2d=[75, 150, 350, 290])),
        ("line", changed("图片_1", "object_2", line=[50, 975, 250, 900, 433, 962])),
        ("quad", changed("图片_2", "object_1", quad=[110, 20, 190, 22, 188, 60, 109, 58])),
    ):
        scores = geometry_accuracy([text(REFERENCE)], [answer])
        assert scores[kind]["f1"] == 0.0
        assert {scores[other]["f1"] for other in ("bbox", "quad", "line") if other != kind} == {1.0}
        assert scores["f1"] == pytest.approx(2 / 3)


def test_boxes_by_hand():
    """IoU 0.4667 of the one, the other not found at all: at 0.4 one of two."""
    reference = text({"a": {"desc": "x", "bbox_2d": [0, 0, 300, 300]}, "b": {"desc": "x", "bbox_2d": [500, 0, 600, 9]}})
    answer = text({"a": {"desc": "x/y", "bbox_2d": [0, 0, 300, 140]}})
    scores = geometry_accuracy([reference], [answer], iou=0.4)["bbox"]
    assert (scores["tp"], scores["fp"], scores["fn"]) == (1, 0, 1)
    assert (scores["precision"], scores["recall"], scores["f1"]) == (1.0, 0.5, pytest.approx(2 / 3))
    assert scores["mean_likeness"] == pytest.approx(140 / 300)
    assert geometry_accuracy([reference], [answer])["bbox"]["tp"] == 0
    assert geometry_accuracy([reference], [answer])["quad"]["f1"] is None, "there are none"


def test_classes_must_agree_unless_by_class_is_false():
    answer = changed("图片_1", "object_1", desc="Shelf/vendorA,fully visible")
    assert geometry_accuracy([text(REFERENCE)], [answer])["bbox"]["f1"] == 0.0
    assert geometry_accuracy([text(REFERENCE)], [answer], by_class=False)["bbox"]["f1"] == 1.0
    same_class = changed("图片_1", "object_1", desc="Switch/vendorB")
    assert geometry_accuracy([text(REFERENCE)], [same_class])["bbox"]["f1"] == 1.0


def test_objects_belong_to_their_image():
    """Two images exchanged: nothing is found, though every object is there."""
    exchanged = {"图片_1": REFERENCE["图片_2"], "图片_2": REFERENCE["图片_1"]}
    assert geometry_accuracy([text(REFERENCE)], [text(exchanged)])["f1"] == 0.0
    renamed = {"image_1": REFERENCE["图片_1"], "image_2": REFERENCE["图片_2"]}
    assert geometry_accuracy([text(REFERENCE)], [text(renamed)])["f1"] == 1.0
    second_only = {"图片_2": REFERENCE["图片_2"]}
    assert geometry_accuracy([text(REFERENCE)], [text(second_only)])["quad"]["f1"] == 1.0


def test_line_distance_depends_on_the_image_size():
    """20 units off: 0.014 diagonals of 1000 x 1000, but 0.14 of 100 x 100."""
    answer = changed("图片_1", "object_2", line=[50, 895, 250, 820, 433, 882])
    sizes = [[(100.0, 100.0), (100.0, 100.0)]]
    assert geometry_accuracy([text(REFERENCE)], [answer])["line"]["f1"] == 1.0
    assert geometry_accuracy([text(REFERENCE)], [answer], sizes=sizes)["line"]["f1"] == 0.0
    assert geometry_accuracy([text(REFERENCE)], [answer], distance=0.01)["line"]["f1"] == 0.0


def test_fenced_truncated_and_bare_answers_are_read():
    whole = text(REFERENCE)
    cut = whole[: whole.index('"quad"') + 20]
    assert [len(objects) for objects in parse_objects(cut).values()] == [2]
    assert [len(objects) for objects in parse_objects(f"Here:\n```json\n{whole}\n```").values()] == [2, 1]
    assert len(parse_objects(text(REFERENCE["图片_1"]))[""]) == 2
    assert len(parse_objects(text(list(REFERENCE["图片_1"].values())))[""]) == 2
    assert parse_objects('{"图片_1": {}}') == {"图片_1": []}
    assert parse_objects("a switch") is None
    scores = geometry_accuracy([whole, whole], [cut, "a switch"])
    assert (scores["n_unparsed"], scores["count"]) == (1, 2)
    assert scores["bbox"]["recall"] == 0.5


@pytest.mark.parametrize(
    "broken",
    [{"bbox_2d": [1, 2, 3]}, {"quad": [1] * 7}, {"line": [1, 2, 3]}, {"bbox_2d": "x"}, {"bbox_2d": [1, 2, 3, None]}]
    + [{"bbox_2d": [1, 2, 3, 4], "quad": [1] * 8}, {}, {"bbox_2d": [1, 2, 3, float("inf")]}, {"line": {}}],
)
def test_malformed_objects_are_left_out(broken):
    good = {"desc": "x", "bbox_2d": [0, 0, 5, 5]}
    (objects,) = parse_objects(text({"a": {"object_1": {"desc": "x"} | broken, "object_2": good}})).values()
    assert [found.kind for found in objects] == ["bbox"]


def test_a_reference_that_is_not_a_dense_caption_is_an_error():
    with pytest.raises(DataError, match="reference 1 is not a dense caption"):
        geometry_accuracy([text(REFERENCE), "a switch"], ["", ""])
    with pytest.raises(DataError, match="1 references and 0 answers"):
        geometry_accuracy(["{}"], [])


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ({"a": {"o": {"desc": "x", "bbox_2d": [1, 2, 3]}}}, "an object without exactly one well-formed"),
        ([{"bbox_2d": [1, 2, 3, 4]}, {"desc": "no geometry"}], "an object without exactly one well-formed"),
        ({"image_1": "three switches"}, "no object with a bbox_2d, quad or line"),
        ([[1, 2, 3, 4]], "no object with a bbox_2d, quad or line"),
    ],
)
def test_an_object_of_a_reference_is_never_left_out(reference, message):
    """In an answer it would be a mistake of the model; in a reference it would change every score unseen."""
    with pytest.raises(DataError, match=message):
        geometry_accuracy([text(reference)], [text(reference)])


def test_a_reference_without_objects_is_right_if_the_answer_has_none():
    for empty in ("[]", "{}", '{"image_1": {}}', '{"image_1": []}'):
        assert geometry_accuracy([empty], [empty])["f1"] is None
        found = geometry_accuracy([empty], ['[{"bbox_2d": [0, 0, 5, 9]}]'])
        assert (found["bbox"]["fp"], found["f1"]) == (1, 0.0)


def test_grounding_answers_of_qwen_are_read_with_their_labels():
    cat, dog = ({"bbox_2d": [0, 0, 50, 90], "label": label} for label in ("cat", "dog"))
    assert geometry_accuracy([text([cat])], [text([cat])])["bbox"]["f1"] == 1.0
    assert geometry_accuracy([text([cat])], [text(cat)])["bbox"]["f1"] == 1.0, "a single object without a list"
    assert geometry_accuracy([text([cat])], [text([dog])])["bbox"]["f1"] == 0.0
    assert geometry_accuracy([text([cat])], [text([dog])], by_class=False)["bbox"]["f1"] == 1.0


def test_scale_is_the_unit_of_a_line():
    """2 units off are 0.0014 diagonals of 1000 x 1000 and 0.014 of 100 x 100."""
    line, moved = ([{"line": [0, y, 50, y]}] for y in (10, 12))
    for scale, tp in ((1000.0, 1), (100.0, 0)):
        scores = geometry_accuracy([text(line)], [text(moved)], scale=scale, distance=0.01)
        assert scores["line"]["tp"] == tp


def test_results_are_plain_json():
    scores = geometry_accuracy([text(REFERENCE)], [changed("图片_1", "object_1", bbox_2d=[0, 0, 1, 1])])
    assert json.loads(json.dumps(scores, allow_nan=False)) == scores
