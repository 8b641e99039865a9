"""Records and settings of a short run on the tiny model, for tests of whole runs."""

import json

from cases import picture


def write_records(folder):
    """Write eight training and three validation records with their images: ``train.jsonl`` and ``val.jsonl``."""
    for name, first, count in (("train", 0, 8), ("val", 8, 3)):
        lines = []
        for i in range(first, first + count):
            picture(64 + 16 * (i % 3), 64, i).save(folder / f"{i}.png")
            turns = [
                {"from": "human", "value": "<image>\nWhat?"},
                {"from": "gpt", "value": f"it is {i} " * (1 + i % 3)},
            ]
            lines.append(json.dumps({"id": f"r{i}", "image": f"{i}.png", "conversations": turns}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def run_settings(tiny_dir, data, output, *more):
    """Return overrides of a run of six steps that evaluates and saves at every second one."""
    return [
        f"model.model={tiny_dir}",
        "model.torch_dtype=float32",
        f"data.train={data / 'train.jsonl'}",
        f"data.val={data / 'val.jsonl'}",
        "template.max_length=160",
        "tuner.train_type=full",
        "tuner.freeze_vit=false",
        "tuner.freeze_aligner=false",
        "training.max_steps=6",
        "training.learning_rate=1e-3",
        "training.dataloader_num_workers=0",
        "training.activation_checkpointing=false",
        "training.logging_steps=1",
        "training.eval_strategy=steps",
        "training.eval_steps=2",
        "training.save_strategy=steps",
        "training.save_steps=2",
        "training.report_to=none",
        f"training.output_dir={output}",
        *more,
    ]
