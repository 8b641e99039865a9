"""upstream/attention.py: one config's attention is set alone, the vision tower passes its borders, plans are cached."""

import gc

import pytest
import torch
from transformers.utils import generic

from qwenvl_ft.data.collate import QwenVLCollator
from qwenvl_ft.model import packed_attention
from qwenvl_ft.model.load import load_model
from qwenvl_ft.upstream import attention


@pytest.fixture
def asked_anew():
    for feature in attention.FEATURES:
        feature.missing.cache_clear()
    yield
    for feature in attention.FEATURES:
        feature.missing.cache_clear()


@pytest.fixture(scope="module")
def row(encoder, mixed_records):
    batch = QwenVLCollator()([encoder(record) for record in mixed_records])
    return {key: value for key, value in batch.items() if key not in ("labels", "sources")}


def calls_of_vision(model, row, monkeypatch):
    """Return logits, and the number of tokens in each call of the vision tower's attention."""
    seen = []
    attend = packed_attention.packed_attention

    def counted(module, query, *arguments, **options):
        if not getattr(module, "is_causal", True):
            seen.append(query.shape[2])
        return attend(module, query, *arguments, **options)

    monkeypatch.setattr(packed_attention, "packed_attention", counted)
    packed_attention.use_packed_attention(model)
    with torch.no_grad():
        return model(**row).logits, list(seen)


def test_the_vision_tower_attends_over_all_frames_in_one_call(tiny_dir, row, monkeypatch):
    model = load_model(tiny_dir, torch_dtype="float32", attn_impl="packed_sdpa").eval()
    _, seen = calls_of_vision(model, row, monkeypatch)
    depth = model.config.vision_config.depth
    assert len(seen) == 2 * depth, "once a block for images and once for videos"


def test_a_release_without_the_trick_attends_frame_by_frame_and_gives_the_same(tiny_dir, row, monkeypatch, asked_anew):
    model = load_model(tiny_dir, torch_dtype="float32", attn_impl="packed_sdpa").eval()
    expected, once = calls_of_vision(model, row, monkeypatch)
    monkeypatch.setattr(generic, "is_flash_attention_requested", lambda config=None, **_: False)
    attention.BORDERS.missing.cache_clear()
    assert attention.BORDERS.line().endswith("waits for the device in each layer")
    model = load_model(tiny_dir, torch_dtype="float32", attn_impl="packed_sdpa").eval()
    found, seen = calls_of_vision(model, row, monkeypatch)
    assert len(seen) > len(once)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_one_config_is_set_and_its_parts_are_not(tiny_dir):
    config = load_model(tiny_dir, torch_dtype="float32", attn_impl="sdpa").config
    attention.set_attention(config, "packed_sdpa")
    names = [attention.attention_of(part) for part in (config, config.text_config, config.vision_config)]
    assert names == ["packed_sdpa", "sdpa", "sdpa"]


def test_a_kernel_with_a_new_required_argument_is_not_called(monkeypatch, asked_anew):
    varlen = pytest.importorskip("torch.nn.attention.varlen")

    def kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, layout, *, scale=None, window_size=(-1, -1)):
        raise AssertionError("called without its layout")

    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    assert packed_attention._kernel() is None
    assert "needs 'layout'" in attention.VARLEN.line()


def test_a_value_is_kept_for_its_tensor_and_no_longer():
    kept, made = attention.TensorCache(), []
    first, second = torch.tensor([0, 3]), torch.tensor([0, 3])
    make = lambda: made.append(1) or len(made)  # noqa: E731
    assert [kept.get(first, make), kept.get(first, make), kept.get(second, make)] == [1, 1, 2]
    assert len(kept._kept) == 2
    del first
    gc.collect()
    assert len(kept._kept) == 1


def test_a_function_is_left_out_of_compiling_once():
    function = attention.without_compiling(lambda x: x + 1)
    assert attention.without_compiling(function) is function
    assert function(torch.ones(1)) == 2
