"""The shipped curriculum trains, as it is, on a small model."""

import json

from cases import picture
from safetensors.torch import load_file

from qwenvl_ft import train
from qwenvl_ft.cli.main import main
from qwenvl_ft.recipe.load import load_recipe

COUNTS = {"1/3 simple": 1, "2/3 medium": 1, "3/3 full": 2}
"""Phase -> its samples: groups of two records."""


def test_it_trains_on_a_file_that_split_has_split(tiny_dir, tmp_path):
    lines = []
    for i, count in enumerate((1, 2, 5, 6)):
        picture(96, 64, i).save(tmp_path / f"{i}.png")
        objects = [{"bbox_2d": [4 + 3 * k, 8, 30 + 3 * k, 40], "desc": f"thing {k}"} for k in range(count)]
        lines.append(json.dumps({"images": [f"{i}.png"], "objects": objects, "width": 96, "height": 64}))
    (tmp_path / "full.jsonl").write_text("\n".join(lines) + "\n")
    assert main(["split", str(tmp_path / "full.jsonl")]) == 0
    overrides = [f"model.model={tiny_dir}", "training.max_steps=1"]
    overrides += [f"training.output_dir={tmp_path / 'run'}", f"phases.full.data.train={tmp_path}/full.jsonl"]
    overrides += [f"phases.{name}.data.train={tmp_path}/full.{name}.jsonl" for name in ("simple", "medium")]
    assert train(load_recipe("curriculum", overrides)).steps == 3
    log = (tmp_path / "run" / "training.log").read_text()
    assert [log.count(f"phase {phase}: data.train: {count} ") for phase, count in COUNTS.items()] == [1, 1, 1]
    widened = [
        load_file(tmp_path / "run" / f"phase_{name}" / "adapter_model.safetensors") for name in ("1_simple", "2_medium")
    ]
    assert not any("language_model" in name for name in widened[0])
    assert any("language_model" in name for name in widened[1])
