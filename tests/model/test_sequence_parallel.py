"""Rows that several ranks share have the loss and the gradients of one process, wherever samples begin."""

import copy

import pytest
import torch
from methods_cases import CASES, tuner_of
from rank_cases import in_ranks
from sequence_cases import (
    CPU,
    EXACT,
    ROWS,
    assert_exact,
    difference,
    images,
    model_of,
    over_rows,
    padded,
    shared_row,
    text,
    video,
    whole_row,
)
from transformers import AutoConfig

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.model import sequence_parallel
from qwenvl_ft.model.sequence_parallel import SequenceGroup, exchange_heads, require_model, require_ranks
from qwenvl_ft.training.device_batch import on_device
from qwenvl_ft.tuning.prepare import prepare_model


@pytest.fixture(scope="module")
def dense(checkpoints):
    return model_of(checkpoints["dense"])


@pytest.fixture(scope="module")
def moe(checkpoints):
    return model_of(checkpoints["moe"])


def test_two_ranks_have_the_loss_and_gradients_of_one(encoder, dense):
    """In rows of text, images and videos, with borders of samples on all sides of the border between the ranks."""
    assert_exact(in_ranks(2, over_rows, encoder, *dense, ROWS, (0, 1)))


def test_four_ranks_with_fewer_key_heads_and_one_image_have_the_loss_and_gradients_of_one(encoder, dense):
    assert dense[0].config.text_config.num_key_value_heads == 2
    assert_exact(in_ranks(4, over_rows, encoder, *dense, ("one image", "text, images and a video"), (0,)))


def test_two_ranks_with_experts_have_the_loss_and_gradients_of_one(encoder, moe):
    assert_exact(in_ranks(2, over_rows, encoder, *moe, ("text, images and a video",), (0,)))


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_place_of_the_borders_gives_the_loss_and_gradients_of_one(encoder, checkpoints, kind, ranks):
    found = in_ranks(ranks, over_rows, encoder, *model_of(checkpoints[kind]), ROWS, range(9))
    assert_exact(found)


def left_out(encoder, model, places):
    """Run by each rank: return the difference without an exchange of heads, and without one of features."""
    group = SequenceGroup.of(2)
    exchange_heads(model.config.get_text_config())
    row = whole_row(encoder, ROWS["text, images and a video"], places)
    exact, kept = difference(model, row, 2, group), sequence_parallel._exchange

    def only(tokens):
        """Leave out the exchange of what has, or has not, heads: each rank keeps what it would send."""

        def exchange(rows, sends, receives, ranks):
            if (rows.ndim == 3) is tokens:
                return kept(rows, sends, receives, ranks)
            return rows.sum() * 0 + rows.new_ones(sum(receives), *rows.shape[1:])

        return exchange

    found = [exact]
    for tokens in (True, False):
        sequence_parallel._exchange = only(tokens)
        found.append(difference(model, row, 2, group))
    return found


def test_without_an_exchange_it_would_not_be_the_same(encoder, dense):
    for exact, without_features, without_heads in in_ranks(2, left_out, encoder, *dense):
        assert exact <= EXACT
        assert without_features > 1e-3
        assert without_heads > 1e-3


def with_options(encoder, model, places):
    """Run by each rank: return the differences with each option of the loss and of recomputation."""
    group = SequenceGroup.of(2)
    exchange_heads(model.config.get_text_config())
    row = whole_row(encoder, ROWS["text, images and a video"], places)
    found = {"options": difference(model, row, 2, group, label_smoothing=0.1, z_loss=1e-3)}
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found["checkpointing"] = difference(model, row, 2, group)
    model.gradient_checkpointing_disable()
    weighted = row | {"label_weights": torch.arange(row["labels"].shape[1], dtype=torch.float64)[None] % 3}
    found["weights"] = difference(model, weighted, 2, group)
    for parameter in model.model.visual.parameters():
        parameter.requires_grad = False
    found["frozen tower"] = difference(model, row, 2, group)
    return found


def test_smoothing_z_loss_weights_checkpointing_and_a_frozen_tower_change_nothing(encoder, dense):
    assert_exact(in_ranks(2, with_options, encoder, *dense))


SHAREABLE = [name for name, case in CASES.items() if case.tuner.get("train_type") not in ("longlora", "reft")]
STARTED_BY_DATA, QUANTISED = ("lora-ga", "eva"), ("nf4", "int8")
NOT_HERE = {
    name
    for name in SHAREABLE
    if CASES[name].tuner.get("init_weights") in STARTED_BY_DATA
    or CASES[name].bits in QUANTISED
    or CASES[name].tuner.get("lora_dropout")
    or CASES[name].tuner.get("lora_dtype")
}
"""Cases with LoRA's layers that need data, fewer bits or random masks: not comparable in float64."""


def by_method(encoder, model, places, names):
    """Run by each rank: return the differences by training method."""
    group = SequenceGroup.of(2)
    row = whole_row(encoder, ROWS["text, images and a video"], places)
    found = {}
    for name in names:
        torch.manual_seed(0)
        prepared = prepare_model(copy.deepcopy(model).float(), tuner_of(CASES[name], "dense")).double()
        with torch.no_grad():
            for value in prepared.parameters():
                if value.requires_grad:
                    value += torch.randn_like(value) * 0.01  # adapters start at zero
        exchange_heads(prepared.config.get_text_config())
        found[name] = difference(prepared, row, 2, group)
    return found


def test_lora_and_new_layers_change_nothing(encoder, dense):
    assert_exact(in_ranks(2, by_method, encoder, *dense, ["lora", "llamapro"]))


@pytest.mark.soak
def test_no_training_method_changes_anything(encoder, dense):
    names = [name for name in SHAREABLE if name not in NOT_HERE]
    assert len(names) > 25
    assert_exact(in_ranks(2, by_method, encoder, *dense, names))


def test_a_rank_gets_the_features_of_its_tokens_and_nothing_else(encoder, dense):
    """Every media token of the row gets one feature, from the rank that runs its frame."""
    row = whole_row(encoder, [text(3), images(64, 128), video(6), text(5)], dense[1])
    shares = [
        SequenceGroup(4, place, None).share(on_device(shared_row(row, 4, place), CPU, {}))["row_share"]
        for place in range(4)
    ]
    part = padded(row, 4)["input_ids"].shape[1] // 4
    found = torch.cat([share.tokens + part * share.group.place for share in shares])
    assert sorted(found.tolist()) == sorted([*row["image_places"].tolist(), *row["video_places"].tolist()])
    for giver in range(4):
        for taker in range(4):
            assert shares[giver].sends[taker] == shares[taker].receives[giver]
    assert len({len(share.tokens) for share in shares}) > 1, "vacuous: all alike"


@pytest.mark.parametrize(("heads", "size"), [(32, 1), (32, 2), (32, 8), (16, 16)])
def test_a_size_that_divides_the_heads_is_accepted(tiny_dir, heads, size):
    config = AutoConfig.from_pretrained(tiny_dir)
    config.text_config.num_attention_heads = heads
    require_model(config, "packed_sdpa", size)


REFUSED = {
    "size": (
        "packed_sdpa",
        3,
        "training.sequence_parallel_size=3 does not divide the model's 4 attention heads. Set one of 1, 2, 4.",
    ),
    "attention": (
        "sdpa",
        2,
        "training.sequence_parallel_size=2 with model.attn_impl=sdpa would need a mask of the whole row squared. Set "
        "model.attn_impl=auto or packed_sdpa.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_that_does_not_fit_is_refused_in_one_line(tiny_dir, case):
    attention, size, message = REFUSED[case]
    with pytest.raises(RecipeError) as error:
        require_model(AutoConfig.from_pretrained(tiny_dir), attention, size)
    assert str(error.value) == message


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen3_5", "qwen3_5_moe"])
def test_other_models_are_refused_in_one_line(model_type):
    with pytest.raises(RecipeError, match=f"=2 is for Qwen3-VL, but the model is a {model_type}\\. Remove the key"):
        require_model(AutoConfig.for_model(model_type), "packed_sdpa", 2)


def test_a_number_of_processes_that_cannot_be_divided_is_refused_in_one_line():
    with pytest.raises(RecipeError, match=r"=4 lets 4 processes share each row, but the run has 6\. Start a multiple"):
        require_ranks(4, 6)
