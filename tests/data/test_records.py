"""Files on disk -> records: exact, sampled with a seed, memory-mapped, shared by processes."""

import json
import multiprocessing
import os
import pickle
import socket

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cases import picture

from qwenvl_ft.data.encode.encoder import Encoder
from qwenvl_ft.data.readers import read_record
from qwenvl_ft.data.sources import json_files
from qwenvl_ft.data.sources.records import load_records
from qwenvl_ft.data.sources.registry import DATASETS, register_dataset
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


def test_blank_lines_and_a_byte_order_mark_are_skipped_and_lines_keep_their_numbers(load, tmp_path):
    path = tmp_path / "b.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"id": 1}\r\n\n   \n{"id": 2}')
    records = load(str(path))
    assert [records[i][0] for i in range(len(records))] == [{"id": 1}, {"id": 2}]
    assert records[1][1].record == f"{path}:4"


def test_a_list_is_streamed_as_json_reads_it(load, tmp_path, monkeypatch):
    """Chunks of every size split records, words, numbers and escapes at every position."""
    listed = [
        {"t": 'ü\n"]}', "n": [-1.5e-3, 12345, True, None]},
        {"t": "\U0001f600 \u2028"},
        {"deep": [[{"a": {}}]]},
    ]
    text = json.dumps(listed, indent=1, ensure_ascii=False) + "\n"
    escaped = json.dumps(listed)
    for chunk in (*range(1, 40), 2**20):
        monkeypatch.setattr(json_files, "CHUNK", chunk)
        for number, content in enumerate((text, escaped)):
            path = tmp_path / f"{chunk}-{number}.json"
            path.write_text(content, encoding="utf-8")
            read = list(json_files.read_json(path))
            assert [json.loads(record) for _, record in read] == listed
            assert [place for place, _ in read] == ["[0]", "[1]", "[2]"]
    assert [record for _, record in read] == [json.dumps(record) for record in listed], "the text was changed"


def test_packed_samples_become_records_that_know_their_place(load, tmp_path):
    packed = [{"id": "a"}, [{"id": "b"}, {"id": "c"}]]
    (tmp_path / "p.json").write_text(json.dumps(packed))
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, packed)))
    for name, places in (("p.json", ["[0]", "[1][0]", "[1][1]"]), ("p.jsonl", [":1", ":2[0]", ":2[1]"])):
        records = load(str(tmp_path / name))
        assert ids(records) == ["a", "b", "c"]
        assert [source.record for _, source, _ in records] == [f"{tmp_path / name}{place}" for place in places]


@pytest.mark.parametrize("name", ["a[1].jsonl", "a*.jsonl", "a%50.jsonl", "a b,c.jsonl"])
def test_a_file_name_is_not_read_as_a_pattern(load, tmp_path, name):
    (tmp_path / name).write_text('{"id": 1}')
    (tmp_path / "ab.jsonl").write_text('{"id": 2}')
    assert ids(load([str(tmp_path / name)])) == [1]
    assert ids(load([f"{tmp_path / name}%200"])) == [1, 1]


def test_loading_contacts_no_host(load, write_jsonl, monkeypatch):
    """Cluster nodes may have no internet access, and no host learns which data are used."""
    for module in ("datasets.config", "huggingface_hub.constants"):  # offline as these tests are, nothing could ask
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *_, **more: pytest.fail(f"asked for {host}"))
    assert len(load(str(write_jsonl(numbered(2))))) == 2


def test_a_null_in_json_is_kept_and_a_null_in_parquet_is_an_absent_field(load, write_jsonl, tmp_path):
    rows = [{"id": 1, "call": {"x": None}}, {"id": 2, "call": {"x": 3}}]
    assert load(str(write_jsonl(rows)))[0][0] == rows[0]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    assert load(str(tmp_path / "d.parquet"))[0][0] == {"id": 1, "call": {}}


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
    assert load([str(a), str(a)]).summary() == {str(a): 6}
    assert ids(records)[-1] == records[-1][0]["id"] == 2
    with pytest.raises(IndexError):
        records[5]
    assert records.fingerprint != load([str(a), str(b)]).fingerprint


def test_a_registered_name_has_its_own_media_root(load, write_jsonl, monkeypatch):
    monkeypatch.setattr("qwenvl_ft.data.sources.registry.DATASETS", DATASETS)
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
    stat = path.stat()
    write_jsonl(numbered(6))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert len(load(str(path))) == 6, "the modification time alone is not enough"


def test_the_fingerprint_depends_on_the_selected_rows_only(load, write_jsonl):
    path = write_jsonl(numbered(20))
    key = {rate: [load(f"{path}%{rate}", seed=seed).fingerprint for seed in (1, 2)] for rate in (50, 100, 200)}
    assert key[100][0] == key[100][1], "nothing is drawn, so the seed must not matter"
    assert key[50][0] != key[50][1]
    assert len({*key[50], *key[100], *key[200]}) == 4


def test_new_files_are_copied_by_several_processes(load, write_jsonl, tmp_path):
    paths = [str(write_jsonl(numbered(count), f"{count}.jsonl")) for count in (1, 2, 3)]
    assert ids(load(paths, num_proc=2)) == [0, 0, 1, 0, 1, 2]
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(DataError, match=r"bad\.json"):
        load([str(tmp_path / "bad.json"), str(write_jsonl(numbered(4), "4.jsonl"))], num_proc=2)
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_a_registered_reader_reads_in_a_worker_too(load, write_jsonl, monkeypatch):
    monkeypatch.setitem(DATASETS, "typo", {"annotation_path": str(write_jsonl(numbered(1))), "reader": "mesages"})
    record, source, root = pickle.loads(pickle.dumps(load("typo")[0]))
    with pytest.raises(DataError, match=r"unknown format 'mesages'\. Did you mean 'messages'"):
        read_record(record, source, root)


def test_pickled_records_are_small_and_equal(load, write_jsonl):
    path = write_jsonl([{"id": i, "text": "x" * 1000} for i in range(2000)])
    records = load(str(path))
    data = pickle.dumps(records)
    assert len(data) < 2_000
    assert pickle.loads(data)[1234] == records[1234]
    assert pickle.loads(pickle.dumps(load(f"{path}%10")))[7] == load(f"{path}%10")[7]


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
    (tmp_path / "typo.json").write_text('[{"id": 1},\n\n{"id": }]')
    (tmp_path / "comma.json").write_text('[{"id": 1}\n{"id": 2}]')
    (tmp_path / "tail.json").write_text('[{"id": 1}] [')
    (tmp_path / "cut.json").write_text('[{"id": "a')
    (tmp_path / "latin.json").write_bytes('[{"name": "ü"}]'.encode("latin-1"))
    (tmp_path / "latin.jsonl").write_bytes('{"id": 1}\n{"name":"ü"}'.encode("latin-1"))
    (tmp_path / "list.jsonl").write_text('[{"id": 1}\n')
    (tmp_path / "few.jsonl").write_text('{"id": 1}\n{"id": 2}\n')
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "bad.parquet").write_text("no parquet")
    cases = [
        ("bad.jsonl", r"bad\.jsonl:2: not valid JSON: Expecting value"),
        ("bad.json", r"bad\.json: a \.json file holds a list of records, .* one record per line must be named \.jsonl"),
        ("dict.json", r"holds a list of records, or COCO.s images, .* this holds a dict of id, without images"),
        ("typo.json", r"typo\.json:3: not valid JSON: Expecting value"),
        ("comma.json", r"comma\.json:2: not valid JSON: Expecting ',' or '\]' behind a record"),
        ("tail.json", r"tail\.json:1: not valid JSON: more text behind the list"),
        ("cut.json", r"cut\.json:1: not valid JSON: Unterminated string"),
        ("latin.json", r"latin\.json: not UTF-8: .*b'\\xfc'"),
        ("latin.jsonl", r"latin\.jsonl:2: not UTF-8: invalid start byte at byte 9"),
        ("list.jsonl", r"list\.jsonl:1: not valid JSON"),
        ("few.jsonl%10", r"data set .*few\.jsonl: 10% of 2 records is 0 records\. Raise the rate"),
        ("empty.jsonl", "has no records"),
        ("bad.parquet", r"bad\.parquet cannot be read as \.parquet"),
        ("nowhere.json", "do not find .*nowhere"),
    ]
    for name, message in cases:
        with pytest.raises(DataError, match=message) as caught:
            ids(load(str(tmp_path / name)))
        assert "\n" not in str(caught.value)


def numbered_files(folder, sizes):
    """Write files 0.jsonl, 1.jsonl, ... with consecutively numbered records."""
    count = 0
    for name, size in enumerate(sizes):
        lines = [json.dumps({"id": count + k, "query": "a", "response": "b"}) for k in range(size)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
        count += size


def test_a_pattern_is_one_data_set_of_its_files(tmp_path):
    numbered_files(tmp_path, (30, 50, 20))
    pattern = str(tmp_path / "?.jsonl")
    assert ids(load_records(pattern)) == list(range(100))
    half = ids(load_records([f"{pattern}%50"], seed=1))
    assert len(half) == len(set(half)) == 50
    assert half == sorted(half)
    assert {number // 10 for number in half} > {0, 1, 4, 6, 9}, "drawn from all files"
    assert half != ids(load_records([f"{pattern}%50"], seed=2))
    assert load_records([f"{pattern}%50"], seed=1).fingerprint == load_records([f"{pattern}%50"], seed=1).fingerprint
    weighted = ids(load_records({pattern: 1, str(tmp_path / "2.jsonl"): 1}))
    assert sum(number < 80 for number in weighted) + weighted.count(80) <= 40, "a pattern is weighted as a whole"
    with pytest.raises(DataError, match=r"do not find .*nowhere-\*\.tar: no file matches"):
        load_records(str(tmp_path / "nowhere-*.tar"))
    (tmp_path / "3.txt").write_text("x")
    with pytest.raises(DataError, match=r"matches .*3\.txt, but a data set must be a file ending in"):
        load_records(str(tmp_path / "*"))


def test_a_number_of_records_is_drawn_without_repeats_as_long_as_there_are_enough(tmp_path):
    numbered_files(tmp_path, (30,))
    path = str(tmp_path / "0.jsonl")
    for count in (1, 7, 29, 30):
        drawn = ids(load_records(f"{path}#{count}"))
        assert len(drawn) == len(set(drawn)) == count
    drawn = ids(load_records(f"{path}#70"))
    assert len(drawn) == 70
    assert {drawn.count(number) for number in range(30)} == {2, 3}
