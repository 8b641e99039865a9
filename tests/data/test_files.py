"""Every file type gives back the records written to it, memory-mapped, each with its place."""

import io
import json
import logging
import pickle
import subprocess
import sys
import tarfile

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cases import picture

from qwenvl_ft.data.encode.encoder import Encoder
from qwenvl_ft.data.readers import read_record
from qwenvl_ft.data.sources.files import KINDS
from qwenvl_ft.data.sources.records import load_records
from qwenvl_ft.data.sources.registry import DATASETS, FILES
from qwenvl_ft.errors import DataError

TURNS = [{"from": "human", "value": "<image>\nwhat"}, {"from": "gpt", "value": "that"}]


@pytest.fixture
def load(tmp_path):
    def open_records(selection, **options):
        return load_records(selection, cache_dir=tmp_path / "cache", **options)

    return open_records


@pytest.fixture
def png(tmp_path):
    picture(64, 32).save(tmp_path / "x.png")
    return (tmp_path / "x.png").read_bytes()


def all_of(records):
    return [records[i][0] for i in range(len(records))]


def tokens(processor, entry):
    record, source, root = entry
    return Encoder(processor)(read_record(record, source, root))["input_ids"].tolist()


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def test_the_registry_allows_exactly_the_file_types_that_can_be_read():
    assert tuple(KINDS) == FILES


# -- columns -------------------------------------------------------------------------------------------------------


def test_parquet_with_structs_and_lists_of_images_encodes_as_the_files_do(load, tmp_path, processor, png):
    rows = [
        {"image": {"bytes": png, "path": None}, "conversations": TURNS},
        {"images": [{"bytes": png, "path": "x.png"}], "conversations": TURNS},
        {"images": [{"bytes": None, "path": "x.png"}], "conversations": TURNS},
    ]
    pq.write_table(pa.Table.from_pylist(rows[:1]), tmp_path / "some.parquet")
    pq.write_table(pa.Table.from_pylist(rows[1:]), tmp_path / "lists.parquet")
    expected = Encoder(processor)({"image": str(tmp_path / "x.png"), "conversations": TURNS})["input_ids"].tolist()
    for name in ("some.parquet", "lists.parquet"):
        records = load(str(tmp_path / name))
        assert [tokens(processor, records[i]) for i in range(len(records))] == [expected] * len(records)
    assert len(records) == 2


def saved(tmp_path, png, splits=("train", "test")):
    features = datasets.Features(
        {
            "id": datasets.Value("int64"),
            "images": datasets.List(datasets.Image()),
            "conversations": datasets.List({key: datasets.Value("string") for key in ("from", "value")}),
        }
    )
    made = {
        split: datasets.Dataset.from_list(
            [{"id": 10 * n + i, "images": [{"bytes": png, "path": None}], "conversations": TURNS} for i in range(3)],
            features=features,
        )
        for n, split in enumerate(splits)
    }
    datasets.DatasetDict(made).save_to_disk(tmp_path / "hub", num_shards=dict.fromkeys(splits, 2))
    made["train"].save_to_disk(tmp_path / "one")


def test_folders_of_datasets_are_read_in_place(load, tmp_path, processor, png):
    saved(tmp_path, png)
    expected = Encoder(processor)({"image": str(tmp_path / "x.png"), "conversations": TURNS})["input_ids"].tolist()
    for name, ids in (("hub:train", [0, 1, 2]), ("hub:test", [10, 11, 12]), ("one", [0, 1, 2])):
        records = load(str(tmp_path / name))
        assert [record["id"] for record in all_of(records)] == ids
        assert tokens(processor, records[2]) == expected
        assert records[1][1].record == f"{tmp_path / name.partition(':')[0]}[1]"
        assert pickle.loads(pickle.dumps(records))[2] == records[2]
        assert len(pickle.dumps(records)) < 5_000, "the records themselves are pickled"
    assert not list((tmp_path / "cache").glob("*.arrow")), "copied"
    assert len(load(f"{tmp_path / 'hub'}:train%200")) == 6
    assert load(str(tmp_path / "hub:train")).fingerprint != load(str(tmp_path / "hub:test")).fingerprint


def test_an_ambiguous_or_foreign_folder_is_one_clear_line(load, tmp_path, png):
    saved(tmp_path, png)
    (tmp_path / "plain").mkdir()
    cases = [
        ("hub", r"hub has the splits train, test\. Choose one: .*hub:train"),
        ("hub:tran", r"hub has no split 'tran'\. Did you mean 'train'\?"),
        ("one:train", r"one has no splits\. Give a file"),
        ("plain", r"plain was not written by Dataset\.save_to_disk"),
        ("nowhere:train", "do not find .*nowhere:train"),
    ]
    for name, message in cases:
        with pytest.raises(DataError, match=message) as caught:
            load(str(tmp_path / name))
        assert "\n" not in str(caught.value)


def test_turns_that_datasets_stored_as_columns_become_a_list_again(load, tmp_path):
    columns = {"from": ["human", "gpt"], "value": ["<image>\nwhat", "that"]}
    pq.write_table(pa.Table.from_pylist([{"conversations": columns}]), tmp_path / "d.parquet")
    assert all_of(load(str(tmp_path / "d.parquet"))) == [{"conversations": TURNS}]
    objects = {"ref": ["cat"], "bbox": [[1, 2, 3, 4]]}
    pq.write_table(pa.Table.from_pylist([{"objects": objects}]), tmp_path / "o.parquet")
    assert all_of(load(str(tmp_path / "o.parquet"))) == [{"objects": objects}], "these are columns already in the file"


# -- tables of text ------------------------------------------------------------------------------------------------


def test_csv_and_tsv_rows_are_records(load, tmp_path):
    (tmp_path / "a.csv").write_text(
        '\ufeffid,query,response,image\n1,"two\nlines, ""quoted""",[not JSON],a.png\n2,q,r,\n'
    )
    (tmp_path / "a.tsv").write_text('query\tresponse\timages\nq\tr\t"[""a.png"", ""b.png""]"\n')
    records = load(str(tmp_path / "a.csv"))
    first = {"id": "1", "query": 'two\nlines, "quoted"', "response": "[not JSON]", "image": "a.png"}
    assert all_of(records) == [first, {"id": "2", "query": "q", "response": "r"}]
    assert [records[i][1].record for i in range(2)] == [f"{tmp_path / 'a.csv'}:3", f"{tmp_path / 'a.csv'}:4"]
    assert all_of(load(str(tmp_path / "a.tsv"))) == [{"query": "q", "response": "r", "images": ["a.png", "b.png"]}]


def test_a_cell_may_be_an_image_in_base64(load, tmp_path):
    (tmp_path / "a.tsv").write_text(f"image\tquery\n/9j/{'A' * 300_000}\tq\n")
    assert len(all_of(load(str(tmp_path / "a.tsv")))[0]["image"]) == 300_004


def test_a_broken_table_is_one_clear_line(load, tmp_path):
    cases = [
        ("a,b\n1,2\n1,2,3\n", r"t\.csv:3: 3 cells for 2 columns \(a, b\)"),
        ('a\n"open\n', r"t\.csv:\d: not a table: unexpected end of data"),
        ("images,q\n[1 2],x\n", r"t\.csv:2: column 'images': not valid JSON"),
        ("a,b\n", "has no records"),
        ("", "has no records"),
    ]
    for content, message in cases:
        (tmp_path / "t.csv").write_text(content)
        with pytest.raises(DataError, match=message):
            load(str(tmp_path / "t.csv"))
    (tmp_path / "t.csv").write_bytes("a\nü\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"t\.csv: not UTF-8"):
        load(str(tmp_path / "t.csv"))


# -- webdataset ----------------------------------------------------------------------------------------------------


def test_a_shard_gives_back_the_samples_written_to_it(load, tmp_path, processor, png):
    record = {"conversations": TURNS}
    named = {"image": ["b.right.png", "b.left.png"], "conversations": [TURNS[0], TURNS[1]]}
    path = write_tar(
        tmp_path / "s.tar",
        [
            ("dir/a.png", png),
            ("dir/a.json", json.dumps(record).encode()),
            ("dir/b.left.png", b"left"),
            ("dir/b.right.png", b"right"),
            ("dir/b.json", json.dumps(named).encode()),
            ("dir/.c.png", b"hidden"),
            ("dir/c.query.txt", "quoi, où ?".encode()),
            ("dir/c.response.txt", b"there"),
            ("dir/c.jpg", b"pixels"),
        ],
    )
    records = load(path)
    assert all_of(records) == [
        {"id": "dir/a", "images": [png], "conversations": TURNS},
        {"id": "dir/b", "image": [b"right", b"left"], "conversations": TURNS},
        {"id": "dir/c", "query": "quoi, où ?", "response": "there", "images": [b"pixels"]},
    ]
    assert records[0][1].record == f"{path}[dir/a]"
    expected = Encoder(processor)({"image": str(tmp_path / "x.png"), "conversations": TURNS})["input_ids"].tolist()
    assert tokens(processor, records[0]) == expected
    arrow = next((tmp_path / "cache").glob("*.arrow"))
    assert png not in arrow.read_bytes(), "the pixels were copied"


def test_the_shard_is_read_as_datasets_reads_it(load, tmp_path, png):
    members = [m for i in range(3) for m in ((f"{i}.json", json.dumps({"n": i}).encode()), (f"{i}.png", png))]
    path = write_tar(tmp_path / "s.tar", members)
    theirs = datasets.load_dataset("webdataset", data_files=path, split="train", cache_dir=str(tmp_path / "hf"))
    theirs = theirs.cast_column("png", datasets.Image(decode=False))
    ours = all_of(load(path))
    assert [(r["id"], r["n"], r["images"]) for r in ours] == [
        (r["__key__"], r["json"]["n"], [r["png"]["bytes"]]) for r in theirs
    ]
    assert len(ours) == 3


def test_a_broken_shard_is_one_clear_line(load, tmp_path):
    (tmp_path / "z.tar").write_bytes(b"\x1f\x8b no tar" * 100)
    cases = [
        (str(tmp_path / "z.tar"), r"z\.tar cannot be read as \.tar"),
        (write_tar(tmp_path / "j.tar", [("a.json", b"{")]), r"j\.tar\[a\.json\]: not valid JSON"),
        (write_tar(tmp_path / "l.tar", [("a.json", b"[1]")]), r"l\.tar\[a\.json\]: a record must be a JSON object"),
        (write_tar(tmp_path / "t.tar", [("a.txt", b"\xfc")]), r"t\.tar\[a\.txt\]: not UTF-8"),
        (write_tar(tmp_path / "e.tar", []), "has no records"),
    ]
    for path, message in cases:
        with pytest.raises(DataError, match=message) as caught:
            load(path)
        assert "\n" not in str(caught.value)


# -- COCO ----------------------------------------------------------------------------------------------------------

COCO = {
    "info": {"year": 2017, "nested": [{"images": []}]},
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 18, "bbox": [100, 40.5, 50, 20], "iscrowd": 0, "segmentation": [[1]]},
        {"id": 2, "image_id": 7, "category_id": 1, "bbox": [-2, 10, 42, 700], "iscrowd": 0},
        {"id": 3, "image_id": 7, "category_id": 1, "bbox": [0, 0, 640, 480], "iscrowd": 1},
        {"id": 4, "image_id": 7, "category_id": 1, "bbox": [5, 5, 0, 9], "iscrowd": 0},
    ],
    "images": [
        {"id": 7, "file_name": "a.jpg", "width": 640, "height": 480, "license": 3},
        {"id": 9, "file_name": "b.jpg", "width": 10, "height": 10},
    ],
    "categories": [{"id": 1, "name": "person"}, {"id": 18, "name": "dog", "supercategory": "animal"}],
}


def test_a_coco_file_is_one_record_per_image(load, tmp_path, caplog):
    (tmp_path / "coco.json").write_text(json.dumps(COCO))
    with caplog.at_level(logging.WARNING):
        records = load(str(tmp_path / "coco.json"))
    logged = "\n".join(caplog.messages)
    assert "left out 1 regions of crowds" in logged
    assert "left out 1 boxes without area in the image" in logged
    assert [records[i][1].record for i in range(2)] == [f"{tmp_path}/coco.json:images[{i}]" for i in range(2)]
    assert [records[i][1].id for i in range(2)] == ["7", "9"]
    conversation = read_record(*records[0])
    question, answer = conversation.messages
    assert question.content[0].value == str(tmp_path / "a.jpg")
    assert "person, dog" in question.content[1].text
    by_hand = [
        {"bbox_2d": [0, 21, 62, 1000], "label": "person"},  # 40 / 640 = 62.5 rounds to even; 710 > 480 is clipped
        {"bbox_2d": [156, 84, 234, 126], "label": "dog"},  # 100/640, 40.5/480, 150/640, 60.5/480
    ]
    assert json.loads(answer.content[0].text) == by_hand
    assert read_record(*records[1]).messages[1].content[0].text == "[]"


def test_a_coco_file_can_be_dense_captions(load, tmp_path, monkeypatch):
    picture(640, 480).save(tmp_path / "a.jpg")
    (tmp_path / "coco.json").write_text(json.dumps(COCO))
    entry = {"annotation_path": str(tmp_path / "coco.json"), "reader": "dense"}
    monkeypatch.setitem(DATASETS, "as_dense", entry)
    answer = json.loads(read_record(*load("as_dense")[0]).messages[-1].content[0].text)
    objects = next(iter(answer.values()))
    assert [entry["desc"] for entry in objects.values()] == ["dog", "person"]


def test_a_wrong_coco_file_is_one_clear_line(load, tmp_path):
    def without(part, key):
        return COCO | {part: [{k: v for k, v in entry.items() if k != key} for entry in COCO[part]]}

    cases = [
        ({"images": [], "annotations": []}, r"this holds a dict of images, annotations, without categories"),
        ({}, "this holds a dict of nothing, without images"),
        (without("images", "width"), r"coco\.json:images\[0\] has no 'width'"),
        (without("annotations", "bbox"), r"annotations\[0\] has bbox=None; it must be \[x, y, width, height\]"),
        (without("annotations", "image_id"), r"annotations\[0\] has image_id=None, which no image has"),
        (COCO | {"categories": [{"id": 1, "name": "person"}]}, r"annotations\[0\] has category_id=18, which no"),
        (COCO | {"images": COCO["images"] * 2}, "2 images have the same id as another image"),
        (COCO | {"categories": [{"id": 1}]}, r"categories\[0\] must be"),
        (COCO | {"images": [5]}, r"images\[0\] must be an object"),
    ]
    for content, message in cases:
        (tmp_path / "coco.json").write_text(json.dumps(content))
        with pytest.raises(DataError, match=message) as caught:
            load(str(tmp_path / "coco.json"))
        assert "\n" not in str(caught.value)


OPEN = """
import resource, sys
from qwenvl_ft.data.sources.records import load_records
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
records = load_records(sys.argv[1], cache_dir=sys.argv[2])
assert len(records) == 20_000 and records[19_999][0]["id"] == 19_999
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_a_second_process_does_not_load_the_coco_file(tmp_path):
    many = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 64, "height": 64} for i in range(20_000)],
        "annotations": [
            {"image_id": i, "category_id": 0, "bbox": [1, 2, 3, 4], "segmentation": [list(range(300))]}
            for i in range(20_000)
        ],
        "categories": [{"id": 0, "name": "x"}],
    }
    path = tmp_path / "many.json"
    path.write_text(json.dumps(many))
    size_mib = path.stat().st_size / 2**20
    run = [sys.executable, "-c", OPEN, str(path), str(tmp_path / "cache")]
    first, second = (int(subprocess.run(run, check=True, capture_output=True).stdout) for _ in range(2))
    assert size_mib > 20
    assert first < size_mib, "the file was not streamed"
    assert second < 8, "the records were loaded"
