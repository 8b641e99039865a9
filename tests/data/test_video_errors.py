"""Video files that cannot be decoded, or not in time, are one-line errors that name the file and the record."""

import io
import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

import av
import numpy as np
import pytest
from video_cases import SOURCE, asked, film

from qwenvl_ft.data.conversation import Video
from qwenvl_ft.data.encode.encoder import Encoder
from qwenvl_ft.data.media import video as video_module
from qwenvl_ft.data.media.images import MediaPolicy
from qwenvl_ft.data.media.video import clip_pixels, plan_clip
from qwenvl_ft.errors import DataError


def test_an_unusable_video_is_one_line_with_file_and_record(processor, films, tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    with open(films["plain"], "rb") as file:  # noqa: PTH123
        whole = file.read()
    (tmp_path / "half.mp4").write_bytes(whole[: len(whole) // 2])
    sound = io.BytesIO()
    with av.open(sound, "w", format="wav") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    cases = {
        str(tmp_path / "no.mp4"): r"no\.mp4 does not exist",
        str(tmp_path / "text.mp4"): r"text\.mp4 is damaged or not a video",
        str(tmp_path / "half.mp4"): r"half\.mp4 is damaged or not a video",
        str(tmp_path): "is a folder",
        "https://x.org/a.mp4": "download URLs",
        sound.getvalue(): "has no video stream",
        film(str(tmp_path / "one.mp4"), frames=1): r"one\.mp4 shows 1 of 1 frames .* Give a single frame as an image",
    }
    for value, message in cases.items():
        with pytest.raises(DataError, match=message) as caught:
            Encoder(processor)(asked(value))
        assert str(caught.value).startswith("record")
        assert "\n" not in str(caught.value)
    record = {"messages": [{"role": "user", "content": [{"video": films["plain"], "video_start": 9}]}]}
    with pytest.raises(DataError, match=r"shows 0 of 30 frames \(3\.00 s\).* check start and end"):
        Encoder(processor)(record)
    with pytest.raises(DataError, match=r"96 x 64 = 6144 pixels, above data\.max_image_pixels=100"):
        Encoder(processor, policy=MediaPolicy(max_image_pixels=100))(asked(films["plain"]))


def stall(path, share):
    """Replace a file by a pipe that delivers a share of its bytes and then hangs, like a disk that stalls."""
    data = path.read_bytes()
    path.unlink()
    os.mkfifo(path)

    def write():
        with path.open("wb", buffering=0) as pipe:
            with suppress(BrokenPipeError):
                pipe.write(data[: int(share * len(data))])
            time.sleep(30)

    threading.Thread(target=write, daemon=True).start()


@pytest.fixture
def long_film(tmp_path):
    return Path(film(str(tmp_path / "long.mkv"), frames=300, size=(320, 240)))


def test_a_decoder_that_hangs_is_abandoned_after_the_timeout(processor, films, long_film):
    part, video = processor.video_processor, Video(str(long_film))
    clip = plan_clip(video, part, MediaPolicy(), SOURCE)
    stall(long_film, 0.6)
    begin = time.monotonic()
    with pytest.raises(
        DataError,
        match=r"d\.jsonl:7: video .*long\.mkv cannot be read within .*=1 s: ([5-9]|\d\d) of its 60 frames arrived",
    ):
        clip_pixels(video, clip, part, MediaPolicy(video_timeout=1), SOURCE)
    assert time.monotonic() - begin < 3
    assert Encoder(processor, policy=MediaPolicy(video_timeout=20))(asked(films["plain"])), "the next one is read"


def test_a_header_that_never_arrives_times_out(processor, long_film):
    stall(long_film, 0)
    begin = time.monotonic()
    with pytest.raises(DataError, match=r"long\.mkv cannot be read within data\.video_timeout=0\.5 s\. Is its disk"):
        plan_clip(Video(str(long_film)), processor.video_processor, MediaPolicy(video_timeout=0.5), SOURCE)
    assert time.monotonic() - begin < 2


def test_a_video_shorter_than_its_header_says_is_an_error(processor, films, monkeypatch):
    part = processor.video_processor
    video = Video(films["plain"])
    clip = plan_clip(video, part, MediaPolicy(), SOURCE)
    longer = video_module.Clip((*clip.indices[:-1], 40), clip.rate, clip.size, clip.grid)
    with pytest.raises(
        DataError, match=r"d\.jsonl:7: .*plain\.mp4 is damaged: its header promises more frames than the 30"
    ):
        clip_pixels(video, longer, part, MediaPolicy(), SOURCE)


def test_a_video_that_cannot_be_read_in_time_is_an_error(processor, monkeypatch):
    """A server that accepts the connection and stays silent, like a disk that hangs."""
    monkeypatch.setattr(video_module, "file_of", lambda value: value)
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/a.mp4"
        with pytest.raises(
            DataError, match=r"record: video http.*a\.mp4 cannot be read within data\.video_timeout=0\.3 s"
        ):
            Encoder(processor, policy=MediaPolicy(video_timeout=0.3))(asked(url))
