"""The patch embedding as a matrix product equals the convolution, with the same weights and names."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.model.load import load_model
from qwenvl_ft.model.patch_embed import PatchConv3d, use_linear_patch_embed

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


def patches_and_grads(module, patches, weights):
    patches = patches.clone().requires_grad_(True)
    out = module(patches)
    (out * weights).sum().backward()
    return out.detach(), patches.grad, {name: parameter.grad for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_product_equals_convolution_forward_and_backward(tiny_dir, dtype):
    name = str(dtype).removeprefix("torch.")
    conv = load_model(tiny_dir, torch_dtype=name, patch_embed="conv3d").model.visual.patch_embed
    linear = load_model(tiny_dir, torch_dtype=name).model.visual.patch_embed
    assert type(conv.proj) is nn.Conv3d
    assert type(linear.proj) is PatchConv3d
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(37, 3 * 2 * 16 * 16, generator=generator).to(dtype)
    weights = torch.randn(37, 64, generator=generator).to(dtype)
    expected = patches_and_grads(conv, patches, weights)
    found = patches_and_grads(linear, patches, weights)
    close = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype] * 10}
    torch.testing.assert_close(found[0], expected[0], **close)
    torch.testing.assert_close(found[1], expected[1], **close)
    assert found[2].keys() == {"proj.weight", "proj.bias"}
    for key, grad in expected[2].items():
        torch.testing.assert_close(found[2][key], grad, **close)
        assert grad.abs().max() > 0.1, "vacuous: no gradient"
    assert not torch.allclose(found[0], expected[0].roll(1, dims=0), **close), "vacuous: rows are alike"


def test_saved_checkpoint_is_the_same_file(tiny_dir, tmp_path):
    load_model(tiny_dir, torch_dtype="float32").save_pretrained(tmp_path)
    saved, original = load_file(tmp_path / "model.safetensors"), load_file(tiny_dir / "model.safetensors")
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[name], original[name]) for name in original)
    assert saved["model.visual.patch_embed.proj.weight"].ndim == 5


def test_survives_a_deep_copy(tiny_dir):
    """An EMA or a copy of modules_to_save must not fall back to the slow path."""
    clone = copy.deepcopy(load_model(tiny_dir).model.visual)
    assert type(clone.patch_embed.proj) is PatchConv3d


def test_only_convolutions_over_single_patches_are_taken():
    holder = nn.Module()
    holder.patch_embed = nn.Module()
    holder.patch_embed.proj = nn.Conv3d(3, 4, kernel_size=2, stride=1)
    with pytest.raises(AssertionError, match="not a convolution over single patches"):
        use_linear_patch_embed(holder)
    assert use_linear_patch_embed(nn.Linear(2, 2)) == 0


def test_unknown_choice_is_named(tiny_dir):
    with pytest.raises(RecipeError, match=r"unknown model.patch_embed 'line'. Did you mean 'linear'"):
        load_model(tiny_dir, patch_embed="line")
