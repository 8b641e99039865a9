"""Custom readers: registered, named by import path, in dataloader workers, and in cache keys."""

import sys

import pytest
from torch.utils.data import DataLoader

from qwenvl_ft.data.conversation import Conversation, Message, Source, Text
from qwenvl_ft.data.readers import READERS, Reader, import_reader, read_record, register_reader
from qwenvl_ft.data.sources.records import load_records
from qwenvl_ft.data.sources.registry import DATASETS
from qwenvl_ft.errors import DataError

SOURCE = Source("d", "d.jsonl:7")


def read(record):
    return read_record(record, SOURCE, "/r")


def chat(*texts):
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


MODULE = """
from qwenvl_ft.data.conversation import Conversation, Message, Text
from qwenvl_ft.data.readers import Reader

def clock(record, source, media_root):
    if "hour" not in record:
        return None
    return {"query": f"{record['face']}?", "response": record["hour"]}

def _tides(record):
    return "tide" in record

tides = Reader(_tides, lambda record, source, root: Conversation((Message("user", (Text(record["tide"]),)),), source))
number = 5
def wrong(record, source, media_root):
    return 5
"""


@pytest.fixture
def formats_folder(tmp_path, monkeypatch):
    """A module with custom readers; restores the registries afterwards."""
    (tmp_path / "my_formats.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("my_formats", None)
    import_reader.cache_clear()
    before, sets = dict(READERS), dict(DATASETS)
    yield tmp_path
    for table, kept in ((READERS, before), (DATASETS, sets)):
        table.clear()
        table.update(kept)


def test_a_function_may_return_a_record_of_a_known_format(formats_folder):
    assert read_record({"face": "III", "hour": 3}, SOURCE, reader="my_formats:clock") == read(
        {"messages": chat("III?", "3")}
    )
    assert read_record({"tide": "high"}, SOURCE, reader="my_formats:tides").messages[0].content == (Text("high"),)
    declined = read_record({"messages": chat("q", "r")}, SOURCE, "/r", reader="my_formats:clock")
    assert declined == read({"messages": chat("q", "r")}), "None leaves the record to the other readers"


def test_a_registered_function_is_tried_first_and_on_every_record(formats_folder):
    from my_formats import clock

    register_reader("clock", None, clock)
    assert read({"face": "IX", "hour": 9, "messages": chat("no", "no")}).messages[1].content == (Text("9"),)
    assert read({"messages": chat("q", "r")}).messages[1].content == (Text("r"),)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "my_formats:clok",
            "reader 'my_formats:clok' cannot be imported: .*no attribute 'clok'.* Write module:function",
        ),
        ("nowhere:clock", "No module named 'nowhere'"),
        ("my_formats:number", "is a int. It must be a function of a record, or a Reader"),
        ("my_formats:wrong", "d.jsonl:7: the reader 'my_formats:wrong' returned a int"),
    ],
)
def test_a_reader_that_cannot_be_used_is_one_clear_line(formats_folder, path, message):
    with pytest.raises(DataError, match=message) as caught:
        read_record({"x": 1}, SOURCE, reader=path)
    assert "\n" not in str(caught.value)


class Read:
    """Reads records in a dataloader worker."""

    def __init__(self, records):
        self.records = records

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        record, source, root = self.records[index]
        return read_record(record, source, root).messages[-1].content[0].text


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_dataloader_workers_have_the_readers_under_every_start_method(formats_folder, write_jsonl, start):
    from my_formats import clock

    path = str(write_jsonl([{"face": "III", "hour": 3}, {"face": "IV", "hour": 4}]))
    DATASETS["clocks"] = {"annotation_path": path, "reader": "my_formats:clock"}
    by_path = load_records("clocks", cache_dir=formats_folder / "cache")
    register_reader("clock", None, clock)
    registered = load_records(path, cache_dir=formats_folder / "cache")
    for records in (by_path, registered):
        loader = DataLoader(Read(records), batch_size=2, num_workers=1, multiprocessing_context=start)
        assert list(loader) == [["3", "4"]]


def test_changing_a_readers_code_changes_the_fingerprint(formats_folder, write_jsonl):
    path = str(write_jsonl([{"face": "III", "hour": 3}]))
    plain = load_records(path, cache_dir=formats_folder / "cache").fingerprint
    DATASETS["clocks"] = {"annotation_path": path, "reader": "my_formats:clock"}
    before = load_records("clocks", cache_dir=formats_folder / "cache").fingerprint
    (formats_folder / "my_formats.py").write_text(MODULE + "\n# changed\n")
    after = load_records("clocks", cache_dir=formats_folder / "cache").fingerprint
    assert len({plain, before, after}) == 3


def test_the_table_holds_readers_only():
    assert len(READERS) >= 7
    assert all(isinstance(reader, Reader) for reader in READERS.values())


def test_a_reader_registered_under_a_built_in_name_replaces_it(monkeypatch):
    monkeypatch.setattr("qwenvl_ft.data.readers.READERS", dict(READERS))
    from qwenvl_ft.data import readers

    def read(record, source, media_root):
        return Conversation((Message("user", (Text(record["q"]),)), Message("assistant", (Text(record["a"]),))), source)

    readers.register_reader("pairs", lambda record: {"q", "a"} <= record.keys(), read)
    assert readers.read_record({"q": "1", "a": "2"}, SOURCE).messages[1].content == (Text("2"),)
    assert next(iter(readers.READERS)) == "pairs"
    with pytest.raises(DataError, match=r"unknown format 'pair'\. Did you mean 'pairs'\?"):
        readers.read_record({"q": "1", "a": "2"}, SOURCE, reader="pair")
