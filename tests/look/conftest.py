"""A folder with valid, truncated and fake images, and data files beside them."""

import json

import pytest
from cases import picture


@pytest.fixture
def data(tmp_path):
    """``data(records, name)`` writes a .jsonl beside the images a.png (96 x 64), b.png, c.png and gives its path."""
    for name, (width, height) in {"a": (96, 64), "b": (64, 128), "c": (50, 70)}.items():
        picture(width, height).save(tmp_path / f"{name}.png")
    (tmp_path / "text.png").write_text("not an image")
    whole = (tmp_path / "b.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])

    def write(records, name="data.jsonl"):
        path = tmp_path / name
        lines = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]
        path.write_bytes(b"\n".join(lines) + b"\n")
        return path

    return write
