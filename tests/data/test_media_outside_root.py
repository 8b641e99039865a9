"""data.media_outside_root: which files a record's paths may lead to, in every format and wherever media are opened."""

import io
import json
import tarfile

import pytest
from cases import picture

from qwenvl_ft.data.conversation import Conversation, Image, Message, Text
from qwenvl_ft.data.dense.groups import DenseGroups
from qwenvl_ft.data.dense.options import DenseOptions
from qwenvl_ft.data.encode.encoder import Encoder
from qwenvl_ft.data.plan.lengths import conversation_files
from qwenvl_ft.data.readers import READERS, read_record, register_reader
from qwenvl_ft.data.sources.mixture import load_options
from qwenvl_ft.data.sources.records import load_records
from qwenvl_ft.errors import DataError
from qwenvl_ft.recipe.load import load_recipe


@pytest.fixture
def places(tmp_path):
    """A media root with pictures, links that stay inside and links that leave, and a picture outside."""
    root, secret = tmp_path / "root", tmp_path / "secret"
    (root / "sub").mkdir(parents=True)
    secret.mkdir()
    for path in (root / "a.png", root / "sub" / "b.png", secret / "c.png", tmp_path / "rootless.png"):
        picture(64, 64).save(path)
    (root / "inner.png").symlink_to(root / "sub" / "b.png")
    (root / "leaving.png").symlink_to(secret / "c.png")
    (root / "elsewhere").symlink_to(secret)
    return tmp_path


def written(places):
    """Path in a record -> whether the default allows it, and whether ``error`` does."""
    return {
        "a.png": (True, True),
        "sub/../a.png": (True, True),
        f"{places}/root/a.png": (True, True),
        "inner.png": (True, True),
        "leaving.png": (True, False),
        "elsewhere/c.png": (True, False),
        f"{places}/secret/c.png": (True, False),
        f"file://{places}/secret/c.png": (True, False),
        "../secret/c.png": (False, False),
        "../rootless.png": (False, False),
        "file://../secret/c.png": (False, False),
    }


def message(*parts):
    return {"messages": [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": "b"}]}


FORMATS = {
    "conversations": lambda path: {
        "image": path,
        "conversations": [{"from": "human", "value": "<image>a"}, {"from": "gpt", "value": "b"}],
    },
    "pairs": lambda path: {"images": [path], "query": "<image>a", "response": "b"},
    "messages": lambda path: message({"type": "image_url", "image_url": {"url": path}}),
    "frames": lambda path: message({"type": "video", "video": [path, path]}),
    "video": lambda path: message({"type": "video", "video": path}),
    "videos": lambda path: {"videos": [path], "query": "<video>a", "response": "b"},
    "grounding": lambda path: {
        "images": [path],
        "query": "<image>a",
        "response": "<bbox>",
        "objects": {"ref": [], "bbox": [[1, 2, 3, 4]]},
    },
    "dense": lambda path: {
        "images": [path],
        "objects": [{"desc": "a", "bbox_2d": [1, 2, 3, 4]}],
        "width": 64,
        "height": 64,
    },
    "coco": lambda path: {
        "images": [path],
        "objects": [{"desc": "a", "bbox_2d": [1, 2, 3, 4]}],
        "categories": ["a"],
        "width": 64,
        "height": 64,
    },
}


def load(places, records, outside, **options):
    file = places / "lists" / "a.jsonl"
    file.parent.mkdir(exist_ok=True)
    file.write_text("\n".join(json.dumps(record) for record in records))
    options = {"media_root": str(places / "root")} | options
    return load_records(str(file), cache_dir=places / "cache", media_outside_root=outside, **options)


@pytest.mark.parametrize("name", FORMATS)
def test_what_leads_out_of_the_root_is_refused_as_the_setting_says(places, name):
    paths = written(places)
    for outside, column in ((None, 0), ("error", 1), ("allow", None)):
        records = load(places, [FORMATS[name](path) for path in paths], outside)
        for index, (path, allowed) in enumerate(paths.items()):
            if column is None or allowed[column]:
                assert conversation_files(read_record(*records[index]))
            else:
                with pytest.raises(DataError, match=r"data\.media_outside_root=allow") as raised:
                    read_record(*records[index])
                assert f"a.jsonl:{index + 1}" in str(raised.value)
                assert f"{path.removeprefix('file://')!r} leads to" in str(raised.value)
                assert "\n" not in str(raised.value)


def test_groups_and_lengths_refuse_too(places, processor):
    records = load(places, [FORMATS["dense"]("leaving.png")] * 2, "error")
    with pytest.raises(DataError, match=r"images\[0\]: the path 'leaving.png' leads to .*secret/c.png, outside"):
        DenseGroups(records, DenseOptions()).conversation(0, 0)
    allowed = load(places, [FORMATS["dense"]("leaving.png")] * 2, "allow")
    assert Encoder(processor).extent(DenseGroups(allowed, DenseOptions()).conversation(0, 0)).tokens > 10
    assert records.fingerprint != allowed.fingerprint, "measured lengths of one would be taken for the other's"


def test_without_a_root_of_ones_own_only_error_refuses(places):
    """Images beside the folder of the annotations are usual."""
    record = FORMATS["pairs"]("../secret/c.png")
    assert read_record(*load(places, [record], None, media_root=None)[0])
    with pytest.raises(DataError, match="outside"):
        read_record(*load(places, [record], "error", media_root=None)[0])


def test_a_folder_that_the_record_names_is_not_a_way_out(places):
    for folder, image, refused in (("sub", "../a.png", False), ("sub", "../../rootless.png", True), ("..", "a", True)):
        record = FORMATS["conversations"](image) | {"data_path": folder}
        records = load(places, [record], "error")
        if refused:
            with pytest.raises(DataError, match="outside"):
                read_record(*records[0])
        else:
            assert read_record(*records[0])


def test_a_reader_of_ones_own_is_checked_too(places):
    def read(record, source, root):
        parts = (Image(str(places / "secret" / "c.png")), Text("a"))
        return Conversation((Message("user", parts), Message("assistant", (Text("b"),))), source)

    register_reader("own", lambda record: "own" in record, read)
    try:
        assert read_record(*load(places, [{"own": 1}], None)[0])
        with pytest.raises(DataError, match="outside"):
            read_record(*load(places, [{"own": 1}], "error")[0])
    finally:
        READERS.pop("own")


def test_members_of_a_shard_are_no_files_but_paths_in_it_are(places):
    record = {"query": "<image>a", "response": "b"}
    shard = places / "root" / "a.tar"
    with tarfile.open(shard, "w") as tar:
        for name, data in (
            ("../x.json", json.dumps(record | {"image": "../x.png"}).encode()),
            ("../x.png", (places / "root" / "a.png").read_bytes()),
            ("y.json", json.dumps(record | {"image": "../secret/c.png"}).encode()),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    records = load_records(str(shard), cache_dir=places / "cache", media_outside_root="error")
    found = {source.record: (record, source, root) for record, source, root in map(records.__getitem__, range(2))}
    (inside, outside) = sorted(found, reverse=True, key=lambda place: "x" in place)
    assert isinstance(read_record(*found[inside]).media(Image)[0].value, bytes)
    with pytest.raises(DataError, match="outside"):
        read_record(*found[outside])


def test_the_recipe_key_reaches_the_records(tiny_dir):
    recipe = load_recipe(None, [f"model.model={tiny_dir}", "data.train=a.jsonl", "data.media_outside_root=error"])
    assert load_options(recipe.data, 0)["media_outside_root"] == "error"
