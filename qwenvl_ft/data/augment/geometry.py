"""Move the objects of a record through affine maps and changes of canvas, and clip them to the frame.

Coordinates are continuous: pixel i covers [i, i + 1), so a frame of width W spans 0 to W, and mirroring maps x to
W - x. No half-pixel corrections are needed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from math import dist
from typing import Any

from qwenvl_ft.errors import DataError

Point = tuple[float, float]
Points = list[Point]
Size = tuple[int, int]
"""(width, height) in pixels, in PIL's order."""
Matrix = tuple[float, float, float, float, float, float]
"""(a, b, c, d, e, f), which maps a point (x, y) to (a x + b y + c, d x + e y + f)."""

IDENTITY: Matrix = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
ROUNDING = 1e-6
"""Tolerance for floating point errors, in pixels or as a share."""


@dataclass(frozen=True, slots=True)
class Step:
    """One change of the frame: ``matrix`` maps old coordinates to new ones, and ``size`` is the new frame."""

    matrix: Matrix
    size: Size
    mirrored: tuple[bool, bool] = (False, False)
    """(left and right exchanged, top and bottom exchanged), on which the corner order of a quad depends."""

    def then(self, later: "Step") -> "Step":
        """Combine both into one step, which clips only at the frame of ``later``."""
        mirrored = (self.mirrored[0] != later.mirrored[0], self.mirrored[1] != later.mirrored[1])
        return Step(compose(later.matrix, self.matrix), later.size, mirrored)


def compose(second: Matrix, first: Matrix) -> Matrix:
    """Return the matrix that applies ``first`` and then ``second``."""
    a, b, c, d, e, f = second
    p, q, r, s, t, u = first
    return (a * p + b * s, a * q + b * t, a * r + b * u + c, d * p + e * s, d * q + e * t, d * r + e * u + f)


def invert(matrix: Matrix) -> Matrix:
    """Return the inverse matrix."""
    a, b, c, d, e, f = matrix
    det = a * e - b * d
    return (e / det, -b / det, (b * f - c * e) / det, -d / det, a / det, (c * d - a * f) / det)


def transform(points: Points, matrix: Matrix) -> Points:
    """Apply the matrix to every point.

    Plain Python is faster than numpy for the few points of a shape, and planning an epoch maps the points of every
    record.
    """
    a, b, c, d, e, f = matrix
    return [(a * x + b * y + c, d * x + e * y + f) for x, y in points]


def inside(points: Points, size: Size) -> bool:
    """Return True if all points are inside the frame or on its border."""
    width, height = size
    return all(0 <= x <= width and 0 <= y <= height for x, y in points)


def area(polygon: Points) -> float:
    """Return the area in square pixels."""
    return abs(sum(p[0] * q[1] - q[0] * p[1] for p, q in pairwise([*polygon, *polygon[:1]]))) / 2


def length(line: Points) -> float:
    """Return the length in pixels."""
    return sum(dist(p, q) for p, q in pairwise(line))


def without_repeats(points: Points) -> Points:
    """Remove points that are equal to the one before."""
    return points[:1] + [q for p, q in pairwise(points) if q != p]


def clip_polygon(polygon: Points, size: Size) -> Points:
    """Clip a polygon to the frame, one side after the other (Sutherland and Hodgman, 1974); [] if nothing is left."""
    if inside(polygon, size):
        return polygon
    for axis in (0, 1):
        for bound, sign in ((0.0, 1.0), (float(size[axis]), -1.0)):
            kept: Points = []
            for p, q in pairwise([*polygon[-1:], *polygon]):
                depth_p, depth_q = (p[axis] - bound) * sign, (q[axis] - bound) * sign
                if (depth_p < 0) != (depth_q < 0):
                    t = depth_p / (depth_p - depth_q)
                    other = p[1 - axis] + t * (q[1 - axis] - p[1 - axis])
                    kept.append((bound, other) if axis == 0 else (other, bound))
                if depth_q >= 0:
                    kept.append(q)
            polygon = without_repeats(kept)
    return polygon[:-1] if len(polygon) > 1 and polygon[0] == polygon[-1] else polygon


def clip_line(line: Points, size: Size) -> list[Points]:
    """Return the pieces of a polyline inside the frame, in order; vertices inside the frame are unchanged."""
    if inside(line, size):
        return [line]
    pieces: list[Points] = []
    connected = False
    for p, q in pairwise(line):
        span = _span(p, q, size)
        if span is None:
            connected = False
            continue
        start, end = (_between(p, q, t, size) for t in span)
        if connected and span[0] == 0:
            pieces[-1].append(end)
        else:
            pieces.append([start, end])
        connected = span[1] == 1
    return pieces


def _span(p: Point, q: Point, size: Size) -> tuple[float, float] | None:
    """Return the part of a segment inside the frame as parameters (start, end), 0 at p and 1 at q.

    Liang and Barsky, 1984.
    """
    first, last = 0.0, 1.0
    for axis in (0, 1):
        step = q[axis] - p[axis]
        if step == 0:
            if not 0 <= p[axis] <= size[axis]:
                return None
            continue
        crossings = sorted((-p[axis] / step, (size[axis] - p[axis]) / step))
        first, last = max(first, crossings[0]), min(last, crossings[1])
    return (first, last) if first <= last else None


def _between(p: Point, q: Point, t: float, size: Size) -> Point:
    """Return the point at parameter t of a segment: the exact ends for 0 and 1, and never outside the frame."""
    if t in (0, 1):
        return q if t else p
    x, y = (a + t * (b - a) for a, b in zip(p, q, strict=True))
    return min(max(x, 0.0), float(size[0])), min(max(y, 0.0), float(size[1]))


def as_quad(polygon: Points, first: Point) -> Points:
    """Reduce a visible polygon to four of its corners, in their order, beginning with the one nearest to ``first``.

    If one side of the frame cuts off two corners, four corners remain. If three remain, the midpoint of the longest
    side becomes the fourth. Neither changes the visible shape. If one corner is cut off, five corners remain, and the
    four that span the largest quad are taken. The result for a convex quad never extends beyond the object. It covers
    99 percent of the visible part for rectangles rotated by up to 17 degrees, and always at least 85 percent.
    """
    if len(polygon) == 3:
        i = max(range(3), key=lambda k: dist(polygon[k - 1], polygon[k]))
        p, q = polygon[i - 1], polygon[i]
        polygon = [*polygon[:i], ((p[0] + q[0]) / 2, (p[1] + q[1]) / 2), *polygon[i:]]
    quad = list(max(combinations(polygon, 4), key=lambda corners: area(list(corners))))
    start = min(range(4), key=lambda k: dist(quad[k], first))
    return quad[start:] + quad[:start]


def mirrored_corners(corners: Points, mirrored: tuple[bool, bool]) -> Points:
    """Reorder the corners so that mirroring gives top left, top right, bottom right, bottom left again."""
    order = [0, 1, 2, 3]
    if mirrored[0]:
        order = [order[k] for k in (1, 0, 3, 2)]
    if mirrored[1]:
        order = [order[k] for k in (3, 2, 1, 0)]
    return [corners[k] for k in order]


def follow(points: Points, step: Step) -> Points:
    """Return the points after a step; points outside the frame by a rounding error are moved to its border."""
    return [
        (_without_rounding(x, step.size[0]), _without_rounding(y, step.size[1]))
        for x, y in transform(points, step.matrix)
    ]


def _without_rounding(value: float, limit: int) -> float:
    if -ROUNDING < value < 0:
        return 0.0
    return float(limit) if limit < value < limit + ROUNDING else value


Kept = tuple[Points, float]
"""Points of the part of a shape that is kept, and its share of the whole shape; ([], 0) if nothing is kept."""
GONE: Kept = ([], 0.0)


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def _polygons(polygon: Points, steps: Sequence[Step]) -> tuple[Points, Points]:
    """Return a polygon after all steps: the whole one, and its visible part."""
    whole = visible = polygon
    for step in steps:
        whole, visible = follow(whole, step), clip_polygon(follow(visible, step), step.size)
    return whole, visible


def _keep_box(corners: Points, steps: Sequence[Step]) -> Kept:
    (x1, y1), (x2, y2) = corners
    whole, visible = _polygons([(x1, y1), (x2, y1), (x2, y2), (x1, y2)], steps)
    if len(visible) < 3:
        return GONE
    xs, ys = zip(*visible, strict=True)
    share = 1.0 if visible == whole else _share(area(visible), area(whole))
    return [(min(xs), min(ys)), (max(xs), max(ys))], share


def _keep_quad(corners: Points, steps: Sequence[Step]) -> Kept:
    mirrored = (sum(s.mirrored[0] for s in steps) % 2 == 1, sum(s.mirrored[1] for s in steps) % 2 == 1)
    whole, visible = _polygons(mirrored_corners(corners, mirrored), steps)
    if visible == whole:
        return whole, 1.0
    if len(visible) < 3:
        return GONE
    quad = as_quad(visible, whole[0])
    return quad, _share(area(quad), area(whole))


def _keep_line(line: Points, steps: Sequence[Step]) -> Kept:
    whole = line
    pieces = [line]
    for step in steps:
        whole = follow(whole, step)
        pieces = [part for piece in pieces for part in clip_line(follow(piece, step), step.size)]
    longest = without_repeats(max(pieces, key=length, default=[]))
    if len(longest) < 2:
        return GONE
    return longest, _share(length(longest), length(whole))


@dataclass(frozen=True, slots=True)
class Shape:
    """One kind of geometry."""

    keep: Callable[[Points, Sequence[Step]], Kept]
    """Moves the points through the steps and clips them."""
    counts: str
    """Allowed numbers of coordinates, for messages."""
    is_count: Callable[[int], bool]
    """Returns True for an allowed number of coordinates."""


SHAPES = {
    "bbox_2d": Shape(_keep_box, "4", lambda n: n == 4),
    "quad": Shape(_keep_quad, "8", lambda n: n == 8),
    "line": Shape(_keep_line, "4, 6, 8, ...", lambda n: n >= 4 and n % 2 == 0),
}
"""Key of an object's geometry -> kind of geometry."""


def map_objects(
    objects: Sequence[Mapping[str, Any]], steps: Sequence[Step], min_visible: float
) -> tuple[list[dict[str, Any]], list[int]]:
    """Return the objects after all steps, and the indices of those that left the frame.

    * ``bbox_2d`` becomes the bounding box of the visible part of its mapped rectangle.
    * ``quad`` keeps the order of its corners, top left first after mirroring; if the frame cuts it, see `as_quad`.
    * ``line`` keeps its longest piece in the frame; ``line_points`` is updated if present.

    An object is dropped if less than ``min_visible`` (share of its area or length) would be kept. All other keys are
    unchanged, so the caller must rebuild texts about all objects (the summary) if one is dropped.

    Raises:
        DataError: an object does not have exactly one geometry, or a wrong number of coordinates.
    """
    shapes = [_shape(entry, index) for index, entry in enumerate(objects)]
    if not steps:
        return [dict(entry) for entry in objects], []
    mapped, dropped = [], []
    for index, (entry, key) in enumerate(zip(objects, shapes, strict=True)):
        values = [float(value) for value in entry[key]]
        points, share = SHAPES[key].keep(list(zip(values[::2], values[1::2], strict=True)), steps)
        if share <= 0 or share < min_visible - ROUNDING:
            dropped.append(index)
            continue
        changed: dict[str, Any] = {key: [value for point in points for value in point]}
        if "line_points" in entry:
            changed["line_points"] = len(points)
        mapped.append({**entry, **changed})
    return mapped, dropped


def _shape(entry: Mapping[str, Any], index: int) -> str:
    """Return the key of the object's geometry."""
    keys = [key for key in SHAPES if key in entry]
    if len(keys) != 1:
        raise DataError(
            f"object {index} has {' and '.join(keys) or 'no geometry'}; it needs exactly one of {', '.join(SHAPES)}."
        )
    shape = SHAPES[keys[0]]
    if not shape.is_count(len(entry[keys[0]])):
        raise DataError(f"object {index}: {keys[0]} has {len(entry[keys[0]])} numbers, but needs {shape.counts}.")
    return keys[0]
