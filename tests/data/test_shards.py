"""Shards are listed and copied from paths, web servers and stores; a copy is whole, or there is an error."""

import os

import fsspec
import pytest
from stream_cases import served, write_shards

from qwenvl_ft.data.sources import shards
from qwenvl_ft.data.sources.registry import DATASETS, register_dataset
from qwenvl_ft.data.sources.shards import Shard, drop, fetch, is_remote, list_shards
from qwenvl_ft.errors import DataError


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(shards, "WAITS", (0.0, 0.0))


@pytest.fixture
def folder(tmp_path):
    write_shards(tmp_path / "web")
    return tmp_path / "web"


def addresses(selection):
    return [address for _, address in list_shards(selection)]


def test_numbers_in_braces_keep_their_zeros():
    assert addresses("http://h/{08..11}-{0..1}.tar") == [
        f"http://h/{number}-{half}.tar" for number in ("08", "09", "10", "11") for half in (0, 1)
    ]
    with pytest.raises(DataError, match="counts down"):
        list_shards("http://h/{3..1}.tar")


def test_a_pattern_is_what_the_folder_holds(folder):
    listed = addresses(str(folder / "*.tar"))
    assert listed == sorted(str(path) for path in folder.glob("*.tar"))
    assert len(listed) == 4


def test_a_store_is_listed_by_its_pattern():
    store = fsspec.filesystem("memory")
    for name in ("b.tar", "a.tar", "note.txt"):
        store.pipe_file(f"/shards/{name}", b"x")
    assert addresses("memory://shards/*.tar") == ["memory:///shards/a.tar", "memory:///shards/b.tar"]
    with pytest.raises(DataError, match="no file matches"):
        list_shards("memory://shards/*.parquet")


def test_registered_names_stay_with_their_shards(folder):
    register_dataset("webs", "http://h/{1..2}.tar")
    try:
        found = list_shards(["webs", str(folder / "000.tar")])
    finally:
        del DATASETS["webs"]
    assert found[:2] == [Shard("webs", "http://h/1.tar"), Shard("webs", "http://h/2.tar")]
    assert found[2].name == str(folder / "000.tar")


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ("http://h/a.tar,http://h/a.tar", "listed twice"),
        ("http://h/a.tar.gz", "is no shard"),
        ("http://h/*.tar", "has no list"),
        ("captions%50", "without a rate"),
        ("captions", "do not find captions"),
        ("nowhere://bucket/*.tar", "Protocol not known"),
        ("", "names no shards"),
    ],
)
def test_a_selection_that_is_no_stream_is_one_error(selection, message):
    with pytest.raises(DataError, match=message):
        list_shards(selection)


def test_a_signed_url_keeps_its_query_and_has_the_name_of_its_file(folder, tmp_path):
    with served(folder) as server:
        url = server.url("001.tar?signature=a%3Db")
        assert addresses([url]) == [url]
        copy = fetch(url, tmp_path / "cache")
    assert copy.name == "001.tar"
    assert copy.read_bytes() == (folder / "001.tar").read_bytes()


def test_a_shard_is_copied_once_and_can_be_dropped(folder, tmp_path):
    with served(folder) as server:
        first, second = (fetch(server.url("000.tar"), tmp_path) for _ in range(2))
        assert first == second
        assert server.requests["000.tar"] == 1
        drop(server.url("000.tar"), tmp_path)
        assert not first.exists()
        fetch(server.url("000.tar"), tmp_path)
        assert server.requests["000.tar"] == 2


def test_a_copy_that_breaks_off_is_made_again_and_is_whole(folder, tmp_path):
    with served(folder) as server:
        server.failing["000.tar"] = 2
        assert fetch(server.url("000.tar"), tmp_path).read_bytes() == (folder / "000.tar").read_bytes()
        assert server.requests["000.tar"] == 3


def test_the_length_of_a_copy_is_compared(folder, tmp_path):
    """httpx itself notices a body that is too short; a store may not."""
    partial = tmp_path / "half"
    partial.write_bytes(b"1234")
    shards._require_whole(partial, {"content-length": "4"})
    with pytest.raises(ConnectionError, match="4 of 5 bytes"):
        shards._require_whole(partial, {"content-length": "5"})


def test_a_server_that_never_answers_whole_is_one_error_and_leaves_nothing(folder, tmp_path):
    with served(folder) as server:
        server.failing["000.tar"] = 99
        with pytest.raises(DataError, match=r"000\.tar cannot be read after 3 tries"):
            fetch(server.url("000.tar"), tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").rglob("*.tar*") if path.suffix != ".lock"]


def test_a_shard_that_is_gone_is_asked_for_once(folder, tmp_path):
    with served(folder) as server:
        with pytest.raises(DataError, match="answers 404"):
            fetch(server.url("nine.tar"), tmp_path)
        assert server.requests["nine.tar"] == 1
    with pytest.raises(DataError, match="cannot be read"):
        fetch("memory://shards/nine.tar", tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        fetch(str(folder / "nine.tar"), tmp_path)


def test_a_store_without_its_package_names_it(tmp_path, monkeypatch):
    def missing(*_, **__):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(DataError, match="Install s3fs"):
        fetch("s3://bucket/000.tar", tmp_path)


def test_a_shard_of_this_machine_is_not_copied(folder, tmp_path):
    path = folder / "000.tar"
    assert not is_remote(str(path))
    assert fetch(str(path), tmp_path / "cache") == path
    drop(str(path), tmp_path / "cache")
    assert path.exists()


@pytest.mark.skipif(os.getuid() == 0, reason="root writes everywhere")
def test_a_cache_that_cannot_be_written_names_the_key(folder, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    with served(folder) as server, pytest.raises(DataError, match=r"data\.stream_cache"):
        fetch(server.url("000.tar"), tmp_path / "closed")
