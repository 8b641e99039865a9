"""The documentation's table of checkpoint sizes equals counts on the released dimensions, and sizes of files."""

from pathlib import Path

import pytest
from peft import get_peft_model_state_dict
from transformers import AutoModelForImageTextToText

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
    "`vera`": {"train_type": "vera"},
    "`adapter`": {"train_type": "adapter"},
    "`reft`": {"train_type": "reft"},
    "`longlora`, embedding and norms": {"train_type": "longlora"},
    "`longlora` without these": {"train_type": "longlora", "longlora_embeddings_and_norms": False},
    "`oft`": {"train_type": "oft"},
    "`ia3`": {"train_type": "ia3"},
}
BY_LAYER = {name: {"train_type": name} for name in ("adalora", "boft", "bone", "fourierft")}
"""Methods that peft cannot build quickly without weights; their count is that of one layer times the layers."""
NOTES = {"adalora": ", before ranks are cut"}


def one_layer():
    """Build the 4B with one layer of the language model at its released width, and little else."""
    config = make_config("4b")
    config.text_config.num_hidden_layers, config.text_config.vocab_size = 1, 600
    config.vision_config.depth, config.vision_config.deepstack_visual_indexes = 1, [0]
    return AutoModelForImageTextToText.from_config(config)


def row(name, count):
    return f"| {name} | {count:,} | {count * 4 / 2**20:.1f} |"


def kept(model, settings):
    return sum(value.numel() for value in get_peft_model_state_dict(prepare_model(model, settings)).values())


@pytest.mark.parametrize("name", ROWS)
def test_a_row_says_what_an_adapter_of_the_4b_takes(name):
    count = kept(skeleton(make_config("4b")), TunerConfig(**ROWS[name]))
    assert row(name, count) in GUIDE.read_text()


@pytest.mark.parametrize("name", BY_LAYER)
def test_a_row_of_a_method_counted_on_one_layer(name):
    layers = make_config("4b").text_config.num_hidden_layers
    count = layers * kept(one_layer(), TunerConfig(**BY_LAYER[name]))
    assert row(f"`{name}`{NOTES.get(name, '')}", count) in GUIDE.read_text()


def test_rows_of_methods_that_write_a_whole_model():
    model = skeleton(make_config("4b"))
    base = sum(value.numel() for value in model.parameters())
    larger = sum(value.numel() for value in prepare_model(model, TunerConfig(train_type="llamapro")).parameters())
    assert row("`full`", base) in GUIDE.read_text()
    assert row("`llamapro`", larger) in GUIDE.read_text()
    new_blocks = 4 * sum(value.numel() for value in model.model.language_model.layers[0].parameters())
    assert larger == base + new_blocks


def test_a_file_holds_what_is_counted_and_no_more(tiny_dir, tmp_path):
    rows = ROWS | BY_LAYER
    del rows["adalora"]  # ranks that are still at zero are not written
    for number, settings in enumerate(rows.values()):
        model = load_model(tiny_dir, torch_dtype="float32")
        count = kept(model, TunerConfig(**settings))
        saved = prepare_model(load_model(tiny_dir, torch_dtype="float32"), TunerConfig(**settings))
        saved.save_pretrained(tmp_path / str(number))
        size = (tmp_path / str(number) / "adapter_model.safetensors").stat().st_size
        assert 0 <= size - 4 * count < 30_000, "weights in float32, and the names before them"
