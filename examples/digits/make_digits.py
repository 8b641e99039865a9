"""Write scikit-learn's 1,797 handwritten digits as a fine-tuning data set, without a download.

    python examples/digits/make_digits.py [DIR] [--size 64] [--variants 9]

Writes images/0000.png ..., train.jsonl (the first 1,500) and val.jsonl (the last 297) to DIR (.demo/digits). The digits
are ordered by writer, 13 in all, so most held-out digits are from writers who are not in the training set. To reduce
overfitting, each training digit has ``variants`` further copies, slightly rotated, scaled and shifted; held-out digits
are unchanged. The same call always writes the same bytes.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

QUESTION = "<image>\nWhich digit is this?"
NUM_TRAIN = 1500
BRIGHTEST = 16
"""Largest value in the data set, which counts inked pixels in 4 x 4 blocks."""


def draw(ink, size: int) -> Image.Image:
    """Turn 8 x 8 ink counts into a ``size`` x ``size`` image, white on black."""
    pixels = (ink * (255 / BRIGHTEST)).round().astype("uint8")
    return Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC)


def vary(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Rotate by up to 10 degrees, scale by up to a tenth and shift by up to a tenth of the side."""
    angle, scale = math.radians(rng.uniform(-10, 10)), rng.uniform(0.9, 1.1)
    dx, dy = rng.uniform(-0.1, 0.1, 2) * image.width
    cos, sin, half = math.cos(angle) / scale, math.sin(angle) / scale, image.width / 2
    x, y = half + dx, half + dy  # new position of the centre
    coefficients = (cos, sin, half - cos * x - sin * y, -sin, cos, half + sin * x - cos * y)
    return image.transform(image.size, Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC)


def record(name: str, digit: int) -> dict:
    return {
        "id": f"digit-{name}",
        "image": f"images/{name}.png",
        "conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": str(digit)}],
    }


def make_digits(folder: Path, size: int = 64, variants: int = 9) -> dict[str, Path]:
    """Write the images and both record files.

    Returns:
        ``{"train": path, "val": path}``
    """
    digits = load_digits()
    (folder / "images").mkdir(parents=True, exist_ok=True)
    parts: dict[str, list[dict]] = {"train": [], "val": []}
    for index, (ink, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        image = draw(ink, size)
        pictures = {f"{index:04}": image}
        if index < NUM_TRAIN:
            rng = np.random.default_rng(index)
            pictures |= {f"{index:04}-{k}": vary(image, rng) for k in range(1, variants + 1)}
        for name, picture in pictures.items():
            picture.save(folder / "images" / f"{name}.png", compress_level=1)
        parts["train" if index < NUM_TRAIN else "val"] += [record(name, int(digit)) for name in pictures]
    files = {name: folder / f"{name}.jsonl" for name in parts}
    for name, records in parts.items():
        files[name].write_text("".join(json.dumps(entry) + "\n" for entry in records), encoding="utf-8")
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("dir", nargs="?", type=Path, default=Path(".demo/digits"), help="default: %(default)s")
    parser.add_argument("--size", type=int, default=64, help="side of an image in pixels; default: %(default)s")
    parser.add_argument("--variants", type=int, default=9, help="copies of each training digit; default: %(default)s")
    args = parser.parse_args()
    for name, path in make_digits(args.dir, args.size, args.variants).items():
        print(f"{name}: {path}")


if __name__ == "__main__":
    main()
