"""Dense-caption records: every error is one line that names the record, the object, the key and the value."""

import pytest

from qwenvl_ft.data.conversation import Source
from qwenvl_ft.data.dense.dense_record import read_dense_record
from qwenvl_ft.data.readers.dense import matches
from qwenvl_ft.errors import DataError

BOX = {"bbox_2d": [90, 120, 420, 360], "desc": "switch/vendorA,fully visible"}
QUAD = {"quad": [500, 100, 700, 130, 690, 260, 495, 235], "desc": "label/readable"}
LINE = {"line": [60, 700, 300, 640, 520, 690, 900, 610], "line_points": 4, "desc": "cable/tied,no sleeve"}
RACK = {"images": ["img/rack_07.jpg"], "width": 1200, "height": 800, "objects": [BOX, QUAD, LINE]}


def dense(record):
    return read_dense_record(record, Source("racks", "racks.jsonl:7"), "/data")


def test_a_record_is_known_by_its_keys():
    assert matches(RACK)
    assert not matches({**RACK, "messages": []})
    assert not matches({"images": ["a.jpg"], "objects": {"ref": [], "bbox": []}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": None}, "racks.jsonl:7: no 'images'."),
        ({"objects": None}, "racks.jsonl:7: no 'objects'."),
        ({"width": None}, "racks.jsonl:7: no 'width'."),
        ({"height": None}, "racks.jsonl:7: no 'height'."),
        ({"width": 0}, "width=0 must be the stored image's width in pixels"),
        ({"width": "1200"}, "width='1200' must be"),
        ({"height": True}, "height=True must be"),
        ({"height": float("nan")}, "height=nan must be"),
        ({"height": 1.5}, "height=1.5 must be"),
        ({"images": "a.jpg"}, "images='a.jpg' must be a list"),
        ({"images": []}, "images=[] must be a list with at least one"),
        ({"images": ["a.jpg", 3]}, "images[1]=3 is not an image"),
        ({"objects": {}}, "objects={} must be a list"),
        ({"objects": [BOX, "x"]}, "objects[1]='x' must be an object"),
        ({"objects": [BOX, {"bbox_2d": [1, 2, 3, 4]}]}, "objects[1].desc=None must be a text"),
        ({"objects": [{**BOX, "desc": " "}]}, "objects[0].desc=' ' must be a text"),
        (
            {"objects": [{"desc": "a", "bbox": [1, 2, 3, 4]}]},
            "objects[0] has no geometry among desc, bbox; it needs exactly one of bbox_2d, quad, line.",
        ),
        ({"objects": [BOX, BOX | QUAD]}, "objects[1] has bbox_2d and quad; it needs exactly one"),
        ({"objects": [{**BOX, "bbox_2d": "1,2,3,4"}]}, "bbox_2d='1,2,3,4' must be a flat list of 4"),
        ({"objects": [{**BOX, "bbox_2d": [1, 2, 3]}]}, "bbox_2d=[1, 2, 3] has 3 numbers, but needs 4."),
        ({"objects": [{"desc": "a", "quad": [1, 2, 3, 4]}]}, "quad=[1, 2, 3, 4] has 4 numbers, but needs 8."),
        ({"objects": [{"desc": "a", "line": [1, 2, 3, 4, 5]}]}, "has 5 numbers, but needs 4, 6, 8, ..."),
        ({"objects": [{"desc": "a", "line": [1, 2]}]}, "has 2 numbers, but needs 4, 6, 8, ..."),
        ({"objects": [{"desc": "a", "line": [[1, 2], [3, 4]]}]}, "line[0]=[1, 2] must be a finite number"),
        ({"objects": [{**BOX, "bbox_2d": [1, 2, float("inf"), 4]}]}, "bbox_2d[2]=inf must be a finite number"),
        ({"objects": [{**BOX, "bbox_2d": [1, 2, 10**400, 4]}]}, "must be a finite number"),
        ({"objects": [{**BOX, "bbox_2d": [1, False, 3, 4]}]}, "bbox_2d[1]=False must be a finite number"),
        ({"objects": [{**BOX, "bbox_2d": [420, 120, 90, 360]}]}, "x1=420 is not less than x2=90"),
        ({"objects": [{**BOX, "bbox_2d": [90, 120, 420, 120]}]}, "y1=120 is not less than y2=120"),
        (
            {"objects": [BOX, {**BOX, "bbox_2d": [90, 120, 1201.5, 360]}]},
            "objects[1].bbox_2d[2]=1201.5 is outside the image: x goes from 0 to width=1200",
        ),
        ({"objects": [{**QUAD, "quad": [*QUAD["quad"][:7], 802]}]}, "quad[7]=802 is outside the image: y goes"),
        ({"objects": [{"desc": "a", "quad": [0, 0, 9, 0, 0, 9, 9, 9]}]}, "the quad has no area"),
        ({"objects": [{"desc": "a", "line": [5, 5, 5, 5]}]}, "all points of the line are the same"),
        ({"objects": [{**LINE, "line_points": 3}]}, "line_points=3, but line has 8 numbers, 4 points"),
        (
            {"objects": [{**BOX, "line_points": 2}]},
            "line_points=2 is only allowed with line, but this object has bbox_2d",
        ),
    ],
)
def test_a_malformed_record_is_refused_by_record_object_key_and_value(change, message):
    with pytest.raises(DataError) as caught:
        dense({**RACK, **change})
    assert message in str(caught.value)
    assert str(caught.value).startswith("racks.jsonl:7: ")
    assert "\n" not in str(caught.value)


def test_a_valid_record_passes_and_none_counts_as_absent():
    record = dense({**RACK, "objects": [{**BOX, "quad": None, "line": None, "line_points": None}]})
    assert record.objects == ({"desc": BOX["desc"], "bbox_2d": BOX["bbox_2d"]},)
    assert (record.size, record.images) == ((1200, 800), ("/data/img/rack_07.jpg",))
    assert dense({**RACK, "objects": [{**BOX, "bbox_2d": [-1, 0, 1201, 800.5]}]}), "a pixel outside is tolerated"
    assert dense({**RACK, "images": ["/abs/a.jpg"]}).images == ("/abs/a.jpg",)
