"""The FLOP counter against torch's, which counts the products that are really computed."""

import pytest
import torch
from cases import MOST_KINDS
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from qwenvl_ft.bench.flops import Row, model_work, peak_tflops
from qwenvl_ft.bench.sizes import SIZES, make_config, random_model
from qwenvl_ft.data.collate import QwenVLCollator
from qwenvl_ft.data.encode.encoder import Encoder
from qwenvl_ft.model.load import load_model, load_processor
from qwenvl_ft.model.patch_embed import use_raw_patches
from qwenvl_ft.recipe.load import load_recipe
from qwenvl_ft.training.loss import loss_sum, split_labels
from qwenvl_ft.tuning.prepare import prepare_model

FULL = ("tuner.train_type=full", "tuner.freeze_vit=false", "tuner.freeze_aligner=false")
FROZEN_TOWER = ("tuner.train_type=full", "tuner.freeze_vit=true", "tuner.freeze_aligner=true")
ALIGNER = ("tuner.train_type=full", "tuner.freeze_llm=true", "tuner.freeze_vit=true")
LORA = ("tuner.train_type=lora", "tuner.lora_dropout=0")
LORA_EVERYWHERE = (*LORA, "tuner.freeze_vit=false", "tuner.freeze_aligner=false")
LORA_ON_ATTENTION = (*LORA, "tuner.target_modules=[q_proj,k_proj,v_proj,o_proj]")
CASES = [("dense", settings) for settings in (FULL, FROZEN_TOWER, ALIGNER, LORA, LORA_EVERYWHERE)]
CASES += [("moe", settings) for settings in (FULL, FROZEN_TOWER, ALIGNER, LORA_ON_ATTENTION)]


def counted(model, batch):
    """Count the FLOPs of one step with torch's own counter."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss_sum(model, split_labels(batch)).backward()
    return counter.get_total_flops()


def sample(encoder, words):
    from cases import picture

    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "yes " * words}]
    return encoder({"image": [picture(96, 64)], "conversations": turns})


@pytest.mark.parametrize(("kind", "settings"), CASES)
def test_a_step_costs_what_torch_counts(checkpoints, kind, settings):
    """torch multiplies all pairs of tokens, also those that the causal mask hides; the difference is exactly these."""
    folder = str(checkpoints[kind])
    model = load_model(folder, torch_dtype="float32", attn_impl="sdpa")
    model = prepare_model(model, load_recipe(None, [*settings, f"model.model={folder}"]).tuner).train()
    if kind == "moe":
        model.set_experts_implementation("eager")
    processor = load_processor(folder)
    use_raw_patches(model, processor.image_processor)
    batch = QwenVLCollator()([sample(Encoder(processor, raw_pixels=True), 9)])
    length = batch["input_ids"].shape[1]
    row = Row([length], [24], int((batch["labels"] != -100).sum()))
    work = model_work(model)
    flops = work.flops([row])
    causal = flops["text attention"]
    everything = flops["total"] - causal + causal * length**2 // (length * (length + 1) // 2)
    assert counted(model, batch) == everything
    assert set(flops) == {"text", "vision", "head", "text attention", "vision attention", "total"}


def test_rows_of_several_samples_cost_the_sum_of_their_squares():
    with torch.device("meta"):
        work = model_work(random_model(make_config("tiny"), load_recipe(None, []).model, torch.device("meta")))
    apart = [work.flops([Row([length], [4 * length], length // 2)]) for length in (100, 300)]
    together = work.flops([Row([100, 300], [400, 1200], 200)])
    assert together == {name: sum(flops[name] for flops in apart) for name in together}
    assert work.flops([Row([400], [1600], 200)])["text attention"] > 1.5 * together["text attention"]


@pytest.mark.parametrize(("name", "billions"), [("2b", 2.13), ("4b", 4.44), ("8b", 8.77), ("30b-a3b", 31.07)])
def test_the_released_sizes_have_as_many_weights_as_released(name, billions):
    model = random_model(make_config(name), load_recipe(None, []).model, torch.device("meta"))
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.005)
    assert name in SIZES


def test_a_dense_forward_pass_costs_two_for_each_weight_and_token():
    """The known rule of thumb, 6 N a token with a backward pass, on the language model of 8B."""
    model = random_model(make_config("8b"), load_recipe(None, []).model, torch.device("meta"))
    weights = sum(p.numel() for p in model.model.language_model.layers.parameters() if p.dim() == 2)
    flops = model_work(model).flops([Row([1000], [], 0)])
    assert flops["text"] == 6 * weights * 1000
    model.requires_grad_(False)
    assert model_work(model).flops([Row([1000], [], 0)])["text"] == 2 * weights * 1000


@pytest.mark.parametrize(
    ("device", "peak"), [("NVIDIA H200", 989.4), ("NVIDIA A100-SXM4-80GB", 312.0), ("NVIDIA H100 PCIe", 756.5)]
)
def test_a_gpu_is_known_by_its_name(device, peak):
    assert peak_tflops(device) == peak
    assert peak_tflops("Some other device") is None


@pytest.mark.parametrize("kind", MOST_KINDS)
def test_weights_that_zero_3_holds_in_parts_count_as_whole_ones(checkpoints, kind):
    model = load_model(str(checkpoints[kind]), torch_dtype="float32", attn_impl="sdpa")
    row = Row([40, 24], [24, 16], 9)
    whole = model_work(model).flops([row])
    for parameter in model.parameters():
        parameter.ds_shape, parameter.data = parameter.shape, torch.empty(0)
    assert model_work(model).flops([row]) == whole
