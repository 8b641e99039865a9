"""Records and settings of a short run on the tiny model, for tests of whole runs."""

import json

from cases import picture

ONE_FULL_EPOCH = (
    "tuner.train_type=full",
    "training.packing=false",
    "training.num_train_epochs=1",
    "training.learning_rate=1e-3",
    "training.max_grad_norm=1e9",
    "training.activation_checkpointing=false",
    "training.logging_steps=1",
    "training.save_strategy=no",
)
"""Overrides of a run whose loss and unclipped gradient are compared with a computation by hand."""


def write_questions(
    folder, count, name="train", *, first=0, answer="it is", widths=(64, 80, 96), longest=3, text_every=None
):
    """Write ``NAME.jsonl`` of records that ask for an image's number, with their images, and return its path.

    Args:
        first: number of the first record.
        answer: words before the number; record ``i`` repeats both ``1 + i % longest`` times.
        widths: widths of the images in turn, in pixels; their height is 64.
        text_every: every so many-th record has no image; None gives all of them one.
    """
    path = folder / f"{name}.jsonl"
    lines = []
    for i in range(first, first + count):
        record = {"id": f"r{i}"}
        if text_every is None or i % text_every:
            picture(widths[i % len(widths)], 64, i).save(folder / f"{i}.png")
            record["image"] = f"{i}.png"
        question = "<image>\nWhat?" if "image" in record else "What?"
        answered = f"{answer} {i} " * (1 + i % longest)
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answered}]
        lines.append(json.dumps(record | {"conversations": turns}))
    path.write_text("\n".join(lines) + "\n")
    return path


def write_records(folder):
    """Write eight training and three validation records with their images: ``train.jsonl`` and ``val.jsonl``."""
    write_questions(folder, 8)
    write_questions(folder, 3, "val", first=8)
    return folder


EVALUATED_TWICE = (
    "template.max_length=160",
    "training.learning_rate=1e-3",
    "training.logging_steps=1",
    "training.max_steps=4",
    "training.eval_strategy=steps",
    "training.eval_steps=2",
)
"""Overrides of a run of four steps with an evaluation after every second one."""


def short_run(model, data, output, *more):
    """Return the overrides that short runs share, then ``more``: float32, no dataloader workers, no reports."""
    return [
        f"model.model={model}",
        "model.torch_dtype=float32",
        f"data.train={data}",
        "training.dataloader_num_workers=0",
        "training.report_to=none",
        f"training.output_dir={output}",
        *more,
    ]


def first_step(output):
    """Return the loss and the gradient norm that a run logged at its first step."""
    first = json.loads((output / "trainer_log.jsonl").read_text().splitlines()[0])
    return first["loss"], first["grad_norm"]


def saves(more, *, keep):
    """Return overrides by which every second step saves, unless ``more`` turns saving off: then nothing reads them.

    Args:
        keep: number of checkpoints that stay.
    """
    often = ("training.save_strategy=steps", "training.save_steps=2", f"training.save_total_limit={keep}")
    return () if _turned_off("save", more) else often


def run_settings(tiny_dir, data, output, *more):
    """Return overrides of a run of six steps that evaluates and saves at every second one, unless ``more`` turns it
    off."""
    often = [f"training.{kind}_steps=2" for kind in ("eval", "save") if not _turned_off(kind, more)]
    return short_run(
        tiny_dir,
        data / "train.jsonl",
        output,
        f"data.val={data / 'val.jsonl'}",
        "template.max_length=160",
        "tuner.train_type=full",
        "tuner.freeze_vit=false",
        "tuner.freeze_aligner=false",
        "training.max_steps=6",
        "training.learning_rate=1e-3",
        "training.activation_checkpointing=false",
        "training.logging_steps=1",
        "training.eval_strategy=steps",
        "training.save_strategy=steps",
        *often,
        *more,
    )


def _turned_off(kind, overrides):
    return any(f"training.{kind}_strategy={when}" in overrides for when in ("no", "epoch"))
