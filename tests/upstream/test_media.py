"""upstream/media.py: hooks place media as transformers does, are tested before use, and are not set otherwise."""

import functools

import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2VLConfig, Qwen3VLConfig, Qwen3VLMoeConfig
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
from transformers.models.qwen2_vl import modeling_qwen2_vl
from transformers.models.qwen3_vl import modeling_qwen3_vl
from transformers.models.qwen3_vl_moe import modeling_qwen3_vl_moe

from qwenvl_ft.data.collate import QwenVLCollator
from qwenvl_ft.model.load import load_model
from qwenvl_ft.model.placed_media import MediaPlaces
from qwenvl_ft.training.loss import loss_sum, split_labels
from qwenvl_ft.upstream import media, vision_tables

MODELS = {
    "dense": (modeling_qwen3_vl.Qwen3VLModel, Qwen3VLConfig),
    "moe": (modeling_qwen3_vl_moe.Qwen3VLMoeModel, Qwen3VLMoeConfig),
    "qwen2_vl": (modeling_qwen2_vl.Qwen2VLModel, Qwen2VLConfig),
    "qwen2_5_vl": (modeling_qwen2_5_vl.Qwen2_5_VLModel, Qwen2_5_VLConfig),
}


@pytest.fixture
def asked_anew():
    """Clear what is cached about the installed versions, before and after the test."""

    def forget():
        media.differs.cache_clear()
        vision_tables.no_tables.cache_clear()

    forget()
    yield
    forget()


def losses(folder, samples):
    """Return results for a row with the worker's places, if the model accepts any, and by transformers' own path."""
    model = load_model(folder, torch_dtype="float32", attn_impl="sdpa").eval()
    places = MediaPlaces.of(model)
    with torch.no_grad():
        found = [loss_sum(model, split_labels(QwenVLCollator(places=p)(samples))).item() for p in (places, None)]
    return places, found


@pytest.fixture(scope="module")
def samples(encoder, mixed_records):
    return [encoder(record) for record in mixed_records]


@pytest.mark.parametrize("kind", MODELS)
def test_the_hooks_give_the_hidden_states_of_the_installed_model(kind, asked_anew):
    assert media.differs(*MODELS[kind]) == ""


@pytest.mark.parametrize("name", ["hidden_states", "attention_mask", "position_ids"])
def test_a_layer_is_called_with_what_the_hooks_read(name):
    """The sum is put into ``hidden_states``, passed by position or by name."""
    import inspect

    assert name in inspect.signature(modeling_qwen3_vl.Qwen3VLTextDecoderLayer.forward).parameters


def test_keyword_arguments_travel_to_every_layer():
    seen = []
    model = modeling_qwen3_vl.Qwen3VLModel(media._small(Qwen3VLConfig)).eval()
    for layer in model.language_model.layers:
        layer.register_forward_pre_hook(lambda _, args, given: seen.append(given.get("carried")), with_kwargs=True)
    ids = torch.tensor([[1, 2, 3]])
    model(input_ids=ids, position_ids=torch.arange(3).expand(4, 1, -1), carried="this")
    assert seen == ["this"] * 4


def test_a_wrapped_or_copied_layer_still_gets_its_features(tiny_dir, samples):
    """Adapters wrap layers, and blocks are inserted: features follow the place in the list."""

    class Wrapper(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.base_layer = layer

        def forward(self, *args, **kwargs):
            return self.base_layer(*args, **kwargs)

    places, (placed, plain) = losses(tiny_dir, samples)
    model = load_model(tiny_dir, torch_dtype="float32", attn_impl="sdpa").eval()
    batch = split_labels(QwenVLCollator(places=places)(samples))
    with torch.no_grad():
        loss_sum(model, batch)  # hooks are on the layers now
        layers = model.model.language_model.layers
        for index in range(len(layers)):
            layers[index] = Wrapper(layers[index])
        assert loss_sum(model, batch).item() == pytest.approx(placed, rel=1e-7)
    assert placed == pytest.approx(plain, rel=1e-6)


# -- made-up future releases: what they change is seen, and training is as by transformers' own way ------------------


def without_keywords(forward):
    """A text model that no longer passes keyword arguments to its layers."""

    @functools.wraps(forward)
    def changed(self, *args, **kwargs):
        kwargs.pop(media.ADDED, None)
        return forward(self, *args, **kwargs)

    return changed


def elsewhere(forward):
    """A text model that adds deepstack features with another weight."""

    @functools.wraps(forward)
    def changed(self, *args, deepstack_visual_embeds=None, **kwargs):
        if deepstack_visual_embeds is not None:
            deepstack_visual_embeds = [feature * 2 for feature in deepstack_visual_embeds]
        return forward(self, *args, deepstack_visual_embeds=deepstack_visual_embeds, **kwargs)

    return changed


@pytest.mark.parametrize("change", [without_keywords, elsewhere])
def test_a_release_with_another_text_model_goes_its_own_way(tiny_dir, samples, monkeypatch, asked_anew, change):
    text = modeling_qwen3_vl.Qwen3VLTextModel
    monkeypatch.setattr(text, "forward", change(text.forward))
    places, (placed, plain) = losses(tiny_dir, samples)
    assert places is None
    assert placed == plain
    assert "the model finds the media tokens itself" in media.PLACES.line()


def test_a_release_whose_tower_returns_other_names_goes_its_own_way(tiny_dir, monkeypatch, asked_anew):
    visual = modeling_qwen3_vl.Qwen3VLVisionModel
    forward = visual.forward

    @functools.wraps(forward)
    def changed(self, *args, **kwargs):
        found = forward(self, *args, **kwargs)
        return type("Output", (), {"pooler_output": found.pooler_output, "features": found.deepstack_features})()

    monkeypatch.setattr(visual, "forward", changed)
    assert "AttributeError" in media.differs(*MODELS["dense"])


def test_a_release_with_a_new_field_in_the_towers_output_is_taken(monkeypatch, asked_anew):
    visual = modeling_qwen3_vl.Qwen3VLVisionModel
    forward = visual.forward

    @functools.wraps(forward)
    def changed(self, *args, **kwargs):
        found = forward(self, *args, **kwargs)
        found["one_more"] = torch.zeros(1)
        return found

    monkeypatch.setattr(visual, "forward", changed)
    assert media.differs(*MODELS["dense"]) == ""


def test_a_release_with_other_tables_computes_them_itself(tiny_dir, samples, monkeypatch, asked_anew):
    vision_utils = pytest.importorskip("transformers.vision_utils")
    if vision_tables.no_tables():
        pytest.skip("this version has no such tables")
    known = losses(tiny_dir, samples)

    def needs_more(grid_thw, spatial_merge_size, scale, kwargs=None):
        raise AssertionError("called without its new argument")

    monkeypatch.setattr(vision_utils, "get_vision_position_ids", needs_more)
    vision_tables.no_tables.cache_clear()
    places, found = losses(tiny_dir, samples)
    assert places.tables is None
    assert found == pytest.approx(known[1], rel=1e-7)
    assert "needs 'scale'" in vision_tables.POSITIONS.line()


def test_features_that_no_layer_takes_would_be_an_error(tiny_dir, samples):
    places, _ = losses(tiny_dir, samples)
    model = load_model(tiny_dir, torch_dtype="float32", attn_impl="sdpa").eval()
    batch = split_labels(QwenVLCollator(places=places)(samples))
    loss_sum(model, batch)
    layers = model.model.language_model.layers
    hooked = layers[1]
    hooked._forward_pre_hooks.clear()
    with pytest.raises(AssertionError, match="were not added"):
        loss_sum(model, batch)
