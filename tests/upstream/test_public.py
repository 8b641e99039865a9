"""Public functions of torch and tokenizers that replace private names."""

import pickle

import pytest
import torch
from tokenizers.normalizers import NFC, NFD
from tokenizers.pre_tokenizers import ByteLevel

from qwenvl_ft.data.encode.counting import SPLITS, TokenCounter, _same, _splits_as_known, _splitting


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_torch_hands_out_one_object_for_a_storage(device):
    tensor = torch.empty(4, 6, device=device)
    storage = tensor.untyped_storage()
    assert tensor[1:].untyped_storage() is storage
    assert torch.nn.Parameter(tensor.detach()).untyped_storage() is storage
    assert torch.empty(4, 6, device=device).untyped_storage() is not storage


def test_parts_of_a_tokenizer_pickle_by_all_that_they_are_saved_with():
    assert pickle.dumps(NFC()) == pickle.dumps(NFC()) != pickle.dumps(NFD())
    one, other = (ByteLevel(add_prefix_space=kind, use_regex=False) for kind in (False, True))
    assert pickle.dumps(one) != pickle.dumps(other)
    assert _same(None, None, NFC())
    known = _splitting(SPLITS[0], False), _splitting(SPLITS[0], True)
    assert _same(_splitting(SPLITS[0], False), *known)
    assert not _same(_splitting(SPLITS[1], False), *known)


def test_the_tokenizers_splitting_is_known_and_counts_are_fast(processor):
    """Without it, the tokenizer itself is called: counts are the same, and planning is slower."""
    tokenizer = processor.tokenizer.backend_tokenizer
    assert _splits_as_known(tokenizer, tokenizer.get_added_tokens_decoder().values())
    other = pickle.loads(pickle.dumps(tokenizer))
    other.normalizer = NFD()
    assert not _splits_as_known(other, other.get_added_tokens_decoder().values())
    text = "A cat, 12 dogs  and\n\n<|im_end|>more."
    assert TokenCounter(tokenizer)(text) == len(tokenizer.encode(text, add_special_tokens=False))
    assert TokenCounter(other)(text) == len(other.encode(text, add_special_tokens=False))
