"""A record with more text than data.max_record_bytes is refused before it is parsed or tokenised, in every format."""

import base64
import csv
import io
import json
import subprocess
import sys
import tarfile

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cases import picture

from qwenvl_ft.data.dense.groups import DenseGroups
from qwenvl_ft.data.dense.options import DenseOptions
from qwenvl_ft.data.encode.encoder import Encoder
from qwenvl_ft.data.plan.lengths import measure
from qwenvl_ft.data.record_size import text_bytes
from qwenvl_ft.data.sources import json_files
from qwenvl_ft.data.sources.records import load_records
from qwenvl_ft.errors import DataError

LIMIT = 2_000
LONG = 'a "quoted", [bracketed] {braced} back\\slash,\n' * 100
"""More text than the limit, with every character that decides where a value or a row ends."""


def png():
    """An image in base64, of more bytes than the limit."""
    file = io.BytesIO()
    picture(400, 400).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def records():
    """Records 1 and 3 are too large; record 2 holds an image of more bytes than the limit."""
    made = [{"query": f"What is {k}?", "response": f"it is {k}"} for k in range(5)]
    made[1]["response"] = LONG
    made[2] |= {"query": "<image>What is 2?", "image": png()}
    made[3]["query"] = "\u00e9" * (LIMIT // 2 + 1) + "\\"
    return made


def jsonl(path):
    path.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in records()))


def json_list(path):
    path.write_text(json.dumps(records(), ensure_ascii=False))


def table(path):
    with path.open("w", newline="") as file:
        rows = csv.DictWriter(file, ["query", "response", "image"])
        rows.writeheader()
        rows.writerows(records())


def parquet(path):
    pq.write_table(pa.Table.from_pylist([{"image": None} | record for record in records()]), path)


def folder(path):
    rows = [{"image": None, "turns": [{"a": "b"}]} | record for record in records()]
    datasets.Dataset.from_list(rows).save_to_disk(str(path))


def tar(path):
    with tarfile.open(path, "w") as file:
        for k, record in enumerate(records()):
            data = json.dumps(record).encode()
            info = tarfile.TarInfo(f"{k}.json")
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))


FILES = {
    "a.jsonl": (jsonl, ":2", ":4"),
    "a.json": (json_list, "[1]", "[3]"),
    "a.csv": (table, ":103", ":105"),
    "a.parquet": (parquet, "[1]", "[3]"),
    "saved": (folder, "[1]", "[3]"),
    "a.tar": (tar, "[1]", "[3]"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_record_that_is_too_large_raises_in_its_place_and_the_rest_is_read(tmp_path, name, monkeypatch):
    monkeypatch.setattr(json_files, "CHUNK", 64)  # borders of chunks fall everywhere
    write, *places = FILES[name]
    path = tmp_path / name
    write(path)
    opened = load_records(str(path), cache_dir=tmp_path / "cache", skip=True, max_record_bytes=LIMIT)
    assert len(opened) == 5
    for index, place in zip((1, 3), places, strict=True):
        with pytest.raises(DataError, match=r"holds more text than data\.max_record_bytes=2000 allows") as raised:
            opened[index]
        assert f"{path}{place}: the " in str(raised.value)
        size = int(str(raised.value).split(" bytes")[0].rpartition(" ")[2])
        assert LIMIT < size <= len(json.dumps(records()[index])) + 100
    for index in (0, 2, 4):
        expected, found = records()[index], opened[index][0]
        assert {key: found.get(key) for key in expected} == expected
    assert len(opened[2][0]["image"]) > 2 * LIMIT, "vacuous: the image is no larger than the limit"

    assert len(load_records(str(path), cache_dir=tmp_path / "cache")[1][0]["response"]) > LIMIT, (
        "the other limit's copy"
    )


@pytest.mark.parametrize("name", FILES)
def test_without_skip_the_first_large_record_stops(tmp_path, name):
    write, place, _ = FILES[name]
    write(tmp_path / name)
    with pytest.raises(DataError, match="max_record_bytes") as raised:
        load_records(str(tmp_path / name), cache_dir=tmp_path / "cache", max_record_bytes=LIMIT)[1]
    assert f"{tmp_path / name}{place}: the " in str(raised.value)


def test_a_run_that_skips_counts_records_that_are_too_large(tmp_path, processor):
    json_list(tmp_path / "a.json")
    opened = load_records(str(tmp_path / "a.json"), cache_dir=tmp_path / "cache", skip=True, max_record_bytes=LIMIT)
    lengths = measure(opened, Encoder(processor, max_length=512), cache_dir=tmp_path, on_error="skip")
    assert lengths.dropped() == {"that cannot be read": 2}
    assert ["max_record_bytes=2000" in fault for fault in lengths.faults] == [True, True]


def test_rows_of_a_table_after_one_that_is_too_large_are_read_as_they_stand(tmp_path):
    """Quotes that are open where the text is dropped are closed where the row ends."""
    big = "x" * 3_000
    lines = [
        "query,response",
        f'"{big},""a""',  # a quoted cell of three lines; the first alone is too large
        "second, line",
        'end",b',
        "q1,r1",
        '"small, then',
        f'{big}",b',  # the cell ends in the large line
        "q2,r2",
        f"{big},b",
        '"q,3","r\n3"',
    ]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    opened = load_records(str(tmp_path / "a.csv"), cache_dir=tmp_path / "cache", skip=True, max_record_bytes=LIMIT)
    expected = {1: ("q1", "r1"), 3: ("q2", "r2"), 5: ("q,3", "r\n3")}
    for index in range(6):
        if index in expected:
            assert (opened[index][0]["query"], opened[index][0]["response"]) == expected[index]
        else:
            with pytest.raises(DataError, match=r"the row of 3... bytes holds more text"):
                opened[index]
    assert len(opened) == 6


def test_text_is_what_is_not_media_in_base64():
    media = base64.b64encode(bytes(300)).decode()
    for value in (f"data:image/png;base64,{media}", f"/9j/{media}", f"iVBORw0KGgo{media}"):
        for record in ({"image": value}, {"images": ["a", value], "b": "/9j/"}):
            text = json.dumps(record)
            escaped = text.replace("/", "\\/")
            assert text_bytes(text.encode()) < 60
            assert text_bytes(escaped.encode()) < 60
        assert text_bytes(f'a,"{value}",b'.encode()) < 20
    said = json.dumps({"value": f'Decode "data:image/png;base64,{media}"'})
    assert text_bytes(said.encode()) == len(said), "a quotation within a text is text"


def test_a_conversation_is_limited_before_it_is_tokenised(processor, monkeypatch):
    """Whatever way its text came: from a record, several records, a reader of one's own or the system prompt."""
    encoder = Encoder(processor, max_length=512, max_record_bytes=500)
    short = {"query": "a", "response": "b"}
    assert encoder.length(short) > 3
    monkeypatch.setattr(encoder, "_tokenizer", None)
    with pytest.raises(DataError, match=r"record: the conversation of 6.. bytes holds more text"):
        encoder.length({"query": "a" * 600, "response": "b"})
    with pytest.raises(DataError, match="max_record_bytes=500"):
        encoder(short | {"system": "\u00e9" * 251})
    with pytest.raises(AttributeError):  # a short text reaches the tokenizer, which is not there
        encoder.length(short)


def test_a_dense_group_of_many_records_is_limited(tmp_path, processor):
    picture(64, 64).save(tmp_path / "a.png")
    thing = {"desc": "x" * 300, "bbox_2d": [1, 2, 30, 40]}
    line = json.dumps({"images": ["a.png"], "objects": [thing], "width": 64, "height": 64})
    (tmp_path / "a.jsonl").write_text("\n".join([line] * 4))
    opened = load_records(str(tmp_path / "a.jsonl"), cache_dir=tmp_path / "cache")
    for size, fits in ((1, True), (4, False)):
        group = DenseGroups(opened, DenseOptions(images_per_user_turn=size)).conversation(0, 0)
        encoder = Encoder(processor, max_record_bytes=1500 + len(group.messages[0].content[0].text))
        if fits:
            assert encoder.extent(group).tokens > 100
        else:
            with pytest.raises(DataError, match=r"the conversation of .* bytes holds more text"):
                encoder.extent(group)


MEASURE = """
import resource, sys
from pathlib import Path
from qwenvl_ft.data.sources.files import KINDS
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in map(Path, sys.argv[1:]):
    faults = sum(not hasattr(batch, "num_rows") for batch in KINDS[path.suffix].batches(path, 1_000_000)[1])
    print(path.suffix, faults, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
BEGIN = {
    ".jsonl": '{"query": "',
    ".json": '[{"query": "a", "response": "b"}, {"query": "',
    ".csv": "query,response\n",
    ".txt": "",
}
END = {".jsonl": '"}\n{"query": "a", "response": "b"}', ".json": '"}]', ".csv": ",b\nq,r", ".txt": ""}


def test_refusing_a_line_takes_memory_for_the_limit_not_for_the_line(tmp_path):
    megabytes = 40
    paths = [tmp_path / f"0{suffix}" for suffix in BEGIN]
    for path in paths:
        with path.open("w") as file:
            file.write(BEGIN[path.suffix])
            for _ in range(megabytes):
                file.write("word " * 200_000)
            file.write(END[path.suffix])
    paths.append(tmp_path / "0.tar")
    with tarfile.open(paths[-1], "w") as tar:
        tar.add(paths[-2], "0.query.txt")
    paths.pop(-2).unlink()
    run = subprocess.run([sys.executable, "-c", MEASURE, *map(str, paths)], capture_output=True, text=True, check=True)
    measured = [line.split() for line in run.stdout.splitlines()]
    for path in paths:
        path.unlink()
    assert [(suffix, int(faults)) for suffix, faults, _ in measured] == [(path.suffix, 1) for path in paths]
    assert max(int(grown) for _, _, grown in measured) < megabytes / 2, measured
