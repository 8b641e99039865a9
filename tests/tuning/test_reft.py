"""ReFT's edits equal the paper's formulas, at the positions that a loop over samples finds."""

import itertools
from contextlib import suppress

import pytest
import torch
from cases import MOST_KINDS, stirred
from transformers import AutoModelForImageTextToText, GenerationConfig

from qwenvl_ft.data.collate import PaddedCollator, QwenVLCollator
from qwenvl_ft.errors import CheckpointError, RecipeError
from qwenvl_ft.model.adapters.interventions import INTERVENTIONS, ReftLayer, edited, parse_positions
from qwenvl_ft.model.adapters.load import with_adapter
from qwenvl_ft.model.placed_media import MediaPlaces
from qwenvl_ft.training.loss import loss_sum, split_labels
from qwenvl_ft.tuning.prepare import prepare_model
from qwenvl_ft.upstream.experts import experts_implementation

TEXT_ONLY = {"freeze_vit": True, "freeze_aligner": True}


def edits(model):
    return {name: module for name, module in model.get_base_model().named_modules() if isinstance(module, ReftLayer)}


@pytest.fixture(scope="module")
def samples(encoder, mixed_records):
    return [encoder(record) for record in mixed_records]


def by_loop(sample, first, last):
    """Return the edited positions of one sample: its first tokens, and the last before each answer."""
    answers = (sample["labels"] != -100).tolist()
    chosen = set()
    for place, answer in enumerate(answers):
        if answer:
            continue
        left = next((other for other in range(place, len(answers)) if answers[other]), None)
        if place < first or (left is not None and left - place <= last):
            chosen.add(place)
    return chosen


@pytest.mark.parametrize("kind", MOST_KINDS)
@pytest.mark.parametrize("intervention", INTERVENTIONS)
def test_the_edit_is_the_papers_formula(fresh, tuner, batch, kind, intervention):
    """Hooks on the layers of a plain model, one token at a time, with R from the stored matrix by Gram-Schmidt."""
    settings = {"train_type": "reft", "reft_rank": 3, "reft_layers": [1, 3], "reft_intervention_type": intervention}
    model = stirred(prepare_model(fresh(kind), tuner(**settings, reft_positions="f2+l3", **TEXT_ONLY)), 0.3).eval()
    plain = fresh(kind).eval()
    tokens = batch["input_ids"].shape[1]

    def rows(stored):
        if intervention == "NoreftIntervention":
            return stored
        basis = []
        for row in stored:
            for other in basis:
                row = row - (row @ other) * other
            basis.append(row / row.norm())
        return torch.stack(basis)

    def by_hand(layer):
        rotate, bias = rows(layer.reft_A["default"].detach()), layer.reft_bias["default"].detach()

        def hook(module, inputs, output):
            output = output.clone()
            for place in [0, 1, tokens - 3, tokens - 2, tokens - 1]:
                h = output[0, place]
                target = bias if intervention == "ConsreftIntervention" else layer.reft_W["default"].detach() @ h + bias
                output[0, place] = h + rotate.T @ (target - rotate @ h)
            return output

        return hook

    assert sorted(edits(model)) == ["model.language_model.layers.1", "model.language_model.layers.3"]
    for name, layer in edits(model).items():
        plain.get_submodule(name).register_forward_hook(by_hand(layer))
    with torch.no_grad():
        found, expected = model(**batch).logits, plain(**batch).logits
        base = fresh(kind)(**batch).logits
    assert not torch.allclose(found, base, atol=1e-2), "vacuous: nothing was edited"
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_rows_stay_orthonormal_while_they_train(fresh, tuner, train):
    model = train(prepare_model(fresh(), tuner(train_type="reft", **TEXT_ONLY)), count=5, rate=0.1)
    for layer in edits(model).values():
        basis = layer.basis("default")
        torch.testing.assert_close(basis @ basis.T, torch.eye(4), rtol=0, atol=1e-5)
        stored = layer.reft_A["default"]
        assert not torch.allclose(stored @ stored.T, torch.eye(4), atol=1e-2), "vacuous: the stored rows are too"
    free = prepare_model(fresh(), tuner(train_type="reft", reft_intervention_type="NoreftIntervention", **TEXT_ONLY))
    layer = next(iter(edits(train(free, count=5, rate=0.1)).values()))
    assert torch.equal(layer.basis("default"), layer.reft_A["default"])


@pytest.mark.parametrize(("first", "last"), [(1, 1), (7, 7), (0, 3), (2, 0), (200, 200)])
def test_positions_in_a_packed_row_are_those_of_each_sample(samples, first, last):
    row = QwenVLCollator()(samples)
    expected, start = set(), 0
    for sample in samples:
        expected |= {start + place for place in by_loop(sample, first, last)}
        start += len(sample["input_ids"])
    assert set(edited(row, first, last).tolist()) == expected
    assert set(edited(split_labels(row), first, last).tolist()) == expected, "as the trainer calls the model"
    assert len(expected) < start


def test_padding_is_never_edited(samples, processor):
    padded = PaddedCollator(processor.tokenizer.pad_token_id)(samples)
    tokens = padded["input_ids"].shape[1]
    expected = {row * tokens + place for row, sample in enumerate(samples) for place in by_loop(sample, 2, 3)}
    assert set(edited(padded, 2, 3).tolist()) == expected
    assert set(edited(split_labels(padded), 2, 3).tolist()) == expected


def test_a_prompt_alone_is_edited_at_its_ends_and_answers_in_the_cache_never():
    from transformers import DynamicCache

    ids = torch.zeros(2, 6, dtype=torch.int64)
    assert edited({"input_ids": ids}, 1, 2).tolist() == [0, 4, 5, 6, 10, 11]
    left = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    assert edited({"input_ids": ids, "attention_mask": left}, 1, 2).tolist() == [2, 4, 5, 6, 10, 11]
    cache = DynamicCache()
    assert edited({"input_ids": ids, "past_key_values": cache}, 1, 0).tolist() == [0, 6]
    cache.update(torch.zeros(2, 1, 4, 8), torch.zeros(2, 1, 4, 8), 0)
    assert edited({"input_ids": ids[:, :1], "past_key_values": cache}, 1, 2).tolist() == []


def test_a_padded_batch_has_the_loss_of_a_packed_row(fresh, tuner, samples, processor):
    model = stirred(prepare_model(fresh(), tuner(train_type="reft", reft_positions="f1+l2", **TEXT_ONLY)), 0.3)
    packed = loss_sum(model, split_labels(QwenVLCollator()(samples)))
    padded = loss_sum(model, split_labels(PaddedCollator(processor.tokenizer.pad_token_id)(samples)))
    torch.testing.assert_close(padded, packed, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", MOST_KINDS)
def test_batched_generation_answers_as_one_prompt_alone(fresh, tuner, processor, kind):
    """Left padding in front of the shorter prompt must not take its first position."""
    model = stirred(prepare_model(fresh(kind), tuner(train_type="reft", **TEXT_ONLY)), 0.3).eval()
    processor.tokenizer.padding_side = "left"
    prompts = ["Say a word about the small red circle.", "Yes?"]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    together = processor.tokenizer(prompts, return_tensors="pt", padding=True)
    answers = model.generate(**together, **options)[:, together["input_ids"].shape[1] :]
    for prompt, answer in zip(prompts, answers, strict=True):
        alone = processor.tokenizer([prompt], return_tensors="pt")
        assert torch.equal(model.generate(**alone, **options)[0, alone["input_ids"].shape[1] :], answer)


def edit_of(layer):
    """Return LoReFT's formula with a layer's weights, as a function of hidden states."""
    rotate, weight = layer.basis("default").detach(), layer.reft_W["default"].detach()
    bias = layer.reft_bias["default"].detach()
    return lambda h: h + ((h @ weight.T + bias) - h @ rotate.T) @ rotate


def answered_by_hand(fresh, kind, adapted, inputs, first, last, count):
    """Return the logits of a greedy answer, by running the whole sequence for each token with hooks that edit it."""
    plain, prompt = fresh(kind).eval(), inputs["input_ids"].shape[1]
    chosen = sorted({*range(first), *range(prompt - last, prompt)})

    def by_hand(formula):
        def hook(module, args, output):
            output = output.clone()
            output[:, chosen] = formula(output[:, chosen])
            return output

        return hook

    for name, layer in edits(adapted).items():
        plain.get_submodule(name).register_forward_hook(by_hand(edit_of(layer)))
    ids, media = (
        inputs["input_ids"],
        {name: inputs[name] for name in ("pixel_values", "image_grid_thw") if name in inputs},
    )
    steps = []
    for _ in range(count):
        types = {"mm_token_type_ids": (ids == plain.config.image_token_id).int()} if media else {}
        with torch.no_grad():
            logits = plain(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **media, **types).logits
        steps.append(logits[0, -1])
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    return torch.stack(steps)


def answered(model, inputs, count=6, **options):
    """Return the logits of each step of a greedy answer, for each row."""
    settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
    found = model.generate(**inputs, **settings, **options, output_logits=True, return_dict_in_generate=True)
    return torch.stack(found.logits, dim=1)


@pytest.mark.parametrize("kind", MOST_KINDS)
@pytest.mark.parametrize("positions", ["f2+l3", "l1"])
def test_generation_edits_the_prompt_alone(fresh, tuner, processor, batch, kind, positions):
    """A single prompt, one with images, and a batch padded on the left give the same results as without a cache."""
    first, last = parse_positions(positions)
    model = stirred(
        prepare_model(fresh(kind), tuner(train_type="reft", reft_positions=positions, **TEXT_ONLY)), 0.3
    ).eval()
    expected = answered_by_hand(fresh, kind, model, batch, first, last, 6)
    torch.testing.assert_close(answered(model, batch)[0], expected, rtol=1e-4, atol=1e-4)

    processor.tokenizer.padding_side = "left"
    prompts = ["Say a word about the small red circle.", "Yes, and?"]
    together = answered(model, processor.tokenizer(prompts, return_tensors="pt", padding=True))
    for prompt, answer in zip(prompts, together, strict=True):
        alone = processor.tokenizer([prompt], return_tensors="pt")
        expected = answered_by_hand(fresh, kind, model, alone, first, last, 6)
        torch.testing.assert_close(answered(model, alone)[0], expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(answer, expected, rtol=1e-4, atol=1e-4)


def test_edits_of_generated_tokens_would_be_seen(fresh, tuner, batch, monkeypatch):
    """Simulates that no cache is found, as happened in transformers 5.24 to code that used its old name."""
    monkeypatch.setattr("qwenvl_ft.model.adapters.interventions.continues", lambda inputs: False)
    model = stirred(prepare_model(fresh(), tuner(train_type="reft", reft_positions="l1", **TEXT_ONLY)), 0.3).eval()
    expected = answered_by_hand(fresh, "dense", model, batch, 0, 1, 6)
    with suppress(IndexError):  # transformers 5.5 hands on a mask that is longer than the tokens: no silent fault there
        found = answered(model, batch)[0]
        torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(found, expected, atol=0.05)


def test_generation_without_a_cache_is_refused(fresh, tuner, batch):
    """Without a cache, each step would look like a whole prompt, whose last token is an answer's."""
    model = prepare_model(fresh(), tuner(train_type="reft", **TEXT_ONLY)).eval()
    with pytest.raises(RecipeError, match=r"use_cache=False.*reft_positions"):
        model.generate(**batch, max_new_tokens=3, use_cache=False)
    first = prepare_model(fresh(), tuner(train_type="reft", reft_positions="f1", **TEXT_ONLY)).eval()
    torch.testing.assert_close(answered(first, batch, use_cache=False), answered(first, batch), rtol=1e-4, atol=1e-4)


def test_a_prompt_in_several_pieces_is_refused_unless_every_token_is_edited(fresh, tuner, batch):
    """With chunked prefill, the model sees one piece at a time, and neither its position nor the prompt's end."""
    text = {"input_ids": torch.arange(5, 17)[None], "attention_mask": torch.ones(1, 12, dtype=torch.int64)}
    model = stirred(prepare_model(fresh(), tuner(train_type="reft", **TEXT_ONLY)), 0.3).eval()
    for options in ({"prefill_chunk_size": 4}, {"generation_config": GenerationConfig(prefill_chunk_size=4)}):
        with pytest.raises(RecipeError, match=r"^prefill_chunk_size=4.*reft_positions.*Remove prefill_chunk_size.$"):
            model.generate(**text, max_new_tokens=3, **options)
    everywhere = stirred(
        prepare_model(fresh(), tuner(train_type="reft", reft_positions="all", **TEXT_ONLY)), 0.3
    ).eval()
    whole = answered(everywhere, text)
    torch.testing.assert_close(answered(everywhere, text, prefill_chunk_size=4), whole, rtol=1e-4, atol=1e-4)


class Edited(torch.nn.Module):
    """A layer whose output or input is edited at chosen positions by the paper's formula."""

    def __init__(self, layer, edit, chosen):
        super().__init__()
        self.layer, self.chosen = layer, chosen
        self.formula = edit_of(edit)
        self.before, self.after = None, True

    def edited(self, hidden):
        hidden = hidden.clone()
        hidden[0, self.chosen] = self.formula(hidden[0, self.chosen])
        return hidden

    def forward(self, hidden, **kwargs):
        output = self.layer(hidden if self.before is None else self.before(hidden), **kwargs)
        return self.edited(output) if self.after else output


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("positions", ["all", "f7+l9"])
def test_an_edit_comes_before_what_deepstack_adds(fresh, tuner, encoder, mixed_records, checkpoints, kind, positions):
    """The reference is transformers' own model, each layer wrapped in a module that edits the layer's output."""
    options = {"attn_impl": "eager", "patch_embed": "conv3d"}
    settings = {"train_type": "reft", "reft_positions": positions} | TEXT_ONLY
    model = stirred(prepare_model(fresh(kind, **options), tuner(**settings)), 0.3).eval()
    sample = encoder(mixed_records[2])
    batches = [QwenVLCollator()([sample]), QwenVLCollator(places=MediaPlaces.of(model))([sample])]
    chosen = list(range(len(sample["input_ids"])))
    if positions != "all":
        chosen = sorted(by_loop(sample, *parse_positions(positions)))
    experts = experts_implementation(model.config, "float32")
    plain = AutoModelForImageTextToText.from_pretrained(checkpoints[kind], attn_implementation="eager", **experts)
    text = plain.model.language_model
    assert len(plain.config.vision_config.deepstack_visual_indexes) > 1, "vacuous: no feature is added behind a layer"
    wrapped = [Edited(layer, edit, chosen) for layer, edit in zip(text.layers, edits(model).values(), strict=True)]
    text.layers = torch.nn.ModuleList(wrapped)
    inputs = {name: batches[0][name] for name in ("input_ids", "position_ids", "pixel_values", "image_grid_thw")}
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == plain.config.image_token_id).int()
    with torch.no_grad():
        expected = plain.eval()(**inputs, use_cache=False).logits
        for row in batches:
            assert torch.equal(
                model(**{name: value for name, value in row.items() if name != "sources"}).logits, expected
            )
        for layer, following in itertools.pairwise(wrapped):
            layer.after, following.before = False, layer.edited
        swapped = plain(**inputs, use_cache=False).logits
    assert not torch.allclose(swapped, expected, atol=1e-3), "vacuous: the order makes no difference"


@pytest.mark.parametrize(
    ("text", "expected"), [("f1+l1", (1, 1)), ("f7", (7, 0)), ("l3", (0, 3)), ("f0+l2", (0, 2)), ("all", (0, 0))]
)
def test_positions_read_as_in_the_paper(text, expected):
    assert parse_positions(text) == expected


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"reft_positions": "f0"}, r"reft_positions='f0' names no token.*f1\+l1"),
        ({"reft_positions": "first"}, r"'first' names no token"),
        ({"reft_layers": [8, 16, 24]}, r"reft_layers=\[8, 16, 24\]: the language model has layers 0 to 3"),
        ({"reft_layers": []}, r"layers 0 to 3"),
        ({"reft_intervention_type": "Loreft"}, r"Did you mean 'LoreftIntervention'"),
        ({"freeze_aligner": False}, r"changes the language model only.*freeze_aligner=true"),
        ({"target_modules": ["q_proj"]}, r"no target modules"),
        ({"modules_to_save": ["layers.1.mlp"]}, r"layers\.1 in full, or a module in it"),
    ],
)
def test_what_cannot_be_edited_is_one_line(fresh, tuner, settings, words):
    with pytest.raises(RecipeError, match=words) as caught:
        prepare_model(fresh("moe"), tuner(**({"train_type": "reft"} | TEXT_ONLY | settings)))
    assert "\n" not in str(caught.value)


def test_two_adapters_are_switched_each_with_its_positions(fresh, tuner, train, logits, tmp_path):
    only = {"train_type": "reft", "freeze_vit": True, "freeze_aligner": True}
    expected = {}
    for name, positions in (("ends", "f1+l1"), ("all", "all")):
        model = train(prepare_model(fresh(), tuner(**only, reft_positions=positions)))
        model.save_pretrained(tmp_path / name)
        expected[name] = logits(model)
    both = with_adapter(with_adapter(fresh(), tmp_path / "ends", name="ends"), tmp_path / "all", name="all")
    for name in ("ends", "all", "ends"):
        both.set_adapter(name)
        assert torch.equal(logits(both), expected[name])
    assert not torch.allclose(expected["ends"], expected["all"], atol=1e-3), "vacuous: the same edits"


def test_it_does_not_merge_and_says_why(fresh, tuner):
    model = prepare_model(fresh(), tuner(train_type="reft", **TEXT_ONLY))
    with pytest.raises(CheckpointError, match="cannot be merged"):
        model.merge_and_unload()
