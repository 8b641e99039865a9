"""A stream from an object store: listing, reading and reading ahead over S3, by s3fs against a server of the tests."""

import os

import pytest
from s3_cases import object_store
from stream_cases import open_stream, write_shards

from qwenvl_ft.data.plan.dataset import SampleDataset
from qwenvl_ft.data.sources import shards
from qwenvl_ft.data.sources.records import load_records
from qwenvl_ft.data.sources.shards import fetch, list_shards
from qwenvl_ft.errors import DataError

s3fs = pytest.importorskip("s3fs")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """The root of a server with a bucket of three shards, and its requests so far."""
    root = tmp_path_factory.mktemp("s3")
    write_shards(root / "bucket" / "train", shards=3)
    before = dict(os.environ)
    with object_store(root) as (settings, requests):
        os.environ.update(settings)
        yield root, requests
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def bucket(store):
    """The address of the shards, and the folder that the server reads."""
    return "s3://bucket/train", store[0] / "bucket" / "train"


def test_a_bucket_is_listed_by_its_pattern(bucket):
    address, _ = bucket
    assert [shard.address for shard in list_shards(f"{address}/*.tar")] == [f"{address}/00{k}.tar" for k in range(3)]
    with pytest.raises(DataError, match="no file matches"):
        list_shards(f"{address}/*.parquet")


def test_an_object_is_copied_whole_and_once(bucket, store, tmp_path):
    address, folder = bucket
    before = store[1]["GET bucket/train/001.tar"]
    for _ in range(2):
        assert fetch(f"{address}/001.tar", tmp_path).read_bytes() == (folder / "001.tar").read_bytes()
    assert store[1]["GET bucket/train/001.tar"] == before + 1


def test_a_shard_of_a_later_round_is_listed(bucket):
    address, folder = bucket
    (folder / "new.tar").write_bytes((folder / "000.tar").read_bytes())
    try:
        assert f"{address}/new.tar" in [shard.address for shard in list_shards(f"{address}/*.tar")]
    finally:
        (folder / "new.tar").unlink()
    assert len(list_shards(f"{address}/*.tar")) == 3


def test_an_object_or_bucket_that_is_missing_is_one_error(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "WAITS", ())
    address, _ = bucket
    with pytest.raises(DataError, match=r"the shard s3://bucket/train/nine\.tar cannot be read"):
        fetch(f"{address}/nine.tar", tmp_path)
    with pytest.raises(DataError, match=r"s3://elsewhere/\*\.tar"):
        list_shards("s3://elsewhere/*.tar")


def test_a_stream_over_s3_has_the_samples_of_the_files(bucket, encoder, tmp_path):
    address, folder = bucket
    dataset = open_stream(f"{address}/*.tar", tmp_path / "cache", encoder, window=100)
    local = SampleDataset(load_records(str(folder / "*.tar")), encoder, cache_dir=tmp_path / "lengths")
    assert sorted(dataset.lengths.tolist()) == sorted(local.lengths.tolist())
    ids = {local[place]["source"].id: local[place] for place in range(len(local))}
    for place in range(len(dataset)):
        sample = dataset[place]
        assert str(sample["source"]).startswith(address)
        assert (sample["pixel_values"] == ids[sample["source"].id]["pixel_values"]).all()


def test_a_stream_is_read_ahead_over_s3_in_a_process_of_its_own(bucket, encoder, tmp_path):
    """The store's own threads do not survive the fork; the child makes new ones."""
    address, _ = bucket
    dataset = open_stream(f"{address}/*.tar", tmp_path, encoder)
    dataset.windows.options.reads_ahead = True
    dataset._read_ahead(1)
    dataset._ahead.join(60)
    assert dataset._ahead.exitcode == 0
    assert list((tmp_path / "windows" / "1").glob("lengths-*.npz"))
