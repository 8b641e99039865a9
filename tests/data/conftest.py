"""Fixtures for tests of the data path."""

from fractions import Fraction

import pytest


@pytest.fixture(scope="session")
def films(tmp_path_factory):
    """Name -> path of a video file, of several containers, frame rates and sizes."""
    from video_cases import film  # needs PyAV, which the other tests do not

    folder = tmp_path_factory.mktemp("films")
    return {
        "plain": film(str(folder / "plain.mp4")),
        "odd": film(str(folder / "odd.mp4"), frames=55, rate=11, size=(70, 130)),
        "slow": film(str(folder / "slow.mp4"), frames=7, rate=1),
        "ntsc": film(str(folder / "ntsc.mp4"), frames=100, rate=Fraction(30000, 1001), size=(64, 64)),
        "mkv": film(str(folder / "a.mkv"), frames=31),
        "webm": film(str(folder / "a.webm"), codec="libvpx-vp9"),
        "avi": film(str(folder / "a.avi"), codec="mpeg4"),
    }
