"""Models are stored as the released ones: names, experts, config; both layouts are read, also of square experts."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from cases import KINDS
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from qwenvl_ft.errors import CheckpointError
from qwenvl_ft.model.load import load_model
from qwenvl_ft.model.released_layout import released_config, released_state, use_released_layout
from qwenvl_ft.model.tiny import make_tiny
from qwenvl_ft.training.saved_config import cache_enabled
from qwenvl_ft.upstream.expert_layout import EXPERTS

ATTENTION = {f"self_attn.{kind}.weight" for kind in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")}
NORMS = {"input_layernorm.weight", "post_attention_layernorm.weight"}
DELTA_NET = {f"linear_attn.in_proj_{kind}.weight" for kind in ("qkv", "z", "a", "b")} | {
    f"linear_attn.{name}" for name in ("conv1d.weight", "A_log", "dt_bias", "norm.weight", "out_proj.weight")
}
EXPERT_NAMES = {"mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
LAYER = {
    "dense": ATTENTION | NORMS | {f"mlp.{kind}_proj.weight" for kind in ("gate", "up", "down")},
    "moe": ATTENTION | NORMS | EXPERT_NAMES,
    "qwen3_5": DELTA_NET | NORMS | {f"mlp.{kind}_proj.weight" for kind in ("gate", "up", "down")},
    "qwen3_5_moe": DELTA_NET
    | NORMS
    | EXPERT_NAMES
    | {"mlp.shared_expert_gate.weight"}
    | {f"mlp.shared_expert.{kind}_proj.weight" for kind in ("gate", "up", "down")},
}
"""Kind -> names in the first layer of the released Qwen3-VL-4B, Qwen3-VL-30B-A3B, Qwen3.5-4B and Qwen3.5-35B-A3B."""
TOP = {"dense": set(), "moe": {"lm_head.weight"}, "qwen3_5": set(), "qwen3_5_moe": {"lm_head.weight"}}
"""Kind -> names outside of ``model``: the small dense models are tied and store no language head."""
SQUARE = {"hidden = 2 inner": {"moe_intermediate_size": 32}, "hidden = inner": {"moe_intermediate_size": 64}}
"""Sizes that make ``gate_up_proj`` or ``down_proj`` square, for a hidden size of 64."""


def weights(folder):
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def transposed(state):
    return {name: value.mT.contiguous() if name.endswith(EXPERTS) else value for name, value in state.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_names_shapes_and_config_are_those_of_the_released_models(checkpoints, kind):
    stored = weights(checkpoints[kind])
    prefix = "model.language_model.layers.0."
    assert {name.removeprefix(prefix) for name in stored if name.startswith(prefix)} == LAYER[kind]
    outside = {name for name in stored if not re.match(r"model\.(visual|language_model)\.", name)}
    assert outside == TOP[kind]
    assert {"model.language_model.embed_tokens.weight", "model.language_model.norm.weight"} <= set(stored)
    text = json.loads((checkpoints[kind] / "config.json").read_text())["text_config"]
    if kind.startswith("qwen3_5"):
        assert text["rope_parameters"]["mrope_section"] == [2, 1, 1]
        if kind == "qwen3_5_moe":
            assert stored[prefix + "mlp.experts.gate_up_proj"].shape == (8, 2 * 48, 64), "as a Linear, as released"
        return
    assert text["rope_theta"] == 5_000_000
    assert text["rope_scaling"] == {"mrope_interleaved": True, "mrope_section": [4, 2, 2], "rope_type": "default"}
    assert "rope_parameters" not in text
    if kind == "moe":
        assert text["num_experts"] == 8
        assert "num_local_experts" not in text
        assert stored[prefix + "mlp.experts.gate_up_proj"].shape == (8, 64, 2 * 48), "rows times weights, as released"
        assert stored[prefix + "mlp.experts.down_proj"].shape == (8, 48, 64)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_again_is_the_checkpoint(checkpoints, kind, tmp_path):
    model = load_model(checkpoints[kind], torch_dtype="float32")
    with cache_enabled(model.config):
        model.save_pretrained(tmp_path)
    before, after = weights(checkpoints[kind]), weights(tmp_path)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (checkpoints[kind], tmp_path))
    assert old | {"use_cache": True} == new


def test_a_config_with_other_rotary_parameters_is_left_as_it_is():
    """A script of one's own may train a model of another family; saving it must not fail at the end of the run."""
    by_layer = {"text_config": {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "linear": {}}}}
    assert released_config(by_layer) == by_layer
    assert released_config({"rope_parameters": None, "a": 1}) == {"rope_parameters": None, "a": 1}
    plain = {"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}}
    assert released_config(plain) == {"rope_theta": 5.0, "rope_scaling": {"rope_type": "default"}}
    assert "rope_parameters" in plain, "the given config was changed"


def test_experts_compute_with_the_stored_weights_as_the_released_ones_do(checkpoints):
    """By hand: rows times ``gate_up_proj``, gate first, then rows times ``down_proj``."""
    model = load_model(checkpoints["moe"], torch_dtype="float32", attn_impl="sdpa")
    stored = weights(checkpoints["moe"])
    experts = model.model.language_model.layers[1].mlp.experts
    rows = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    gate, up = (rows @ stored["model.language_model.layers.1.mlp.experts.gate_up_proj"][5]).chunk(2, dim=-1)
    by_hand = (torch.nn.functional.silu(gate) * up) @ stored["model.language_model.layers.1.mlp.experts.down_proj"][5]
    with torch.no_grad():
        computed = experts(rows, torch.full((3, 1), 5), torch.ones(3, 1))
    torch.testing.assert_close(computed, by_hand)


@pytest.mark.parametrize("sizes", SQUARE.values(), ids=SQUARE.keys())
def test_a_state_dict_in_either_layout_gives_the_same_values_even_where_experts_are_square(tmp_path, sizes):
    """transformers resumes a run by ``load_state_dict``, for which it has no conversion."""
    folder = make_tiny(tmp_path / "tiny", moe=True, num_hidden_layers=1, vision_depth=3, **sizes)
    released = weights(folder)
    assert any(value.shape[1] == value.shape[2] for name, value in released.items() if name.endswith(EXPERTS)), (
        "vacuous"
    )
    model = load_model(folder, torch_dtype="float32")
    expected = {name: value.mT if name.endswith(EXPERTS) else value for name, value in released.items()}
    for stored in (released, transposed(released)):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        model.load_state_dict(stored)
        state = model.state_dict()
        assert all(torch.equal(state[name], value) for name, value in expected.items())


def test_experts_that_are_sharded_are_left_as_they_are(checkpoints):
    """ZeRO-3 loads a checkpoint of its own with empty weights in place of its shards."""
    model = load_model(checkpoints["moe"], torch_dtype="float32")
    name = next(name for name, _ in model.named_parameters() if name.endswith(EXPERTS))
    parts = {name: torch.empty(0)}
    assert released_state(model, parts)[name] is parts[name]
    strange = {name: torch.empty(8, 5, 64)}
    with pytest.raises(CheckpointError, match=r"has shape \(8, 5, 64\), but config.json gives"):
        model.load_state_dict(strange, strict=False)


def test_the_copy_of_a_tied_head_is_not_stored(tiny_model):
    """DeepSpeed copies every weight of the state dict, so that transformers does not see that two are one."""
    copies = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    assert "lm_head.weight" in copies
    stored = released_state(tiny_model, copies)
    assert copies.keys() - stored.keys() == {"lm_head.weight"}


def test_older_families_keep_the_names_that_transformers_gives_their_released_models(tmp_path):
    """Reference: transformers' own renaming, which is right for a model from one process."""
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 64}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": False}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 2, 2]}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "theirs")
    use_released_layout(model)
    model.save_pretrained(tmp_path / "ours")
    theirs, ours = weights(tmp_path / "theirs"), weights(tmp_path / "ours")
    assert {"visual.merger.ln_q.weight", "model.embed_tokens.weight"} <= theirs.keys()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    begun = Qwen2_5_VLForConditionalGeneration(config)
    use_released_layout(begun)
    assert begun.load_state_dict(ours, strict=False) == ([], []), "a resumed run would begin with other weights"
    assert all(torch.equal(value, begun.state_dict()[name]) for name, value in model.state_dict().items())
    opened = AutoModelForImageTextToText.from_pretrained(tmp_path / "ours")
    assert opened.config.text_config.rope_parameters == config.text_config.rope_parameters


OTHER = Path("/tmp") / "qwenvl_ft_transformers_4.57.6"
SCRIPT = """
import sys, torch
from transformers import AutoModelForImageTextToText
model, info = AutoModelForImageTextToText.from_pretrained(sys.argv[1], dtype=torch.float32, output_loading_info=True)
assert not any(info.values()), info
inputs = torch.load(sys.argv[2])
with torch.no_grad():
    torch.save(model.eval()(**inputs).logits, sys.argv[3])
"""


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_transformers_4_57_reads_what_is_stored(checkpoints, kind, processor, tmp_path):
    """Reference: the release that the models were published for, in an environment of its own."""
    if shutil.which("uv") is None:
        pytest.skip("needs uv, to install transformers 4.57.6 beside today's")
    if not (OTHER / "done").exists():
        subprocess.run(["uv", "venv", "--python", "3.11", "--clear", OTHER], check=True)
        wanted = ["transformers==4.57.6", f"torch=={torch.__version__.partition('+')[0]}", "torchvision", "accelerate"]
        subprocess.run(["uv", "pip", "install", "--python", OTHER / "bin/python", *wanted], check=True)
        (OTHER / "done").touch()
    from cases import picture

    text = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is it?<|im_end|>\n"
    inputs = dict(processor(text=[text], images=[picture(96, 64)], return_tensors="pt"))
    kinds = {"mm_token_type_ids": inputs.pop("mm_token_type_ids")}  # only transformers 5 takes it
    model = load_model(checkpoints[kind], torch_dtype="float32", attn_impl="sdpa")
    model.save_pretrained(tmp_path / "saved")
    torch.save(inputs, tmp_path / "inputs.pt")
    command = [OTHER / "bin/python", "-c", SCRIPT, tmp_path / "saved", tmp_path / "inputs.pt", tmp_path / "logits.pt"]
    subprocess.run(command, check=True)
    today = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved", dtype="float32").eval()
    with torch.no_grad():
        logits = today(**inputs, **kinds).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), logits, rtol=1e-4, atol=1e-5)
    if kind == "moe":
        file = tmp_path / "saved" / "model.safetensors"
        save_file(transposed(load_file(file)), file, metadata={"format": "pt"})
        refused = subprocess.run(command, check=False, capture_output=True, text=True)
        assert refused.returncode != 0, "vacuous: the layout of transformers 5 is read too"
