"""Objects under maps and clipping: areas compared with counted pixels, pieces of lines with sampled points."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from qwenvl_ft.data.augment.geometry import (
    IDENTITY,
    Step,
    area,
    as_quad,
    clip_line,
    clip_polygon,
    compose,
    inside,
    invert,
    length,
    map_objects,
    transform,
)
from qwenvl_ft.data.augment.operations import HFlip, Rotate, VFlip
from qwenvl_ft.data.augment.pipeline import Augmenter
from qwenvl_ft.errors import DataError

SIZE = (120, 80)
RECORD = [
    {"bbox_2d": [90, 120, 420, 360], "desc": "switch/vendorA,fully visible"},
    {"quad": [500, 100, 700, 130, 690, 260, 495, 235], "desc": "label/readable"},
    {"line": [60, 700, 300, 640, 520, 690, 900, 610], "line_points": 4, "desc": "cable/tied,no sleeve"},
]


def moved(objects, x=0.0, y=0.0, size=(1200, 800), min_visible=0.0):
    return map_objects(objects, [Step((1.0, 0.0, x, 0.0, 1.0, y), size)], min_visible)


def random_convex(rng):
    """Return a random convex quad around a point near or outside the frame's border."""
    angles = np.sort(rng.uniform(0, 2 * np.pi, 4))
    centre = rng.uniform([-10, -10], [130, 90])
    return [tuple(p) for p in (centre + 50 * np.stack([np.cos(angles), np.sin(angles)], axis=1)).tolist()]


def counted_area(polygon, size, fine=8):
    """Return the area of the frame that a polygon covers, counted on a grid ``fine`` times as dense."""
    mask = Image.new("1", (size[0] * fine, size[1] * fine))
    ImageDraw.Draw(mask).polygon([(x * fine - 0.5, y * fine - 0.5) for x, y in polygon], fill=1)
    return np.asarray(mask).sum() / fine**2


def test_matrices_compose_and_invert():
    rng = np.random.default_rng(0)
    first, second = (tuple(rng.normal(size=6).tolist()) for _ in range(2))
    points = [tuple(p) for p in rng.normal(size=(5, 2)).tolist()]
    both = transform(transform(points, first), second)
    np.testing.assert_allclose(transform(points, compose(second, first)), both, atol=1e-12)
    np.testing.assert_allclose(transform(both, invert(compose(second, first))), points, atol=1e-9)
    assert not np.allclose(transform(points, compose(first, second)), both), "vacuous: the order does not matter"


def test_a_clipped_polygon_covers_the_pixels_of_the_frame_that_the_polygon_covers():
    rng = np.random.default_rng(1)
    cut = 0
    for _ in range(200):
        polygon = random_convex(rng)
        clipped = clip_polygon(polygon, SIZE)
        assert inside(clipped, SIZE)
        assert area(clipped) == pytest.approx(counted_area(polygon, SIZE), abs=25)
        cut += clipped != polygon
    assert cut > 100, "vacuous: nothing was clipped"


def test_a_clipped_line_is_the_line_in_the_frame():
    """Compared with 20,001 points sampled along each line: the length inside, and the number of pieces."""
    rng = np.random.default_rng(2)
    several = 0
    for _ in range(200):
        line = [tuple(p) for p in rng.uniform([-60, -40], [180, 120], (5, 2)).tolist()]
        pieces = clip_line(line, SIZE)
        assert all(inside(piece, SIZE) for piece in pieces)
        along = np.linspace(0, 4, 20_001)
        x, y = (np.interp(along, range(5), [p[axis] for p in line]) for axis in (0, 1))
        seen = (x >= 0) & (x <= SIZE[0]) & (y >= 0) & (y <= SIZE[1])
        lengths = np.hypot(np.diff(x), np.diff(y))
        assert sum(map(length, pieces)) == pytest.approx(lengths[seen[1:] & seen[:-1]].sum(), abs=1)
        runs = int(seen[0]) + int((seen[1:] & ~seen[:-1]).sum())
        assert len(pieces) in (runs, runs + 1), "the samples may miss a corner that is cut, not more"
        several += len(pieces) > 1
    assert several > 20, "vacuous: no line leaves the frame and comes back"


def test_a_box_becomes_the_bounding_box_of_its_visible_part():
    step = Rotate().step((1200, 800), 10.0)
    (box,), _ = map_objects([RECORD[0]], [step], 0.0)
    corners = np.array(transform([(90, 120), (420, 120), (420, 360), (90, 360)], step.matrix))
    np.testing.assert_allclose(box["bbox_2d"], [*corners.min(axis=0), *corners.max(axis=0)])
    assert box["desc"] == RECORD[0]["desc"]
    (cut,), _ = moved([RECORD[0]], x=-200.0)
    assert cut["bbox_2d"] == [0.0, 120.0, 220.0, 360.0]


def test_a_rotated_box_cut_by_the_frame_is_tight_around_its_visible_part():
    """A square standing on a corner, cut on the left: its top and bottom corners, both outside, must not enlarge it."""
    c = 0.5**0.5
    step = Step((c, -c, 0.0, c, c, 0.0), (100, 100))
    (box,), _ = map_objects([{"bbox_2d": [0, -40, 100, 60]}], [step], 0.0)
    seen = counted_area(transform([(0, -40), (100, -40), (100, 60), (0, 60)], step.matrix), (100, 100))
    x1, y1, x2, y2 = box["bbox_2d"]
    assert (x2 - x1) * (y2 - y1) >= seen
    corners = clip_polygon(transform([(0, -40), (100, -40), (100, 60), (0, 60)], step.matrix), (100, 100))
    np.testing.assert_allclose([x1, y1, x2, y2], [*np.min(corners, axis=0), *np.max(corners, axis=0)])


FLIPPED_QUADS = {
    (HFlip,): [500, 130, 700, 100, 705, 235, 510, 260],
    (VFlip,): [495, 565, 690, 540, 700, 670, 500, 700],
    (HFlip, VFlip): [510, 540, 705, 565, 700, 700, 500, 670],
    (HFlip, HFlip): [500, 100, 700, 130, 690, 260, 495, 235],
}
"""The quad of RECORD in a frame of 1200x800, by hand: top left, top right, bottom right, bottom left."""


@pytest.mark.parametrize("flips", FLIPPED_QUADS)
def test_a_flipped_quad_starts_top_left_again(flips):
    (quad,), _ = map_objects([RECORD[1]], [flip().step((1200, 800)) for flip in flips], 0.0)
    assert quad["quad"] == FLIPPED_QUADS[flips]


def test_a_turned_quad_keeps_the_order_of_its_corners():
    step = Rotate().step((1200, 800), 25.0)
    (quad,), _ = map_objects([RECORD[1]], [step], 0.0)
    np.testing.assert_allclose(np.reshape(quad["quad"], (-1, 2)), transform(points_of(RECORD[1]["quad"]), step.matrix))


def points_of(values):
    return list(zip(values[::2], values[1::2], strict=True))


def test_a_quad_that_one_side_of_the_frame_cuts_through_stays_exact():
    (quad,), _ = moved([{"quad": [500, 100, 700, 100, 700, 260, 500, 260]}], x=-600.0)
    assert quad["quad"] == [0, 100, 100, 100, 100, 260, 0, 260]


def test_a_corner_of_a_quad_in_the_frame_is_an_exact_triangle_with_four_corners():
    triangle = clip_polygon([(-100, 40), (-40, -20), (20, 40), (-40, 100)], SIZE)
    assert sorted(triangle) == [(0, 20), (0, 60), (20, 40)]
    quad = as_quad(triangle, (-40, -20))
    assert quad[0] == (0, 20)
    assert area(quad) == area(triangle)
    assert len(set(quad)) == 4


def test_a_cut_quad_covers_only_the_object_and_loses_little():
    """Tested on rectangles rotated by up to 17 degrees, of which at least 30 percent stay in the frame."""
    rng = np.random.default_rng(3)
    covers = []
    for _ in range(2_000):
        c, s = np.cos(angle := rng.uniform(-0.3, 0.3)), np.sin(angle)
        half = rng.uniform(5, 40, 2)
        x, y = rng.uniform([0, 0], SIZE)
        corners = [(-half[0], -half[1]), (half[0], -half[1]), (half[0], half[1]), (-half[0], half[1])]
        rectangle = transform(corners, (c, -s, x, s, c, y))
        seen = clip_polygon(rectangle, SIZE)
        if inside(rectangle, SIZE) or area(seen) < 0.3 * area(rectangle):
            continue
        quad = as_quad(seen, rectangle[0])
        assert all(any(corner == known for known in seen) for corner in quad) or len(seen) == 3
        covers.append(area(quad) / area(seen))
    assert len(covers) > 500, "vacuous: nothing was cut"
    assert max(covers) < 1 + 1e-9
    assert min(covers) > 0.85
    assert np.mean(covers) > 0.99


def test_a_line_keeps_its_longest_piece_and_counts_its_points_again():
    line = {"line": [-20, 10, 20, 10, 20, -10, 60, -10, 60, 40, 100, 40], "line_points": 6, "desc": "cable"}
    (kept,), dropped = moved([line], size=SIZE)
    assert kept == {"line": [60, 0, 60, 40, 100, 40], "line_points": 3, "desc": "cable"}
    assert dropped == []
    (repeated,), _ = moved([{"line": [1, 1, 1, 1, 5, 5, 5, 5]}], size=SIZE)
    assert repeated == {"line": [1, 1, 5, 5]}


def test_a_line_along_the_border_is_not_cut_by_rounding():
    """W * (newW / W) is not exactly newW for every W; a line that touches the border must stay in one piece."""
    cut = 0
    for width in range(100, 400):
        matrix = (1344 / width, 0.0, 0.0, 0.0, 1.0, 0.0)
        line = [0, 0, width, 20, 50, 40, width, 60]
        cut += matrix[0] * width > 1344
        (kept,), _ = map_objects([{"line": line}], [Step(matrix, (1344, 80))], 1.0)
        assert len(kept["line"]) == 8
    assert cut, "vacuous: nothing was rounded up"


def test_objects_that_leave_the_frame_are_dropped_and_reported():
    objects, dropped = moved(RECORD, x=-450.0, min_visible=0.3)
    assert dropped == [0]
    assert [entry["desc"] for entry in objects] == [RECORD[1]["desc"], RECORD[2]["desc"]]
    assert moved(RECORD, y=-5000.0)[1] == [0, 1, 2]


def test_a_shape_without_area_stays_in_the_frame_and_is_dropped_at_its_border():
    flat = [{"quad": [10, 10, 50, 10, 90, 10, 30, 10]}, {"bbox_2d": [10, 10, 90, 10]}]
    assert moved(flat, size=SIZE, min_visible=0.3) == (flat, [])
    assert moved(flat, x=-20.0, size=SIZE) == ([], [0, 1])


@pytest.mark.parametrize(("shift", "kept"), [(-69.0, True), (-71.0, False)])
@pytest.mark.parametrize("entry", [{"bbox_2d": [0, 10, 100, 40]}, {"line": [0, 10, 100, 10]}])
def test_min_visible_is_a_share_of_area_or_length(entry, shift, kept):
    assert bool(moved([entry], x=shift, size=SIZE, min_visible=0.3)[0]) == kept


def test_objects_inside_the_frame_count_as_fully_visible():
    steps = [Rotate(expand=True).step((1200, 800), 13.0)]
    assert map_objects(RECORD, steps, 1.0)[1] == []


def test_an_intermediate_frame_cuts_what_a_later_one_would_show_again():
    crop, widen = Step((1.0, 0.0, -50.0, 0.0, 1.0, 0.0), (50, 80)), Step((1.0, 0.0, 50.0, 0.0, 1.0, 0.0), (150, 80))
    (box,), _ = map_objects([{"bbox_2d": [20, 10, 80, 40]}], [crop, widen], 0.0)
    assert box["bbox_2d"] == [50.0, 10.0, 80.0, 40.0]


def test_without_steps_values_are_unchanged():
    objects, dropped = map_objects(RECORD, [], 1.0)
    assert (objects, dropped) == (RECORD, [])
    assert isinstance(objects[0]["bbox_2d"][0], int)
    assert map_objects(RECORD, [Step(IDENTITY, (1216, 800))], 1.0)[0] == RECORD


WRONG = [
    ({"desc": "a"}, "object 0 has no geometry; it needs exactly one of bbox_2d, quad, line"),
    ({"bbox_2d": [1, 2, 3, 4], "line": [1, 2, 3, 4]}, "object 0 has bbox_2d and line; it needs exactly one"),
    ({"bbox_2d": [1, 2, 3]}, "object 0: bbox_2d has 3 numbers, but needs 4"),
    ({"quad": [1, 2, 3, 4]}, "object 0: quad has 4 numbers, but needs 8"),
    ({"line": [1, 2, 3, 4, 5]}, "object 0: line has 5 numbers, but needs 4, 6, 8"),
]


@pytest.mark.parametrize(("entry", "message"), WRONG)
def test_objects_without_exactly_one_complete_geometry_are_errors(entry, message):
    with pytest.raises(DataError, match=message):
        map_objects([entry], [], 0.3)


def test_objects_stay_in_the_frame_after_any_chain():
    ops = ["hflip", {"rotate": {"max_deg": 30}}, {"scale": {"lo": 0.6, "hi": 1.7}}, "random_crop", "resize_by_scale"]
    augmenter = Augmenter.from_config({"ops": ops})
    kept = dropped = 0
    for seed in range(300):
        drawn = augmenter.draw(1200, 800, np.random.default_rng(seed))
        objects, gone = drawn.objects(RECORD)
        kept, dropped = kept + len(objects), dropped + len(gone)
        for entry in objects:
            key = next(key for key in ("bbox_2d", "quad", "line") if key in entry)
            assert inside(points_of(entry[key]), drawn.size)
            assert entry.get("line_points", 4) * 2 == (8 if key != "line" else len(entry["line"]))
    assert kept + dropped == 900
    assert dropped, "vacuous: nothing left the frame"
