"""The documentation's table of checkpoint sizes, counted on the released dimensions, and the file it stands for."""

from pathlib import Path

import pytest
from peft import get_peft_model_state_dict

from qwenvl_ft.bench.sizes import make_config
from qwenvl_ft.model.config import skeleton
from qwenvl_ft.model.load import load_model
from qwenvl_ft.recipe.schema import TunerConfig
from qwenvl_ft.tuning.prepare import prepare_model

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "inference.md"
MERGERS = ["model.visual.merger", "model.visual.deepstack_merger_list"]
ALIGNER = {"freeze_llm": True, "freeze_aligner": False}
ROWS = {
    "`lora_rank: 8`, language model": {},
    "`lora_rank: 16`, language model": {"lora_rank": 16},
    "`lora_rank: 8`, `use_dora: true`": {"use_dora": True},
    "`lora_rank: 8`, aligner alone": ALIGNER,
    "aligner in full (`modules_to_save`, no LoRA)": ALIGNER | {"target_regex": "^$", "modules_to_save": MERGERS},
    "`lora_rank: 8`, language model, and the aligner in full": {"modules_to_save": MERGERS},
    "`train_type: vera`": {"train_type": "vera"},
}


def kept(model, told):
    return sum(value.numel() for value in get_peft_model_state_dict(prepare_model(model, told)).values())


@pytest.mark.parametrize("row", ROWS)
def test_a_row_says_what_an_adapter_of_the_4b_takes(row):
    count = kept(skeleton(make_config("4b")), TunerConfig(**ROWS[row]))
    assert f"| {row} | {count:,} | {count * 4 / 2**20:.1f} |" in GUIDE.read_text()


def test_a_file_holds_what_is_counted_and_no_more(tiny_dir, tmp_path):
    for number, told in enumerate(ROWS.values()):
        model = load_model(tiny_dir, torch_dtype="float32")
        count = kept(model, TunerConfig(**told))
        saved = prepare_model(load_model(tiny_dir, torch_dtype="float32"), TunerConfig(**told))
        saved.save_pretrained(tmp_path / str(number))
        size = (tmp_path / str(number) / "adapter_model.safetensors").stat().st_size
        assert 0 <= size - 4 * count < 30_000, "weights in float32, and the names before them"
