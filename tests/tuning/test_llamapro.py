"""New blocks are the identity before training, and plain transformers loads the larger model afterwards."""

import json

import pytest
import torch
from cases import MOST_KINDS
from transformers import AutoModelForImageTextToText

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.model.load import load_model
from qwenvl_ft.model.tiny import make_tiny
from qwenvl_ft.tuning.methods.llamapro import insertion_points, new_blocks
from qwenvl_ft.tuning.prepare import check_prepared, prepare_model

TEXT_ONLY = {"freeze_vit": True, "freeze_aligner": True}


def llamapro(tuner, **values):
    return tuner(**({"train_type": "llamapro"} | TEXT_ONLY | values))


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """Build a tiny model with 12 layers, of which the first three take deepstack features."""
    return make_tiny(tmp_path_factory.mktemp("deep"), num_hidden_layers=12)


def test_blocks_are_spread_evenly_and_above_the_deepstack_features(fresh, deep):
    model = load_model(deep, torch_dtype="float32", attn_impl="sdpa")
    assert insertion_points(model, 4) == [3, 6, 9, 12]
    assert insertion_points(model, 6) == [3, 4, 6, 8, 10, 12], "the first would stand below the third feature"
    assert insertion_points(model, 1) == [12]
    assert insertion_points(fresh(), 4) == [3, 3, 3, 4]


@pytest.mark.parametrize("kind", MOST_KINDS)
@pytest.mark.parametrize("count", [1, 4, 6])
def test_the_larger_model_gives_the_same_logits_and_features_keep_their_layers(fresh, tuner, batch, kind, count):
    """Hidden states after each old layer are those of the smaller model, and a new block returns its input."""
    kept = {}

    def watch(model, key):
        for index, layer in enumerate(model.model.language_model.layers):
            layer.register_forward_hook(
                lambda module, inputs, output, index=index: kept.update({(key, index): (inputs[0], output)})
            )

    plain, model = fresh(kind).eval(), prepare_model(fresh(kind), llamapro(tuner, llamapro_num_new_blocks=count)).eval()
    watch(plain, "plain")
    watch(model, "larger")
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, plain(**batch).logits)
    added = new_blocks(model)
    old = [index for index in range(4 + count) if index not in added]
    assert len(added) == count
    for before, after in enumerate(old):
        assert torch.equal(kept["plain", before][1], kept["larger", after][1])
    for index in added:
        assert index > 2 or kind.startswith("qwen3_5"), "a block among the layers that take features"
        assert torch.equal(*kept["larger", index])


@pytest.mark.parametrize("kind", ["qwen3_5", "qwen3_5_moe"])
def test_a_block_above_a_delta_net_is_one_that_returns_its_input(fresh, tuner, batch, kind):
    """Four blocks above four layers, of which the first three have a delta net; a row of several samples."""
    plain, model = fresh(kind).eval(), prepare_model(fresh(kind), llamapro(tuner, llamapro_num_new_blocks=4)).eval()
    kinds = model.config.get_text_config().layer_types
    assert [kinds[index] for index in new_blocks(model)] == ["linear_attention"] * 3 + ["full_attention"]
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, plain(**batch).logits)
        model.model.language_model.layers[new_blocks(model)[0]].linear_attn.out_proj.weight += 0.1
        assert not torch.allclose(model(**batch).logits, plain(**batch).logits, atol=1e-3), "vacuous: it is unused"


def test_a_feature_would_lose_its_layer_below_the_third(fresh, tuner, batch, monkeypatch):
    """The placement is necessary: the same blocks among the first layers change the output."""
    monkeypatch.setattr("qwenvl_ft.tuning.methods.llamapro.insertion_points", lambda model, count: [1, 2, 3, 4])
    model = prepare_model(fresh(), llamapro(tuner)).eval()
    with torch.no_grad():
        assert not torch.allclose(model(**batch).logits, fresh()(**batch).logits, atol=1e-3)


@pytest.mark.parametrize("kind", MOST_KINDS)
def test_a_new_block_copies_the_layer_below_it_but_for_what_it_writes(fresh, tuner, kind):
    model = prepare_model(fresh(kind), llamapro(tuner, llamapro_num_new_blocks=1))
    below, block = (dict(model.model.language_model.layers[n].named_parameters()) for n in (3, 4))
    zero = {name for name, value in block.items() if not value.any() and below[name].any()}
    assert zero == {name for name in block if name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj"))}
    assert len(zero) == 2 + (kind == "qwen3_5_moe"), "that has a shared expert"
    assert all(torch.equal(block[name], below[name]) for name in block.keys() - zero)
    assert all(block[name].data_ptr() != below[name].data_ptr() for name in block)


@pytest.mark.parametrize("kind", MOST_KINDS)
def test_the_checkpoint_is_a_plain_model_that_generates_the_same(fresh, tuner, train, batch, tmp_path, kind):
    model = train(prepare_model(fresh(kind), llamapro(tuner, llamapro_num_new_blocks=2))).eval()
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["text_config"]["num_hidden_layers"] == 6
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32).eval()
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "use_cache": True}
    assert torch.equal(plain.generate(**batch, **options), model.generate(**batch, **options))
    small = fresh(kind).eval()
    with torch.no_grad():
        assert not torch.allclose(plain(**batch).logits, small(**batch).logits, atol=1e-2), "vacuous: nothing learnt"


def test_a_model_with_new_blocks_goes_on_training_them(fresh, tuner, train, logits, tmp_path):
    model = train(prepare_model(fresh(), llamapro(tuner, llamapro_num_new_blocks=2)))
    model.save_pretrained(tmp_path)
    again = prepare_model(
        load_model(tmp_path, torch_dtype="float32", attn_impl="sdpa"), llamapro(tuner, llamapro_num_new_blocks=2)
    )
    trained = {name for name, value in again.named_parameters() if value.requires_grad}
    assert trained == {name for name, value in model.named_parameters() if value.requires_grad}
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(RecipeError, match=r"num_new_blocks=3, but the model has 2 new blocks.*Set it to 2"):
        prepare_model(
            load_model(tmp_path, torch_dtype="float32", attn_impl="sdpa"), llamapro(tuner, llamapro_num_new_blocks=3)
        )


def test_modules_beside_the_blocks_are_named_as_in_the_larger_model(fresh, tuner):
    settings = llamapro(tuner, llamapro_num_new_blocks=2, modules_to_save=["layers.4.mlp", "visual.merger"])
    model = prepare_model(fresh(), settings)
    assert new_blocks(model) == [3, 5]
    trained = [name for name, value in model.named_parameters() if value.requires_grad]
    places = ("language_model.layers.3.", "language_model.layers.5.", "language_model.layers.4.mlp.", "visual.merger.")
    assert {place for name in trained for place in places if place in name} == set(places)
    assert all(any(place in name for place in places) for name in trained)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"freeze_llm": True}, r"train_type=llamapro changes the language model only.*freeze_llm=false"),
        ({"freeze_vit": False}, r"changes the language model only.*freeze_vit=true"),
        ({"target_regex": ".*mlp.*"}, r"train_type=llamapro has no target modules"),
    ],
)
def test_what_it_cannot_honour_is_one_line(fresh, tuner, settings, words):
    with pytest.raises(RecipeError, match=words) as caught:
        prepare_model(fresh(), llamapro(tuner, **settings))
    assert "\n" not in str(caught.value)


def test_an_unprepared_model_is_refused(fresh, tuner):
    with pytest.raises(RecipeError, match=r"outside of the new blocks would train.*prepare_model"):
        check_prepared(fresh(), llamapro(tuner))
