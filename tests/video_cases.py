"""Small video files with known frames, and records that ask about them."""

from fractions import Fraction

import av
import numpy as np
from cases import picture

from qwenvl_ft.data.conversation import Source

SOURCE = Source("d", "d.jsonl:7")


def film(path, frames=30, size=(96, 64), rate=10, *, turned=0, gop=12, codec="libx264"):
    """Write a video in which each frame is brighter than the one before, with a white upper left corner."""
    width, height = size
    with av.open(path, "w", format=None if isinstance(path, str) else "mp4") as container:
        stream = container.add_stream(codec, rate=Fraction(rate))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.gop_size = gop
        if turned:
            stream.set_display_rotation(turned)
        for number in range(frames):
            pixels = np.asarray(picture(width, height)) // 4 + np.uint8(4 * number % 160)
            pixels[: height // 4, : width // 4] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def asked(*videos, question="What moves?", images=()):
    """Return a record with one question about videos and images."""
    text = "".join("<video>" for _ in videos) + "".join("<image>" for _ in images) + question
    return {
        "video": list(videos),
        "image": list(images),
        "conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "It."}],
    }
