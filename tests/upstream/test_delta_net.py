"""Delta-net layers of a packed row restart at each sample. Reference: the plain layers on each sample alone."""

import copy
import sys
from types import SimpleNamespace

import pytest
import torch
from cases import gradient_tolerance, without_hooks
from torch import nn

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.model.load import load_model
from qwenvl_ft.model.packed_attention import sample_lengths
from qwenvl_ft.upstream import delta_net
from qwenvl_ft.upstream.delta_net import CHUNK, make_fold, restart_at_borders

ROWS = {
    "long and short": [130, 5, 3, 64, 61, 1, 62],
    "one length": [40, 40, 40],
    "a chunk each": [64, 64, 128],
    "one sample": [90],
    "one token each": [1, 1, 1, 1],
}


@pytest.fixture(scope="module", params=["qwen3_5", "qwen3_5_moe"])
def text_model(request, checkpoints):
    return load_model(checkpoints[request.param], torch_dtype="float32", attn_impl="sdpa").model.language_model


def row_of(model, lengths):
    torch.manual_seed(0)
    embeds = torch.randn(1, sum(lengths), model.config.hidden_size)
    positions = torch.cat([torch.arange(length) for length in lengths]).expand(4, 1, -1)
    return embeds, positions


def run(model, embeds, positions, **options):
    """Return the hidden states [T, D] and the gradients of a fixed sum over them."""
    model.zero_grad(set_to_none=True)
    states = model(inputs_embeds=embeds, position_ids=positions, **options).last_hidden_state[0]
    (states * torch.linspace(-1, 1, states.shape[1])).sum().backward()
    return states.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def run_alone(model, embeds, positions, lengths):
    found, total = [], {}
    for piece in torch.arange(sum(lengths)).split(lengths):
        states, grads = run(model, embeds[:, piece], positions[..., piece])
        found.append(states)
        total = {name: grad + total.get(name, 0) for name, grad in grads.items()}
    return torch.cat(found), total


def borders_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


@pytest.mark.parametrize("known_by", ["cu_seq_lens_q", "positions"])
@pytest.mark.parametrize("lengths", ROWS.values(), ids=ROWS)
def test_a_packed_row_equals_its_samples_alone(text_model, lengths, known_by):
    embeds, positions = row_of(text_model, lengths)
    plain = without_hooks(text_model)
    expected, grads = run_alone(plain, embeds, positions, lengths)
    options = {}
    if known_by == "cu_seq_lens_q":
        options = {f"cu_seq_lens_{side}": borders_of(lengths) for side in "qk"}
        options |= {f"max_length_{side}": max(lengths) for side in "qk"}
    states, packed = run(text_model, embeds, positions, **options)
    torch.testing.assert_close(states, expected, rtol=1e-5, atol=2e-5)
    least = 1e-2 * max(grad.abs().max() for grad in grads.values())
    for name, grad in grads.items():
        scale = grad.abs().max().clamp_min(least)
        assert (packed[name] - grad).abs().max() <= gradient_tolerance(name) * scale, name


@pytest.mark.parametrize("broken", ["no restart", "no gap", "no hooks"])
def test_each_part_is_needed(text_model, broken, monkeypatch):
    lengths = ROWS["long and short"]
    embeds, positions = row_of(text_model, lengths)
    plain = without_hooks(text_model)
    expected, _ = run_alone(plain, embeds, positions, lengths)
    if broken == "no restart":
        monkeypatch.setattr(delta_net._Restarting, "_restart", lambda self, module, args, output: output)
        text_model = plain
        restart_at_borders_again(text_model)
    elif broken == "no gap":
        monkeypatch.setattr(delta_net, "make_fold", lambda lengths, gap, device: make_fold(lengths, 0, device))
    else:
        text_model = plain
    with torch.no_grad():
        states = text_model(inputs_embeds=embeds, position_ids=positions).last_hidden_state[0]
    assert not torch.allclose(states, expected, atol=1e-3)


def restart_at_borders_again(model):
    for module in model.modules():
        vars(module).pop(delta_net.MARK, None)
    assert restart_at_borders(model, sample_lengths) == 3


def test_a_fold_keeps_every_token_once_and_starts_samples_at_chunks():
    fold = make_fold([100, 30, 20], gap=3)
    assert (fold.rows, fold.width) == (2, 100)
    assert fold.places.tolist() == [*range(100), *range(100, 130), *range(164, 184)]
    assert fold.restarts.tolist() == [163]
    assert set(fold.empty.tolist()) == set(range(200)) - set(fold.places.tolist())
    tokens = torch.randn(150, 4)
    folded = fold.fold(tokens)
    assert torch.equal(fold.unfold(folded), tokens)
    assert not folded.flatten(0, 1)[fold.empty].any()


@pytest.mark.parametrize("length", [61, 62, 64])
def test_samples_that_do_not_leave_the_gap_take_another_chunk(length):
    fold = make_fold([4 * CHUNK, length, 1], gap=3)
    start = int(fold.places[-1]) % fold.width
    assert start == (CHUNK if length + 3 <= CHUNK else 2 * CHUNK)


def test_rows_of_a_batch_are_samples_too(text_model):
    """Two rows whose positions restart nowhere run unchanged, and rows that hold two samples each are isolated."""
    embeds, positions = row_of(text_model, [20, 10, 15, 15])
    plain = without_hooks(text_model)
    expected, _ = run_alone(plain, embeds, positions, [20, 10, 15, 15])
    with torch.no_grad():
        states = text_model(
            inputs_embeds=embeds.view(2, 30, -1), position_ids=positions[:, 0].reshape(4, 2, 30)
        ).last_hidden_state
    torch.testing.assert_close(states.flatten(0, 1), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_isolated_as_well(text_model, dtype):
    """A change of the first sample changes no bit of the others."""
    model = copy.deepcopy(text_model).to(dtype)
    embeds, positions = row_of(model, [70, 9, 30])
    with torch.no_grad():
        first = model(inputs_embeds=embeds.to(dtype), position_ids=positions).last_hidden_state
        embeds[:, :70] += 1
        second = model(inputs_embeds=embeds.to(dtype), position_ids=positions).last_hidden_state
    assert torch.isfinite(first).all()
    assert torch.equal(first[:, 70:], second[:, 70:])
    assert not torch.equal(first[:, :70], second[:, :70])


def test_lora_with_biases_and_copies_of_layers_are_isolated(text_model):
    """An adapter wraps the projections, and a bias in it would fill the gap between two samples."""
    from peft import LoraConfig, get_peft_model

    copied = copy.deepcopy(text_model)
    targets = ["in_proj_qkv", "in_proj_a", "in_proj_b", "in_proj_z", "out_proj"]
    model = get_peft_model(copied, LoraConfig(target_modules=targets, lora_bias=True, init_lora_weights=False))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name and name.endswith("bias"):
                value.normal_()
    lengths = ROWS["long and short"]
    embeds, positions = row_of(text_model, lengths)
    expected, _ = run_alone(without_hooks(model), embeds, positions, lengths)
    with torch.no_grad():
        states = model(inputs_embeds=embeds, position_ids=positions).last_hidden_state[0]
    torch.testing.assert_close(states, expected, rtol=1e-5, atol=5e-5)


def test_generation_with_a_cache_is_left_alone(checkpoints):
    model = load_model(checkpoints["qwen3_5"], torch_dtype="float32", attn_impl="sdpa").eval()
    ids = torch.arange(5, 25)[None]
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "use_cache": True}
    plain = copy.deepcopy(model)
    plain.model.language_model = without_hooks(model.model.language_model)
    assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options))


def test_a_release_that_computes_otherwise_is_refused(checkpoints, monkeypatch):
    """The trial at loading finds a delta net whose chunks are not those that the fold assumes."""
    from transformers.models.qwen3_5 import modeling_qwen3_5

    forward = modeling_qwen3_5.Qwen3_5GatedDeltaNet.forward

    def leaking(self, hidden_states, *args, **kwargs):
        return forward(self, hidden_states, *args, **kwargs) + hidden_states.cumsum(1)

    delta_net._leaks.cache_clear()
    monkeypatch.setattr(modeling_qwen3_5.Qwen3_5GatedDeltaNet, "forward", leaking)
    try:
        with pytest.raises(RecipeError, match="lets samples of a packed row see each other"):
            load_model(checkpoints["qwen3_5"], torch_dtype="float32")
    finally:
        delta_net._leaks.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_trial_finds_a_leak_in_either_dtype(monkeypatch, dtype):
    monkeypatch.setattr(delta_net, "trial_place", lambda: (torch.device("cpu"), dtype))
    trial = delta_net._leaks.__wrapped__
    assert trial() == ""
    monkeypatch.setattr(delta_net._Restarting, "_restart", lambda self, module, args, output: output)
    assert trial() == delta_net.LEAKS


def test_the_trial_is_on_the_gpu_of_this_process(monkeypatch):
    """There transformers calls kernels of flash-linear-attention, if it is installed, that no CPU runs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert delta_net.trial_place() == (torch.device("cuda:1"), torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert delta_net.trial_place() == (torch.device("cpu"), torch.float32)


def test_models_without_a_delta_net_get_no_hook(monkeypatch):
    monkeypatch.setattr(delta_net, "RESTARTS", SimpleNamespace(require=lambda key: sys.exit("asked")))
    assert restart_at_borders(nn.Sequential(nn.Linear(2, 2)), sample_lengths) == 0
