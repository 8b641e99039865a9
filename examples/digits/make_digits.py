"""Which digit is this? 1,797 handwritten ones as a fine-tuning data set, from scikit-learn, without a download.

    python examples/digits/make_digits.py [DIR] [--size 64]

DIR (.demo/digits) gets images/0000.png ..., train.jsonl (the first 1,500) and val.jsonl (the last 297). The data set
goes writer by writer, 13 in all, so most held-out digits are by hands that training never saw. The same call writes
the same bytes.
"""

import argparse
import json
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_digits

QUESTION = "<image>\nWhich digit is this?"
NUM_TRAIN = 1500
BRIGHTEST = 16
"""The data set counts inked pixels in 4 x 4 blocks, so values go from 0 to 16."""


def draw(ink, size: int) -> Image.Image:
    """An 8 x 8 count of ink -> a ``size`` x ``size`` picture, white on black."""
    pixels = (ink * (255 / BRIGHTEST)).round().astype("uint8")
    return Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC)


def record(index: int, digit: int) -> dict:
    return {
        "id": f"digit-{index:04}",
        "image": f"images/{index:04}.png",
        "conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": str(digit)}],
    }


def make_digits(folder: Path, size: int = 64) -> dict[str, Path]:
    """Write the images and both files.

    Returns:
        ``{"train": path, "val": path}``
    """
    digits = load_digits()
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for index, ink in enumerate(digits.images):
        draw(ink, size).save(folder / "images" / f"{index:04}.png")
    records = [record(index, int(digit)) for index, digit in enumerate(digits.target)]
    files = {"train": folder / "train.jsonl", "val": folder / "val.jsonl"}
    for name, part in (("train", records[:NUM_TRAIN]), ("val", records[NUM_TRAIN:])):
        files[name].write_text("".join(json.dumps(entry) + "\n" for entry in part), encoding="utf-8")
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("dir", nargs="?", type=Path, default=Path(".demo/digits"), help="default: %(default)s")
    parser.add_argument("--size", type=int, default=64, help="pixels of a side; default: %(default)s")
    args = parser.parse_args()
    for name, path in make_digits(args.dir, args.size).items():
        print(f"{name}: {path}")


if __name__ == "__main__":
    main()
