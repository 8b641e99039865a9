"""The error for an absent medium says where it is, if it lies where another setting would find it."""

import pickle

import pytest
from cases import picture
from look_cases import asked, checked

from qwenvl_ft.data.encode.encoder import Encoder
from qwenvl_ft.data.media.elsewhere import MediaPath, MediaRoot
from qwenvl_ft.data.sources.records import load_records
from qwenvl_ft.data.sources.registry import DATASETS, register_dataset
from qwenvl_ft.errors import DataError


@pytest.fixture
def demo(tmp_path, monkeypatch, write_jsonl):
    """A repository with ``demo/data.jsonl``, whose paths begin at the repository, as in the official demo set."""
    (tmp_path / "demo" / "images").mkdir(parents=True)
    picture(64, 64).save(tmp_path / "demo" / "images" / "1.png")
    monkeypatch.chdir(tmp_path)
    return write_jsonl([asked("demo/images/1.png")], "demo/data.jsonl")


def error_of(processor, path, **options):
    record, _, root = load_records(str(path), **options)[0]
    with pytest.raises(DataError) as caught:
        Encoder(processor)(record, root)
    return str(caught.value)


def test_a_path_from_the_working_directory_is_found(processor, demo, tmp_path):
    text = error_of(processor, demo)
    assert text.endswith("does not exist. It is at ./demo/images/1.png; data.media_root=. finds it.")
    assert f"image {tmp_path}/demo/demo/images/1.png" in text
    record, _, root = load_records(str(demo), media_root=".")[0]
    assert "pixel_values" in Encoder(processor)(record, root), "the setting that the message names is right"
    (fault,) = checked(demo).errors()
    assert fault.reason == "missing"
    assert fault.message.endswith("It is at ./demo/images/1.png; data.media_root=. finds it.")
    assert checked(demo, "data.media_root=.").ok


def test_a_path_from_a_folder_above_the_file_is_found_from_anywhere(processor, demo, tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert error_of(processor, demo).endswith(
        f"It is at {tmp_path}/demo/images/1.png; data.media_root={tmp_path} finds it."
    )


def test_a_path_beside_the_file_is_found_where_the_root_is_another(processor, tmp_path, write_jsonl, monkeypatch):
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    picture(64, 64).save(tmp_path / "1.png")
    path = write_jsonl([asked("1.png")])
    assert error_of(processor, path, media_root="/nowhere").endswith(
        f"It is at {tmp_path}/1.png; data.media_root={tmp_path} finds it."
    )
    assert error_of(processor, write_jsonl([asked("2.png")], "b.jsonl"), media_root="/nowhere").endswith(
        "image /nowhere/2.png does not exist. Relative paths start at data.media_root."
    )


def test_the_setting_named_is_the_one_that_decides(processor, demo, tmp_path, write_jsonl):
    register_dataset("set", str(demo), str(tmp_path / "demo"))
    try:
        assert error_of(processor, "set").endswith("; data.datasets.set.data_path=. finds it.")
    finally:
        del DATASETS["set"]
    own = write_jsonl([asked("1.png", data_path="images")], "demo/own.jsonl")
    assert "pixel_values" in Encoder(processor)(*load_records(str(own))[0][::2])
    wrong = write_jsonl([asked("images/1.png", data_path="images")], "demo/wrong.jsonl")
    assert "data_path of the record=./demo" in error_of(processor, wrong)


def test_videos_and_frames_are_found_too(processor, demo, films, tmp_path, write_jsonl):
    import shutil

    shutil.copy(films["plain"], tmp_path / "a.mp4")
    video = write_jsonl([{"video": "a.mp4"} | asked([], question="<video>?") | {"image": None}], "demo/v.jsonl")
    assert error_of(processor, video).endswith("It is at ./a.mp4; data.media_root=. finds it.")
    frames = [{"video": [["demo/images/1.png"] * 4], "conversations": asked([], question="<video>?")["conversations"]}]
    assert error_of(processor, write_jsonl(frames, "demo/f.jsonl")).endswith(
        "It is at ./demo/images/1.png; data.media_root=. finds it."
    )


def test_paths_are_texts_that_survive_pickling():
    path = MediaPath("/a/b.png", "b.png", MediaRoot("/a", "/c", "k"))
    again = pickle.loads(pickle.dumps(path))
    assert (again, again.written, again.root) == ("/a/b.png", "b.png", "/a")
    assert (again.root.beside, again.root.key) == ("/c", "k")
    assert hash(path) == hash("/a/b.png")
    assert type(str(path)) is str
