"""`check`, `stats` and `show` look at the first records of a stream in training's order, and leave nothing behind."""

import io
import json
import tarfile

import numpy as np
import pytest
from stream_cases import served, stream_run, write_shards, write_tar

from qwenvl_ft.cli.main import main
from qwenvl_ft.data.sources.stream import ORDER
from qwenvl_ft.look.check import check_recipe
from qwenvl_ft.look.stats import count_recipe
from qwenvl_ft.recipe.load import load_recipe

SEED = 42
"""Default of ``training.seed``."""


@pytest.fixture(scope="module")
def web(tmp_path_factory):
    """A folder with four shards, and the names of the shards in the order of the first round."""
    folder = tmp_path_factory.mktemp("web")
    names = write_shards(folder)
    return folder, [names[place] for place in np.random.default_rng([ORDER, SEED, 0]).permutation(len(names))]


def ids_of(folder, names):
    """Return the ids of the records of shards, read by tarfile alone."""
    found = []
    for name in names:
        with tarfile.open(folder / name) as tar:
            found += [f"r{int(member.name[:6])}" for member in tar if member.name.endswith(".json")]
    return found


def test_the_first_records_are_those_of_the_first_shard_of_the_round(tiny_dir, web, tmp_path):
    """The reference is the ordinary way of reading that shard as a file."""
    folder, names = web
    count = len(ids_of(folder, names[:1]))
    with served(folder) as server:
        overrides = stream_run(tiny_dir, server.url("{000..003}.tar"), tmp_path / "run")
        stream = count_recipe(load_recipe(None, overrides), records=count, quiet=True).to_json()
        report = check_recipe(load_recipe(None, overrides), records=count, quiet=True).to_json()
        asked = dict(server.requests)
    model = [f"model.model={tiny_dir}", "template.max_length=160"]
    plain = load_recipe(None, [f"data.train={folder / names[0]}", *model])
    assert stream["measures"] == count_recipe(plain, quiet=True).to_json()["measures"]
    assert stream["counts"] == count_recipe(plain, quiet=True).to_json()["counts"]
    split, wanted = report["splits"]["train"], check_recipe(plain, quiet=True).to_json()["splits"]["train"]
    same = ("records", "images", "different_media", "lengths", "encoded")
    assert {key: split[key] for key in same} == {key: wanted[key] for key in same}
    assert report["faults"] == {}
    assert (split["epoch"], wanted["epoch"] is None) == (None, False), "the steps of a stream are not known"
    assert asked == {names[0]: 2}, "a shard behind the first records was copied"
    other = load_recipe(None, [f"data.train={folder / names[1]}", *model])
    assert stream["counts"] != count_recipe(other, quiet=True).to_json()["counts"], "vacuous: all shards are alike"


def test_more_records_than_a_shard_has_come_from_the_next_ones(tiny_dir, web, tmp_path, capsys):
    folder, _ = web
    overrides = stream_run(tiny_dir, folder / "*.tar", tmp_path / "run")
    assert main(["stats", *overrides, "--records", "10", "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["records"] == 10
    assert printed.err.splitlines()[0].startswith("data.streaming=true: this is about the first 10 records")
    assert main(["check", *overrides]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("data.streaming=true: this is about the first 1,000 records of the stream")
    assert any("31" in line for line in printed[1:])
    assert not list(tmp_path.glob("run-cache/*")), "copies are left behind"


def test_a_fault_among_the_first_records_is_found_at_its_address(tiny_dir, tmp_path):
    shards = tmp_path / "shards"
    write_shards(shards, shards=1, write=lambda path, _: _broken(path), ending="tar")
    with served(shards) as server:
        recipe = load_recipe(None, stream_run(tiny_dir, server.url("000.tar"), tmp_path / "run"))
        report = check_recipe(recipe, quiet=True)
        assert [fault.where for fault in report.faults] == [server.url("000.tar[000001]")]


def _broken(path):
    """Write a shard whose first record has a tag without an image."""
    write_tar(path, [1, 2], text=True)
    with tarfile.open(path) as tar:
        entries = [(member, tar.extractfile(member).read()) for member in tar]
    with tarfile.open(path, "w") as tar:
        for member, content in entries:
            if member.name == "000001.json":
                content = content.replace(b"What?", b"<image> What?")
                member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def test_show_shows_the_windows_of_training(tiny_dir, web, tmp_path, capsys):
    folder, names = web
    overrides = stream_run(tiny_dir, folder / "*.tar", tmp_path / "run")
    ids = ids_of(folder, names)
    for epoch, expected in ((0, ids[:8]), (1, ids[8:16])):
        page = tmp_path / f"{epoch}.html"
        assert main(["show", *overrides, "--out", str(page), "--epoch", str(epoch), "--samples", "99"]) == 0
        text = page.read_text()
        shown = {record for record in ids if f"&#34;id&#34;: &#34;{record}&#34;" in text}
        assert shown == set(expected)
    assert main(["show", *overrides, "--out", str(page), "--epoch", "9", "data.stream_rounds=1"]) == 2
    assert "the stream ends after 4 windows, the first is 0" in capsys.readouterr().err
    assert not list(tmp_path.glob("run-cache/*")), "copies are left behind"
