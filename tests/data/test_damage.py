"""Lines, rows and archive members that cannot be read are records that raise, among those that can be."""

import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cases import picture

from qwenvl_ft.data.dense.options import DenseOptions
from qwenvl_ft.data.encode.encoder import Encoder
from qwenvl_ft.data.plan.dataset import SampleDataset
from qwenvl_ft.data.plan.epochs import open_epochs
from qwenvl_ft.data.sources.records import load_records
from qwenvl_ft.errors import DataError

REST = "What follows in this file is left out too."


def record(k):
    return {"query": f"What is {k}?", "response": f"it is {k}"}


def jsonl(path):
    lines = [json.dumps(record(k)).encode() for k in range(5)]
    lines[1], lines[3] = b'{"query": "\xff"}', lines[3][:-4]
    path.write_bytes(b"\n".join(lines))
    return {1: r":2: not UTF-8", 3: r":4: not valid JSON"}


def packed_jsonl(path):
    path.write_text("\n".join([json.dumps([record(0), record(1)]), "[1, 2", json.dumps(record(3))]))
    return {2: r":2: not valid JSON"}


def json_list(path):
    path.write_text(json.dumps([record(k) for k in range(3)])[:-1] + ', {"query')
    return {3: rf":1: not valid JSON.*{REST}"}


def csv(path):
    path.write_text('query,response\nWhat is 0?,it is 0\nWhat is 1?,it,is 1\nWhat is 2?,it is 2\n"a"b,c\n')
    return {1: r":3: 3 cells for 2 columns", 3: rf":5: not a table: .*{REST}"}


def tar(path):
    with tarfile.open(path, "w") as file:
        for k in range(4):
            text = json.dumps(record(k)).encode()
            info = tarfile.TarInfo(f"{k}.json")
            data = text[:-3] if k == 1 else text
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    with path.open("r+b") as file:
        file.truncate(3 * 1024 + 100)  # within the header of the last member
    return {1: r"\[1.json\]: not valid JSON", 3: rf"cannot be read as .tar: .*{REST}"}


def parquet(path):
    """Two row groups of three rows; the pages of the second one are zeros."""
    table = pa.Table.from_pylist([record(k) for k in range(6)])
    pq.write_table(table, path, row_group_size=3, compression="none", use_dictionary=False)
    group = pq.ParquetFile(path).metadata.row_group(1)
    begin = group.column(0).data_page_offset
    with path.open("r+b") as file:
        file.seek(begin)
        file.write(b"\0" * group.total_byte_size)
    return dict.fromkeys((3, 4, 5), r"is damaged")


def no_records(path):
    path.write_text('{"a": 1}')
    return {0: rf"holds a list of records, or COCO's.*{REST}"}


FILES = {
    "a.jsonl": jsonl,
    "p.jsonl": packed_jsonl,
    "a.json": json_list,
    "a.csv": csv,
    "a.tar": tar,
    "a.parquet": parquet,
    "coco.json": no_records,
}

LENGTHS = {"a.jsonl": 5, "p.jsonl": 4, "a.json": 4, "a.csv": 4, "a.tar": 4, "a.parquet": 6, "coco.json": 1}


@pytest.mark.parametrize("name", FILES)
def test_what_cannot_be_read_raises_in_its_place_and_the_rest_is_read(tmp_path, name):
    path = tmp_path / name
    expected = FILES[name](path)
    for _ in range(2):  # copied to Arrow, then read from the copy
        records = load_records(str(path), cache_dir=tmp_path / "cache", skip=True)
        for index in range(len(records)):
            if index in expected:
                with pytest.raises(DataError, match=expected[index]):
                    records[index]
            else:
                found = records[index][0]
                assert (found["query"], found["response"]) == (f"What is {index}?", f"it is {index}")
        assert len(records) == LENGTHS[name]


@pytest.mark.parametrize("name", [name for name in FILES if name != "a.jsonl"])
def test_without_skip_the_first_damage_stops(tmp_path, name):
    path = tmp_path / name
    message = next(iter(FILES[name](path).values()))
    load_records(str(path), cache_dir=tmp_path / "cache", skip=True)  # its copy is not taken for a sound one
    with pytest.raises(DataError, match=message.removesuffix(f".*{REST}")) as raised:
        load_records(str(path), cache_dir=tmp_path / "cache")
    assert REST not in str(raised.value)


def test_a_sound_file_has_one_copy_for_both(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(record(k)) for k in range(3)))
    plain = load_records(str(path), cache_dir=tmp_path / "cache")
    skipping = load_records(str(path), cache_dir=tmp_path / "cache", skip=True)
    assert [skipping[k] for k in range(3)] == [plain[k] for k in range(3)]
    assert len(list((tmp_path / "cache").glob("*.arrow"))) == 1


def test_a_missing_or_empty_file_stops_also_with_skip(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    for name, message in (("empty.jsonl", "has no records"), ("none.jsonl", "there is no such file")):
        with pytest.raises(DataError, match=message):
            load_records(str(tmp_path / name), cache_dir=tmp_path / "cache", skip=True)


def test_the_first_readable_record_decides_how_a_file_is_read(tmp_path, processor):
    """The first line of dense captions is damaged; they are grouped all the same, and a group without it is whole."""
    picture(96, 64).save(tmp_path / "a.png")
    caption = {"images": ["a.png"], "width": 96, "height": 64}
    lines = [json.dumps(caption | {"objects": [{"desc": f"box/{k}", "bbox_2d": [10, 10, 60, 50]}]}) for k in range(4)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(['{"images', *lines[1:]]))
    records = load_records(str(path), cache_dir=tmp_path / "cache", skip=True)
    with pytest.raises(DataError, match=":1: not valid JSON"):
        open_epochs(records, DenseOptions(images_per_user_turn=2))
    epochs = open_epochs(records, DenseOptions(images_per_user_turn=2, summary_ratio=0.5), training=False, skip=True)
    assert type(epochs).__name__ == "DenseGroups"
    options = {"cache_dir": tmp_path / "lengths", "on_error": "skip", "max_bad_fraction": 0.5}
    epochs = open_epochs(records, DenseOptions(images_per_user_turn=2), training=False, skip=True)
    dataset = SampleDataset(epochs, Encoder(processor), **options)
    assert dataset.index.tolist() == [1]
    assert ":1: not valid JSON" in dataset.summary()
    with pytest.raises(DataError, match=r"1 of 2 samples cannot be read, more than data.max_bad_fraction=0.4"):
        SampleDataset(epochs, Encoder(processor), **options | {"max_bad_fraction": 0.4})
