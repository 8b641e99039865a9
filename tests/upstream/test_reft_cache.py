"""`upstream/cache.py` finds earlier tokens for ReFT, with the installed transformers and with made-up releases."""

import inspect
from functools import wraps
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.models.qwen3_vl import modeling_qwen3_vl

from qwenvl_ft.errors import CheckpointError
from qwenvl_ft.model.load import load_model
from qwenvl_ft.recipe.schema import TunerConfig
from qwenvl_ft.tuning.prepare import prepare_model
from qwenvl_ft.upstream.cache import continues, named

IDS = torch.zeros(2, 3, dtype=torch.int64)


def filled(cache, tokens=4):
    cache.update(torch.zeros(2, 1, tokens, 8), torch.zeros(2, 1, tokens, 8), 0)
    return cache


@pytest.mark.parametrize("name", ["past_key_values", "cache", "memory"])
def test_a_cache_is_found_by_any_name_and_tells_its_tokens(name):
    assert not continues({"input_ids": IDS, name: DynamicCache()})
    assert continues({"input_ids": IDS, name: filled(DynamicCache())})
    assert continues({"input_ids": IDS, "state": {name: filled(DynamicCache())}})
    assert continues({"input_ids": IDS, "state": SimpleNamespace(**{name: filled(DynamicCache())})})


def test_caches_of_the_installed_transformers_have_the_method_that_is_asked(tiny_model):
    assert filled(DynamicCache()).get_seq_length() == 4
    static = StaticCache(config=tiny_model.config.get_text_config(), max_cache_len=16)
    assert not continues({"input_ids": IDS, "cache": static})
    heads = tiny_model.config.get_text_config().num_key_value_heads
    size = tiny_model.config.get_text_config().head_dim
    static.update(torch.zeros(2, heads, 4, size), torch.zeros(2, heads, 4, size), 0)
    assert continues({"input_ids": IDS, "cache": static})


class Unknown:
    """A cache of a later release, with another name and another method."""

    def length(self):
        return 4


@pytest.mark.parametrize("layout", ["text", "three rows", "four rows", "mask"])
def test_without_a_known_cache_positions_and_mask_tell(layout):
    positions = torch.arange(3).expand(2, -1)
    now = {"text": positions, "three rows": positions.expand(3, 2, -1), "four rows": positions.expand(4, 2, -1)}
    mask = torch.ones(2, 3, dtype=torch.int64)
    begin = {"attention_mask": mask} if layout == "mask" else {"position_ids": now[layout]}
    later = {"attention_mask": torch.ones(2, 8)} if layout == "mask" else {"position_ids": now[layout] + 5}
    for more in ({}, {"memory": Unknown()}):
        if layout != "mask" or not more:
            assert not continues({"input_ids": IDS} | begin | more)
        assert continues({"input_ids": IDS} | later | more)


def test_a_batch_that_is_padded_on_the_left_begins():
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    positions = torch.tensor([[1, 0, 1], [0, 1, 2]])
    assert not continues({"input_ids": IDS, "attention_mask": mask, "position_ids": positions})
    assert continues({"input_ids": IDS, "attention_mask": mask, "position_ids": positions + 7})


def test_what_nobody_can_know_is_one_line():
    with pytest.raises(CheckpointError, match="with memory, a Unknown that is not known") as caught:
        continues({"input_ids": IDS, "memory": Unknown()})
    assert "\n" not in str(caught.value)
    assert not continues({"input_ids": IDS, "labels": IDS, "memory": Unknown()}), "a row to train on begins"
    assert not continues({"input_ids": IDS})


def test_arguments_by_position_have_their_names():
    def forward(input_ids, attention_mask=None, memory=None): ...

    cache = filled(DynamicCache())
    assert continues(named(SimpleNamespace(forward=forward), (IDS, None, cache), {}))


@pytest.fixture
def adapted(tiny_dir):
    torch.manual_seed(0)
    tuner = TunerConfig(train_type="reft", reft_positions="l1", freeze_vit=True, freeze_aligner=True)
    model = prepare_model(load_model(tiny_dir, torch_dtype="float32", attn_impl="sdpa"), tuner).eval()
    with torch.no_grad():
        for value in model.parameters():
            value += torch.randn_like(value) * 0.3 * value.requires_grad
    return model


def answered(model):
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    ids = torch.arange(5, 12)[None]
    found = model.generate(input_ids=ids, **settings, output_logits=True, return_dict_in_generate=True)
    return torch.stack(found.logits)


def renamed(model, monkeypatch, change):
    """Simulate a release whose generate passes other arguments, which its forward understands."""
    base = model.get_base_model()
    name = "cache" if "cache" in inspect.signature(modeling_qwen3_vl.Qwen3VLModel.forward).parameters else ""
    name = name or "past_key_values"
    prepare, forward = base.prepare_inputs_for_generation, base.forward

    @wraps(prepare)
    def changed(*args, **kwargs):
        return change(prepare(*args, **kwargs), name)

    monkeypatch.setattr(base, "prepare_inputs_for_generation", changed)

    @wraps(forward)
    def knows(input_ids=None, attention_mask=None, memory=None, **kwargs):
        held = {} if memory is None else {name: getattr(memory, "held", memory)}
        return forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs, **held)

    monkeypatch.setattr(base, "forward", knows)


def test_a_release_that_renames_the_cache_again_gives_the_same_answers(adapted, monkeypatch):
    expected = answered(adapted)
    seen = []

    def change(inputs, name):
        inputs["memory"] = inputs.pop(name)
        seen.append(inputs["memory"].get_seq_length())
        return inputs

    renamed(adapted, monkeypatch, change)
    torch.testing.assert_close(answered(adapted), expected)
    assert seen[1:] == [7, 8, 9], "vacuous: the cache did not come by its new name"


def test_a_release_whose_cache_nobody_knows_gives_the_same_answers_or_one_line(adapted, monkeypatch):
    expected = answered(adapted)

    class Sealed:
        __slots__ = ("held",)

        def __init__(self, held):
            self.held = held

    def change(inputs, name):
        return {key: value for key, value in inputs.items() if key != name} | {"memory": Sealed(inputs[name])}

    renamed(adapted, monkeypatch, change)
    torch.testing.assert_close(answered(adapted), expected)

    def bare(inputs, name):
        changed = change(inputs, name)
        return {key: value for key, value in changed.items() if key in ("input_ids", "memory")}

    monkeypatch.undo()
    renamed(adapted, monkeypatch, bare)
    with pytest.raises(CheckpointError, match="a Sealed that is not known here"):
        answered(adapted)


def test_layers_that_run_without_their_models_hook_are_an_error(adapted):
    """peft up to 0.20 called a model's forward without hooks: every position would be edited."""
    text = adapted.get_base_model().model.language_model
    with pytest.raises(CheckpointError, match="without their model's forward"):
        text(input_ids=torch.arange(5, 12)[None])
