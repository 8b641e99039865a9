"""A stream from an object store: listing, reading and resuming over S3, against a server of moto.

They need the extra ``s3``, which is not among the locked packages: botocore wants an older python-dateutil.
"""

import os

import pytest
from stream_cases import open_stream, write_shards

from qwenvl_ft.data.plan.dataset import SampleDataset
from qwenvl_ft.data.sources import shards
from qwenvl_ft.data.sources.records import load_records
from qwenvl_ft.data.sources.shards import fetch, list_shards
from qwenvl_ft.errors import DataError

s3fs = pytest.importorskip("s3fs")
moto_server = pytest.importorskip("moto.server")


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """The address of a bucket with three shards, and the folder that they were uploaded from."""
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = dict(os.environ)
    os.environ.update(settings)
    folder = tmp_path_factory.mktemp("s3")
    store = s3fs.S3FileSystem(skip_instance_cache=True)
    store.mkdir("bucket")
    for name in write_shards(folder, shards=3):
        store.put_file(str(folder / name), f"bucket/train/{name}")
    yield "s3://bucket/train", folder
    os.environ.clear()
    os.environ.update(before)
    server.stop()


def test_a_bucket_is_listed_by_its_pattern(bucket):
    address, _ = bucket
    assert [shard.address for shard in list_shards(f"{address}/*.tar")] == [f"{address}/00{k}.tar" for k in range(3)]
    with pytest.raises(DataError, match="no file matches"):
        list_shards(f"{address}/*.parquet")


def test_an_object_is_copied_whole(bucket, tmp_path):
    address, folder = bucket
    assert fetch(f"{address}/001.tar", tmp_path).read_bytes() == (folder / "001.tar").read_bytes()


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
