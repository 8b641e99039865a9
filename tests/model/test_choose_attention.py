"""``attn_impl`` selects the best installed implementation, or raises an error with the command to install one."""

import pytest
import torch

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.model import choose_attention as attention
from qwenvl_ft.model.choose_attention import resolve_attn_impl


@pytest.fixture
def device(monkeypatch):
    """Pretend that a GPU of a compute capability and some packages exist."""

    def pretend(capability, *packages):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(
            attention.Flash, "installed", lambda self: attention.FLASH[self_name(self)] and self_name(self) in packages
        )

    def self_name(flash):
        return next(name for name, known in attention.FLASH.items() if known is flash)

    return pretend


def test_auto_is_sdpa_without_a_gpu(device):
    device(None, "flash_attention_2")
    assert resolve_attn_impl("auto") == "packed_sdpa"


@pytest.mark.parametrize(
    ("capability", "packages", "expected"),
    [
        ((9, 0), ("flash_attention_2", "flash_attention_3"), "flash_attention_3"),
        ((10, 0), ("flash_attention_2", "flash_attention_3", "flash_attention_4"), "flash_attention_4"),
        ((8, 0), ("flash_attention_2", "flash_attention_3", "flash_attention_4"), "flash_attention_2"),
        ((7, 5), ("flash_attention_2",), "packed_sdpa"),
        ((9, 0), (), "packed_sdpa"),
    ],
)
def test_auto_takes_what_the_device_can_run(device, capability, packages, expected):
    device(capability, *packages)
    assert resolve_attn_impl("auto") == expected
    assert resolve_attn_impl("auto", "float32") == "packed_sdpa", "flash-attention has no float32"


def test_alias_means_flash_attention_2(device):
    device((9, 0), "flash_attention_2", "flash_attention_3")
    assert resolve_attn_impl("flash_attn") == "flash_attention_2"


def test_built_in_names_are_taken_as_they_are():
    assert [resolve_attn_impl(name) for name in attention.BUILT_IN] == list(attention.BUILT_IN)


def test_a_missing_package_is_an_error_with_its_command(device):
    device((9, 0))
    with pytest.raises(RecipeError, match=r"flash_attention_2 cannot be used.*pip install flash-attn --no-build"):
        resolve_attn_impl("flash_attn")
    with pytest.raises(RecipeError, match=r"flash_attention_4 cannot be used.*pip install flash-attn-4"):
        resolve_attn_impl("flash_attention_4")


def test_a_wrong_device_or_dtype_is_an_error(device):
    device((8, 0), *attention.FLASH)
    with pytest.raises(RecipeError, match=r"does not run on compute capability 8\.0"):
        resolve_attn_impl("flash_attention_3")
    with pytest.raises(RecipeError, match=r"16 bits; set model\.torch_dtype=bfloat16"):
        resolve_attn_impl("flash_attention_2", "float32")
    device(None)
    with pytest.raises(RecipeError, match=r"needs a CUDA device.*pip install flash-attn"):
        resolve_attn_impl("flash_attention_2")


def test_unknown_names_are_refused():
    with pytest.raises(RecipeError, match=r"unknown model\.attn_impl 'flash'.*Did you mean 'flash_attn'"):
        resolve_attn_impl("flash")


@pytest.mark.parametrize("name", attention.FLASH)
def test_probes_exist_in_the_installed_transformers(name):
    assert attention.FLASH[name].installed() in (True, False)
