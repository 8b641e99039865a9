"""Files on disk -> records: exact, sampled with a seed, memory-mapped, shared by processes."""

import json
import multiprocessing
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cases import picture

from qwenvl_ft.data.encode import Encoder
from qwenvl_ft.data.readers import read_record
from qwenvl_ft.data.records import load_records
from qwenvl_ft.data.registry import DATASETS, register_dataset
from qwenvl_ft.errors import DataError

MIXED = [
    {"id": "a", "image": "x.png", "conversations": [{"from": "human", "value": "ü\u2028 line"}]},
    {"id": 7, "image": ["x.png", "y.png"], "conversations": [], "extra": {"deep": [1, 2.5, None]}},
    {"messages": [{"role": "user", "content": "text"}, {"role": "user", "content": [{"type": "text", "text": "t"}]}]},
]


@pytest.fixture
def load(tmp_path):
    def open_records(selection, **options):
        return load_records(selection, cache_dir=tmp_path / "cache", **options)

    return open_records


def test_records_of_mixed_shapes_come_back_exactly(load, write_jsonl, tmp_path):
    path = write_jsonl(MIXED)
    (tmp_path / "same.json").write_text(json.dumps(MIXED, indent=2))
    for name, where in ((path, "data.jsonl:2"), (tmp_path / "same.json", "same.json[1]")):
        records = load(str(name))
        assert [records[i][0] for i in range(len(records))] == MIXED
        assert records[1][1].record.endswith(where)
        assert records[1][1].id == "7"
        assert records[1][2] == str(tmp_path)


def test_blank_lines_and_a_byte_order_mark_are_passed_over_and_lines_keep_their_numbers(load, tmp_path):
    path = tmp_path / "b.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"id": 1}\r\n\n   \n{"id": 2}')
    records = load(str(path))
    assert [records[i][0] for i in range(len(records))] == [{"id": 1}, {"id": 2}]
    assert records[1][1].record == f"{path}:4"


def test_parquet_with_image_bytes_encodes(load, tmp_path, processor):
    picture(64, 32).save(tmp_path / "x.png")
    turns = [{"from": "human", "value": "<image>\nwhat"}, {"from": "gpt", "value": "that"}]
    table = pa.table(
        {
            "image": pa.array([{"bytes": (tmp_path / "x.png").read_bytes(), "path": None}]),
            "conversations": pa.array([turns]),
        }
    )
    pq.write_table(table, tmp_path / "d.parquet")
    record, source, root = load(str(tmp_path / "d.parquet"))[0]
    assert source.record == f"{tmp_path / 'd.parquet'}[0]"
    sample = Encoder(processor)(read_record(record, source, root))
    path_sample = Encoder(processor)({"image": str(tmp_path / "x.png"), "conversations": turns})
    assert sample["input_ids"].tolist() == path_sample["input_ids"].tolist()


def numbered(count):
    return [{"id": i} for i in range(count)]


def ids(records):
    return [records[i][0]["id"] for i in range(len(records))]


def test_half_is_a_seeded_draw_without_repeats_and_more_than_all_repeats(load, write_jsonl):
    path = write_jsonl(numbered(100))
    half = ids(load(f"{path}%50", seed=1))
    assert len(half) == len(set(half)) == 50
    assert half == ids(load(f"{path}%50", seed=1)) == sorted(half)
    assert half != ids(load(f"{path}%50", seed=2))
    assert sorted(ids(load(f"{path}%200"))) == sorted(list(range(100)) * 2)
    more = ids(load(f"{path}%150"))
    assert len(more) == 150
    assert set(more) == set(range(100))


def test_several_sets_stand_in_the_order_given(load, write_jsonl):
    a, b = write_jsonl(numbered(3), "a.jsonl"), write_jsonl(numbered(2), "b.jsonl")
    records = load([str(b), str(a)])
    assert ids(records) == [0, 1, 0, 1, 2]
    assert records.summary() == {str(b): 2, str(a): 3}
    assert records.fingerprint != load([str(a), str(b)]).fingerprint


def test_a_registered_name_has_its_own_media_root(load, write_jsonl, monkeypatch):
    monkeypatch.setattr("qwenvl_ft.data.registry.DATASETS", DATASETS)
    path = write_jsonl(numbered(1))
    register_dataset("mine_with_root", str(path), "/images")
    assert load("mine_with_root")[0][2] == "/images"
    assert load(str(path), media_root="/other")[0][2] == "/other"
    del DATASETS["mine_with_root"]


def test_a_changed_file_is_read_again(load, write_jsonl):
    path = write_jsonl(numbered(3))
    before = load(str(path))
    write_jsonl(numbered(5))
    after = load(str(path))
    assert len(after) == 5
    assert after.fingerprint != before.fingerprint


def test_pickled_records_are_small_and_equal(load, write_jsonl):
    path = write_jsonl([{"id": i, "text": "x" * 1000} for i in range(2000)])
    records = load(str(path))
    data = pickle.dumps(records)
    assert len(data) < path.stat().st_size / 10
    assert pickle.loads(data)[1234] == records[1234]


def _ids_in_process(arguments):
    path, cache = arguments
    return ids(load_records(path, cache_dir=cache))


def test_two_processes_share_one_cache(tmp_path):
    path = tmp_path / "many.json"
    path.write_text(json.dumps(numbered(500)))
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        first, second = pool.map(_ids_in_process, [(str(path), str(tmp_path / "cache"))] * 2)
    assert first == second == list(range(500))


def test_wrong_files_are_one_clear_line(load, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"id": 1}\n{"id": }\n')
    (tmp_path / "bad.json").write_text('{"id": 1}\n{"id": 2}\n')
    (tmp_path / "dict.json").write_text('{"id": 1}')
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "bad.parquet").write_text("no parquet")
    cases = [
        ("bad.jsonl", r"bad\.jsonl:2: not valid JSON: Expecting value"),
        ("bad.json", r"bad\.json: not valid JSON: .*One record a line is \.jsonl"),
        ("dict.json", r"holds a list of records, this holds a dict"),
        ("empty.jsonl", "has no record"),
        ("bad.parquet", r"bad\.parquet cannot be read as \.parquet"),
        ("nowhere.json", "do not find .*nowhere"),
    ]
    for name, message in cases:
        with pytest.raises(DataError, match=message) as caught:
            ids(load(str(tmp_path / name)))
        assert "\n" not in str(caught.value)
