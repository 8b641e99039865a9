"""Shifted sparse attention: half of the heads in groups, half in groups shifted by half, never across samples."""

import pytest
import torch
from cases import MOST_KINDS
from peft import PeftModel
from torch import nn

from qwenvl_ft.data.collate import QwenVLCollator
from qwenvl_ft.errors import RecipeError
from qwenvl_ft.model.anatomy import canonical_name
from qwenvl_ft.tuning.methods.longlora import group_lengths, shifted_attention
from qwenvl_ft.tuning.prepare import prepare_model

TEXT_ONLY = {"freeze_vit": True, "freeze_aligner": True}
NORMS = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")


def longlora(tuner, **values):
    return tuner(**({"train_type": "longlora", "longlora_group_size": 16} | TEXT_ONLY | values))


@pytest.mark.parametrize(
    ("length", "plain", "shifted"),
    [
        (16, [4, 4, 4, 4], [2, 4, 4, 4, 2]),  # the paper's figure: a context of four groups
        (10, [4, 4, 2], [2, 4, 4]),
        (5, [4, 1], [2, 3]),
        (4, [4], [4]),
        (1, [1], [1]),
    ],
)
def test_groups_begin_with_the_sample(length, plain, shifted):
    assert group_lengths(length, 4, shifted=False) == plain
    assert group_lengths(length, 4, shifted=True) == shifted


@pytest.mark.parametrize("lengths", [[16], [10, 16, 3, 4, 5], [1, 1, 30]])
@pytest.mark.parametrize("source", ["positions", "cu_seqlens"])
def test_attention_is_softmax_under_the_mask_of_the_paper(lengths, source):
    """One query at a time, over the keys that its half of the heads may see, written out as sets of tokens."""
    heads, kv_heads, size, group = 4, 2, 8, 4
    tokens = sum(lengths)
    torch.manual_seed(0)
    query = torch.randn(1, heads, tokens, size)
    key, value = torch.randn(2, 1, kv_heads, tokens, size)
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    expected = torch.zeros(1, tokens, heads, size)
    for start, length in zip(starts, lengths, strict=True):
        for head in range(heads):
            shift = group // 2 if head >= heads // 2 and length > group else 0
            for place in range(length):
                seen = [k for k in range(place + 1) if (k - shift) // group == (place - shift) // group]
                keys = key[0, head // 2, [start + k for k in seen]]
                weights = (keys @ query[0, head, start + place] * size**-0.5).softmax(0)
                expected[0, start + place, head] = weights @ value[0, head // 2, [start + k for k in seen]]
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = heads // kv_heads, True
    borders = {
        "positions": {"position_ids": torch.cat([torch.arange(length) for length in lengths])[None]},
        "cu_seqlens": {"cu_seq_lens_q": torch.tensor([*starts, tokens], dtype=torch.int32)},
    }
    call = {"group_size": group, "scaling": size**-0.5, "dropout": 0.0} | borders[source]
    found, _ = shifted_attention(module.train(), query, key, value, None, **call)
    torch.testing.assert_close(found, expected)
    full, _ = shifted_attention(module.eval(), query, key, value, None, **call)
    assert not torch.allclose(full, expected, atol=1e-2), "vacuous: full attention agrees too"


def test_no_early_token_sees_a_late_one(fresh, tuner):
    """Joining the ends of the sequence, as a plain roll does, would let the first tokens see the last."""
    model = prepare_model(fresh(), longlora(tuner, longlora_group_size=8)).train()
    ids = torch.arange(40)[None]
    other = ids.clone()
    other[0, -1] = 99
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits[0, :-1], model(input_ids=other).logits[0, :-1])


@pytest.mark.parametrize("kind", MOST_KINDS)
def test_evaluation_attends_in_full_and_training_in_groups(fresh, tuner, encoder, mixed_records, kind):
    sample = encoder(mixed_records[2])
    assert len(sample["input_ids"]) > 32
    batch = {key: value for key, value in QwenVLCollator()([sample]).items() if key not in ("labels", "sources")}
    model = prepare_model(fresh(kind), longlora(tuner))
    with torch.no_grad():
        full = fresh(kind)(**batch).logits
        torch.testing.assert_close(model.eval()(**batch).logits, full)
        grouped = model.train()(**batch).logits
        assert not torch.allclose(grouped, full, atol=1e-2)
        torch.testing.assert_close(grouped[:, :8], full[:, :8])  # the first half group sees all before it
    long_groups = prepare_model(fresh(kind), longlora(tuner, longlora_group_size=4096)).train()
    with torch.no_grad():
        torch.testing.assert_close(long_groups(**batch).logits, full)


@pytest.mark.parametrize("kind", MOST_KINDS)
def test_embeddings_and_norms_train_and_the_adapter_loads_in_plain_peft(fresh, tuner, train, logits, tmp_path, kind):
    model = prepare_model(fresh(kind), longlora(tuner))
    copies = {canonical_name(name) for name, value in model.named_parameters() if ".modules_to_save." in name}
    expected = {f"model.language_model.layers.{n}.{norm}.weight" for n in range(4) for norm in NORMS}
    if kind.startswith("qwen3_5"):  # three delta nets, with a norm of their output, instead of attention
        nets = [f"model.language_model.layers.{n}" for n in range(3)]
        expected = {name for name in expected if ".self_attn." not in name or ".layers.3." in name}
        expected |= {f"{net}.linear_attn.norm.weight" for net in nets}
    expected |= {"model.language_model.norm.weight", "model.language_model.embed_tokens.weight"}
    assert copies == expected
    trained = logits(train(model))
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    assert (head.weight is embeddings.weight) == (not kind.endswith("moe")), "tied where the model ties them"
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(fresh(kind), tmp_path)
    assert torch.equal(logits(again), trained)
    torch.testing.assert_close(logits(again.merge_and_unload()), trained, rtol=1e-4, atol=1e-5)
    bare = prepare_model(fresh(kind), longlora(tuner, longlora_embeddings_and_norms=False))
    assert not [name for name, _ in bare.named_parameters() if ".modules_to_save." in name]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"freeze_llm": True, "freeze_vit": False}, r"adapts the language model\. Set tuner\.freeze_llm=false"),
        ({"longlora_group_size": 7}, r"longlora_group_size=7 is odd"),
        ({"modules_to_save": ["lm_head"]}, r"shares between embedding and language head"),
    ],
)
def test_what_cannot_be_grouped_is_one_line(fresh, tuner, settings, words):
    with pytest.raises(RecipeError, match=words) as caught:
        prepare_model(fresh(), longlora(tuner, **settings))
    assert "\n" not in str(caught.value)
