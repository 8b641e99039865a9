"""Dense-caption records on disk, with pictures in which every object fills its box."""

import json

import numpy as np
from PIL import Image, ImageDraw
from run_cases import short_run

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 230)}


def dense_record(number, folder, *, size=(160, 128), objects=None):
    """Save a grey picture with one to three rectangles and return its record."""
    rng = np.random.default_rng([number, 11])
    width, height = size
    image = Image.new("RGB", size, (128, 128, 128))
    draw = ImageDraw.Draw(image)
    entries = []
    for k, name in enumerate(list(COLOURS)[: objects or 1 + number % 3]):
        left = 8 + k * (width // 3) + int(rng.integers(0, 8))
        top = int(rng.integers(8, height // 2))
        right, bottom = left + width // 3 - 20, top + int(rng.integers(24, height // 2 - 10))
        draw.rectangle((left, top, right - 1, bottom - 1), fill=COLOURS[name])
        entries.append({"desc": f"{name}/part {number}", "bbox_2d": [left, top, right, bottom]})
    path = folder / f"{number}.png"
    image.save(path)
    summary = "，".join(f"{entry['desc']}×1" for entry in entries)  # noqa: RUF001
    return {"images": [path.name], "width": width, "height": height, "objects": entries, "summary": summary}


def write_dense(folder, count, name="dense.jsonl", first=0, **options):
    """Write a .jsonl of ``count`` records next to their pictures and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    records = [dense_record(number, folder, **options) for number in range(first, first + count)]
    path = folder / name
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def dense_settings(tiny_dir, data, output, *more):
    """Return the overrides of a small full fine-tuning run on dense captions, exact on the CPU."""
    return short_run(
        tiny_dir,
        data,
        output,
        "template.max_length=1600",
        "tuner.train_type=full",
        "tuner.freeze_vit=false",
        "tuner.freeze_aligner=false",
        "training.num_train_epochs=3",
        "training.learning_rate=1e-3",
        "training.activation_checkpointing=false",
        "training.logging_steps=1",
        "training.save_strategy=no",
        *more,
    )
