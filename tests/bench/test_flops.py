"""The FLOP counter against torch's, which counts the products that are really computed."""

import pytest
import torch
from cases import MOST_KINDS
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from qwenvl_ft.bench.flops import Recurrence, Row, Work, _counted, model_work, peak_tflops
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
LORA_ON_EVERYTHING = (*LORA, "tuner.target_parameters=[]")
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


CHUNK = 64


def of_torch_alone(counter, config, length, work):
    """Return what torch counts of delta nets in one sample, without convolutions, and the counter's part of those.

    torch multiplies whole chunks and all pairs of a chunk, reads the state before the first chunk, which is zero, and
    adds the last chunk to it; it counts no solution of a triangular system, only the product in its backward pass.
    """
    chunks = -(-length // CHUNK)
    heads, key, value = config.linear_num_value_heads, config.linear_key_head_dim, config.linear_value_head_dim
    pairs = CHUNK**2 * chunks * (3 * (2 * key + value) + key + value)
    state = CHUNK * key * value * (3 * 3 * chunks - 4)
    nets = 2 * heads * (pairs + state) * config.layer_types.count("linear_attention")
    operations = counter.get_flop_counts()["Global"]
    return nets, sum(count for name, count in operations.items() if "conv" in str(name))


@pytest.mark.parametrize("settings", [FULL, ALIGNER, LORA_ON_EVERYTHING], ids=["full", "aligner", "lora"])
@pytest.mark.parametrize("kind", ["qwen3_5", pytest.param("qwen3_5_moe", marks=pytest.mark.soak)])
def test_a_step_of_gated_delta_nets_costs_what_torch_counts(checkpoints, kind, settings):
    folder = str(checkpoints[kind])
    model = load_model(folder, torch_dtype="float32", attn_impl="sdpa")
    model = prepare_model(model, load_recipe(None, [*settings, f"model.model={folder}"]).tuner).train()
    if kind.endswith("moe"):
        model.set_experts_implementation("eager")
    processor = load_processor(folder)
    use_raw_patches(model, processor.image_processor)
    batch = QwenVLCollator()([sample(Encoder(processor, raw_pixels=True), 60)])
    length = batch["input_ids"].shape[1]
    assert length > CHUNK, "vacuous: no state passes from a chunk to the next"
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss_sum(model, split_labels(batch)).backward()
    work, config = model_work(model), model.config.get_text_config()
    flops = work.flops([Row([length], [24], int((batch["labels"] != -100).sum()))])
    nets, convolutions = of_torch_alone(counter, config, length, work)
    short = [product for product in work.products if product.name.endswith("conv1d.weight")]
    assert len(short) == len(work.recurrences) == config.layer_types.count("linear_attention") == 3
    channels = 2 * config.linear_num_key_heads * config.linear_key_head_dim
    channels += config.linear_num_value_heads * config.linear_value_head_dim
    assert [product.size for product in short] == [4 * channels] * 3
    own = sum(int(2 * product.size * length) * (1 + product.weight_grad + product.input_grad) for product in short)
    causal = flops["text attention"]
    everything = (
        flops["total"] - flops["delta nets"] - own - causal + causal * length**2 // (length * (length + 1) // 2)
    )
    assert counter.get_total_flops() - convolutions - nets == everything
    assert all(net.grad for net in work.recurrences)


def test_a_delta_net_costs_what_its_definition_needs_token_by_token():
    """By hand: two chunks of 64 and one of 2 tokens; a head with keys of 2 and values of 3."""
    counts, _ = _counted([Row([130], [], 0)], 4)
    pairs = 2 * sum(range(1, 65)) + 1 + 2
    assert (counts["chunk pair"], counts["reader"], counts["writer"]) == (pairs, 66, 128)
    assert Recurrence(1, 2, 3, False).multiplications(counts) == 12 * pairs + 6 * (2 * 66 + 128)
    assert Work(recurrences=[Recurrence(5, 2, 3, True)]).flops([Row([130], [], 0)])["delta nets"] == 30 * (
        12 * pairs + 6 * 260
    )


def test_short_samples_keep_no_state():
    counts, _ = _counted([Row([64, 1, 63], [], 0)], 4)
    assert (counts["reader"], counts["writer"]) == (0, 0)
    assert _counted([Row([65], [], 0)], 4)[0]["reader"] == 1


def test_frozen_delta_nets_cost_no_backward_pass():
    model = random_model(make_config("qwen3.5-tiny"), load_recipe(None, []).model, torch.device("meta"))
    row = Row([200], [], 10)
    trained = model_work(model).flops([row])["delta nets"]
    model.requires_grad_(False)
    assert 3 * model_work(model).flops([row])["delta nets"] == trained > 0


def test_rows_of_several_samples_cost_the_sum_of_their_squares():
    with torch.device("meta"):
        work = model_work(random_model(make_config("tiny"), load_recipe(None, []).model, torch.device("meta")))
    apart = [work.flops([Row([length], [4 * length], length // 2)]) for length in (100, 300)]
    together = work.flops([Row([100, 300], [400, 1200], 200)])
    assert together == {name: sum(flops[name] for flops in apart) for name in together}
    assert work.flops([Row([400], [1600], 200)])["text attention"] > 1.5 * together["text attention"]


RELEASED = [
    ("2b", 2.13),
    ("4b", 4.44),
    ("8b", 8.77),
    ("30b-a3b", 31.07),
    ("qwen3.5-0.8b", 0.85),
    ("qwen3.5-2b", 2.21),
    ("qwen3.5-4b", 4.54),
    ("qwen3.5-9b", 9.41),
    ("qwen3.5-27b", 27.36),
    ("qwen3.5-35b-a3b", 35.11),
    ("qwen3.5-122b-a10b", 122.56),
    ("qwen3.5-397b-a17b", 396.80),
]
"""Size -> billions of weights; those of Qwen3.5 without the layer that predicts a second token, which is not loaded."""


@pytest.mark.parametrize(("name", "billions"), RELEASED)
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
