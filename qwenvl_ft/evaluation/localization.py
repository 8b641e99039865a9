"""Scores the boxes, quads and lines of answers against the expected ones, each kind separately.

Predicted objects are matched one to one with expected ones of the same kind and class, the most similar pair first.
Similarity is the intersection over union for boxes and quads, and 1 - (mean distance / image diagonal) for lines.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwenvl_ft.errors import DataError
from qwenvl_ft.evaluation.matching import box_iou, match, require_pairs
from qwenvl_ft.evaluation.parse import clean, load_json, plain

Points = NDArray[np.float64]
"""float64[points, 2] as (x, y)."""

NAMES = ("desc", "label")
"""Keys of an object's description: in dense captions, and in Qwen's own form of grounding."""
LINE_SAMPLES = 64
"""Equally spaced points of a line at which its distance from the other line is measured."""


@dataclass(frozen=True)
class LocatedObject:
    """An object of a dense caption."""

    kind: str
    """``bbox``, ``quad`` or ``line``."""
    desc: str
    points: Points

    @property
    def label(self) -> str:
        """Class of the object: the description up to the first slash."""
        return plain(self.desc.split("/")[0])


def parse_objects(text: str) -> dict[str, list[LocatedObject]] | None:
    """Parse a dense caption's JSON into image -> its objects, in order; None if it cannot be read.

    Accepts ``{image: {object: {"desc": ..., KIND: [...]}}}``, and a single image's ``{object: {...}}``, single object
    or list of objects (with ``label`` in place of ``desc`` too), stored under image ``""``. The JSON may be fenced or
    truncated. Objects without exactly one well-formed geometry are left out.
    """
    value = load_json(clean(text))
    if isinstance(value, list):
        return {"": _objects(value)}
    if not isinstance(value, dict):
        return None
    if _is_object(value):
        return {"": _objects([value])}
    if any(isinstance(inner, (dict, list)) and not _is_object(inner) for inner in value.values()):
        return {name: _objects(inner) for name, inner in value.items()}
    return {"": _objects(value)}


def geometry_accuracy(
    references: Sequence[str],
    answers: Sequence[str],
    *,
    sizes: Sequence[Sequence[tuple[float, float]]] | None = None,
    scale: float = 1000.0,
    iou: float = 0.5,
    distance: float = 0.02,
    by_class: bool = True,
) -> dict[str, Any]:
    """Return precision, recall, F1 and mean similarity for ``bbox``, ``quad`` and ``line``, and the overall F1.

    Args:
        sizes: (width, height) of each image of each record, in the unit of the coordinates. Only the distance of lines
            depends on it.
        scale: width and height of the images without ``sizes``: 1000 for norm1000, 100 for norm100.
        iou: a box or quad is found if its IoU is above this.
        distance: a line is found if its mean distance, in image diagonals, is below this.
        by_class: True matches only objects of the same class.

    Raises:
        DataError: a reference holds no objects that can be read, or the sequences are empty or differ in length.
    """
    require_pairs(references, answers)
    tallies = {kind: Tally() for kind in KINDS}
    unparsed = 0
    for number, (reference, answer) in enumerate(zip(references, answers, strict=True)):
        expected, predicted = _required(reference, number), parse_objects(answer)
        unparsed += predicted is None
        for image, (wanted, found) in enumerate(_by_image(expected, predicted or {})):
            size = sizes[number][image] if sizes is not None and image < len(sizes[number]) else (scale, scale)
            for kind, tally in tallies.items():
                tally.add(*_kind_pairs(kind, wanted, found, np.asarray(size), iou, distance, by_class))
    scores: dict[str, Any] = {kind: tally.scores() for kind, tally in tallies.items()}
    overall = Tally()
    for tally in tallies.values():
        overall.add(tally.likeness, tally.expected, tally.found)
    return scores | {"f1": overall.scores()["f1"], "count": len(references), "n_unparsed": unparsed}


def _required(reference: str, number: int) -> dict[str, list[LocatedObject]]:
    """Parse a reference, of which nothing may be left out.

    Raises:
        DataError: it is no JSON, or one of its objects cannot be read.
    """
    objects = parse_objects(reference)
    whole = load_json(clean(reference))
    if objects is None:
        raise DataError(f"reference {number} is not a dense caption: {reference[:80]!r}.")
    if broken := [item for item in _object_like(whole) if read_object(item) is None]:
        raise DataError(
            f"reference {number} has an object without exactly one well-formed bbox_2d, quad or line: "
            f"{str(broken[0])[:80]}."
        )
    if whole and not any(objects.values()) and not _only_empty(whole):
        raise DataError(f"reference {number} has no object with a bbox_2d, quad or line: {reference[:80]!r}.")
    return objects


def _object_like(value: Any) -> Iterator[Any]:
    """Yield the dicts in parsed JSON that are meant as objects."""
    if _is_object(value):
        yield value
    elif isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _object_like(inner)


def _only_empty(value: Any) -> bool:
    """Return True for JSON that says that images have no objects, such as ``{"image_1": {}}``."""
    if isinstance(value, dict):
        return all(isinstance(inner, (dict, list)) and _only_empty(inner) for inner in value.values())
    return value == []


class Tally:
    """Matches of one kind over a whole set."""

    def __init__(self) -> None:
        self.likeness: list[float] = []
        """Similarity of each matched pair."""
        self.expected = self.found = 0
        """Numbers of expected and of predicted objects."""

    def add(self, likeness: list[float], expected: int, found: int) -> None:
        self.likeness += likeness
        self.expected += expected
        self.found += found

    def scores(self) -> dict[str, Any]:
        """Return the scores; None where the denominator is 0."""
        hits = len(self.likeness)
        both = self.expected + self.found
        return {
            "precision": hits / self.found if self.found else None,
            "recall": hits / self.expected if self.expected else None,
            "f1": 2 * hits / both if both else None,
            "mean_likeness": sum(self.likeness) / hits if hits else None,
            "tp": hits,
            "fp": self.found - hits,
            "fn": self.expected - hits,
        }


def quad_iou(quad: Points, other: Points) -> float:
    """Return the intersection over union of two simple quads, convex or not, with corners in either orientation.

    Each quad is split into two triangles, whose intersections are exact. A self-intersecting quad is replaced by its
    convex hull.
    """
    a, b = _triangles(quad), _triangles(other)
    inner = sum(_area(_clip(triangle, window)) for triangle in a for window in b)
    union = sum(map(_area, a)) + sum(map(_area, b)) - inner
    return float(inner / union) if union > 0 else 0.0


def line_distance(line: Points, other: Points, size: Points) -> float:
    """Return the symmetric mean distance between two lines, in image diagonals.

    It does not depend on the direction of a line or on its number of points.
    """
    there, back = _mean_distance(line, other), _mean_distance(other, line)
    return (there + back) / 2 / float(np.hypot(*size))


def _box_likeness(a: list[Points], b: list[Points], size: Points) -> Points:
    def corners(boxes: list[Points]) -> list[Any]:
        return [(*box.min(axis=0), *box.max(axis=0)) for box in boxes]

    return box_iou(corners(a), corners(b))


def _quad_likeness(a: list[Points], b: list[Points], size: Points) -> Points:
    return np.array([[quad_iou(quad, other) for other in b] for quad in a])


def _line_likeness(a: list[Points], b: list[Points], size: Points) -> Points:
    return np.array([[1 - line_distance(line, other, size) for other in b] for line in a])


KINDS: dict[str, tuple[str, Callable[[int], bool], Callable[[list[Points], list[Points], Points], Points]]] = {
    "bbox": ("bbox_2d", lambda numbers: numbers == 4, _box_likeness),
    "quad": ("quad", lambda numbers: numbers == 8, _quad_likeness),
    "line": ("line", lambda numbers: numbers >= 4 and numbers % 2 == 0, _line_likeness),
}
"""Kind -> (its key in a caption, test for the count of numbers, similarity float64[a, b] of two lists of objects)."""


def _by_image(
    expected: dict[str, list[LocatedObject]], predicted: dict[str, list[LocatedObject]]
) -> list[tuple[list[LocatedObject], list[LocatedObject]]]:
    """Pair expected and predicted objects by image name, or in order if the names differ."""
    if set(predicted) <= set(expected):
        return [(objects, predicted[name] if name in predicted else []) for name, objects in expected.items()]
    return list(zip_longest(expected.values(), predicted.values(), fillvalue=[]))


def _kind_pairs(
    kind: str,
    expected: list[LocatedObject],
    found: list[LocatedObject],
    size: Points,
    iou: float,
    distance: float,
    by_class: bool,
) -> tuple[list[float], int, int]:
    """Return the similarities of matched pairs of a kind in one image, and the counts of expected and found objects."""
    a, b = ([item for item in side if item.kind == kind] for side in (expected, found))
    if not a or not b:
        return [], len(a), len(b)
    likeness = KINDS[kind][2]([item.points for item in a], [item.points for item in b], size)
    if by_class:
        likeness = likeness * np.array([[x.label == y.label for y in b] for x in a])
    pairs = match(likeness, 1 - distance if kind == "line" else iou)
    return [float(likeness[pair]) for pair in pairs], len(a), len(b)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict) and ("desc" in value or any(key in value for key, _, _ in KINDS.values()))


def _objects(value: Any) -> list[LocatedObject]:
    values = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    return [found for found in map(read_object, values) if found is not None]


def read_object(value: Any) -> LocatedObject | None:
    """Read one object of a caption; None unless it has exactly one well-formed geometry."""
    if not isinstance(value, dict):
        return None
    kinds = [kind for kind, (key, _, _) in KINDS.items() if key in value]
    if len(kinds) != 1:
        return None
    key, fits, _ = KINDS[kinds[0]]
    try:
        numbers = np.asarray(value[key], dtype=np.float64).reshape(-1)
    except (TypeError, ValueError):
        return None
    if not fits(numbers.size) or not np.isfinite(numbers).all():
        return None
    desc = next((str(value[key]) for key in NAMES if key in value), "")
    return LocatedObject(kinds[0], desc, numbers.reshape(-1, 2))


def _triangles(quad: Points) -> list[Points]:
    """Split a quad into two counterclockwise triangles; a self-intersecting quad is replaced by its convex hull."""
    for corners in (quad, np.roll(quad, -1, axis=0)):
        first, second = corners[[0, 1, 2]], corners[[0, 2, 3]]
        if _turn(*first) * _turn(*second) >= 0:  # the diagonal between them is inside
            return [_forward(first), _forward(second)]
    around = quad - quad.mean(axis=0)
    hull = quad[np.argsort(np.arctan2(around[:, 1], around[:, 0]))]
    return [_forward(hull[[0, 1, 2]]), _forward(hull[[0, 2, 3]])]


def _clip(polygon: Points, window: Points) -> Points:
    """Clip a polygon to a counterclockwise triangle (Sutherland and Hodgman 1974)."""
    for start, end in zip(window, np.roll(window, -1, axis=0), strict=True):
        if not len(polygon):
            break
        side = np.array([_turn(start, end, point) for point in polygon])
        kept: list[Any] = []
        for k, point in enumerate(polygon):
            before, now = side[k - 1], side[k]
            if (before < 0) != (now < 0):
                kept.append(polygon[k - 1] + (point - polygon[k - 1]) * before / (before - now))
            if now >= 0:
                kept.append(point)
        polygon = np.array(kept).reshape(-1, 2)
    return polygon


def _turn(a: Points, b: Points, c: Points) -> float:
    return float((b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0]))


def _forward(triangle: Points) -> Points:
    return triangle if _turn(*triangle) >= 0 else triangle[::-1]


def _area(polygon: Points) -> float:
    if len(polygon) < 3:
        return 0.0
    x, y = polygon.T
    return abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2


def _mean_distance(line: Points, other: Points) -> float:
    """Return the mean distance of equally spaced points of a line from the nearest point of the other line."""
    points = _resampled(line)[:, None]  # [samples, 1, 2]
    start, step = other[:-1], np.diff(other, axis=0)  # [segments, 2]
    length = (step**2).sum(axis=-1)
    along = ((points - start) * step).sum(axis=-1) / np.where(length > 0, length, 1)
    nearest = start + np.clip(along, 0, 1)[..., None] * step  # [samples, segments, 2]
    return float(np.linalg.norm(points - nearest, axis=-1).min(axis=1).mean())


def _resampled(line: Points) -> Points:
    lengths = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(line, axis=0), axis=1))])
    places = np.linspace(0, lengths[-1], LINE_SAMPLES)
    return np.stack([np.interp(places, lengths, line[:, axis]) for axis in (0, 1)], axis=1)
