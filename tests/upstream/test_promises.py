"""The promises that every set of versions must keep, on tiny models: most of what docs/compatibility.md shows.

Each is tested in depth elsewhere. Here they are tried once, on the shortest way from a recipe to a served model.
"""

import subprocess
import sys

import pytest
import torch
from cases import KINDS, RECORDS, make_trainer, one_step, picture
from rank_cases import in_ranks
from run_cases import EVALUATED_TWICE, short_run, write_questions
from safetensors.torch import load_file
from sequence_cases import assert_exact, model_of, over_rows

from qwenvl_ft.data.collate import QwenVLCollator
from qwenvl_ft.model.load import load_model
from qwenvl_ft.model.placed_media import MediaPlaces
from qwenvl_ft.model.source import load_config
from qwenvl_ft.recipe.load import load_recipe
from qwenvl_ft.train import train
from qwenvl_ft.training.loss import loss_sum, split_labels
from qwenvl_ft.upstream.experts import experts_implementation

NEW_TOKENS = 12


def inputs(batch):
    return {key: value for key, value in batch.items() if key not in ("labels", "sources")}


@pytest.fixture(scope="module")
def samples(encoder, mixed_records):
    return [encoder(record) for record in mixed_records]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Write records with images of two sizes and without images to a file."""
    return write_questions(tmp_path_factory.mktemp("data"), 6, answer="number", widths=(64, 96), text_every=3)


def settings(model, data, folder, *more):
    return short_run(
        model,
        data,
        folder,
        f"data.val={data}",
        *EVALUATED_TWICE,
        *more,
    )


def run(*arguments):
    return train(load_recipe(None, settings(*arguments)))


# -- packed = alone ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attn_impl", ["packed_sdpa", "sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_row_gives_each_sample_its_own_logits(checkpoints, samples, kind, attn_impl):
    model = load_model(checkpoints[kind], torch_dtype="float32", attn_impl=attn_impl).eval()
    with torch.no_grad():
        alone = torch.cat([model(**inputs(QwenVLCollator()([sample]))).logits for sample in samples], dim=1)
        packed = model(**inputs(QwenVLCollator(places=MediaPlaces.of(model))(samples))).logits
        row = inputs(QwenVLCollator()(samples))
        row["position_ids"] = row["position_ids"].clone()
        row["position_ids"][0] = torch.arange(row["position_ids"].shape[-1])
        leaked = model(**{key: value for key, value in row.items() if not key.startswith(("cu_", "max_"))}).logits
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=2e-5)
    assert not torch.allclose(leaked, alone, atol=1e-2), "vacuous: samples that see each other agree too"


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_row_gives_the_gradients_of_its_samples(checkpoints, samples, kind, checkpointing):
    model = load_model(checkpoints[kind], torch_dtype="float32", attn_impl="packed_sdpa").train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})

    def gradients(batches):
        model.zero_grad()
        for batch in batches:
            loss_sum(model, split_labels(batch)).backward()
        return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}

    alone = gradients([QwenVLCollator()([sample]) for sample in samples])
    packed = gradients([QwenVLCollator(places=MediaPlaces.of(model))(samples)])
    assert packed.keys() == alone.keys()
    for name, gradient in alone.items():
        torch.testing.assert_close(packed[name], gradient, rtol=1e-3, atol=2e-5 * float(gradient.abs().max()) + 1e-8)
    assert any(float(value.abs().max()) > 0 for name, value in packed.items() if "visual.blocks" in name)


# -- the loss ----------------------------------------------------------------------------------------------------------


@pytest.mark.distributed
def test_ranks_that_share_a_row_have_the_loss_and_gradients_of_one(tiny_dir, encoder):
    assert_exact(in_ranks(2, over_rows, encoder, *model_of(tiny_dir), ["text, images and a video"], (0,)))


def test_any_split_gives_one_loss_and_one_gradient(tmp_path, tiny_dir, encoder):
    splits = {
        "one batch": ({"per_device_train_batch_size": 8}, {}),
        "accumulated": ({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}, {}),
        "padded": ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}, {"padding_free": False}),
    }
    found = {
        name: one_step(make_trainer(tmp_path / name, tiny_dir, encoder, trainer_options=options, **arguments))
        for name, (arguments, options) in splits.items()
    }
    model = load_model(str(tiny_dir), torch_dtype="float32", attn_impl="sdpa")
    with torch.no_grad():
        rows = [QwenVLCollator()([encoder(record)]) for record in RECORDS]
        means = torch.stack([model(**inputs(row), labels=row["labels"]).loss for row in rows])
        counts = torch.tensor([int((row["labels"][:, 1:] != -100).sum()) for row in rows])
    by_hand = float((means * counts).sum() / counts.sum())
    assert abs(by_hand - float(means.mean())) > 1e-3 * by_hand, "vacuous: a mean of means would agree"
    for loss, gradients in found.values():
        assert loss == pytest.approx(by_hand, rel=1e-5)
        for name, gradient in found["one batch"][1].items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


# -- runs: freezing, resume, evaluation, what is saved -----------------------------------------------------------------


PLAIN = f"""
import sys, torch
from transformers import AutoModelForImageTextToText
folder, adapter, question, answer, experts = sys.argv[1:]
options = {{"dtype": torch.float32, "attn_implementation": "sdpa"}}
if experts:
    options["experts_implementation"] = experts
model = AutoModelForImageTextToText.from_pretrained(folder, **options).eval()
if adapter:
    from peft import PeftModel
    model = PeftModel.from_pretrained(model, adapter).eval()
inputs = torch.load(question, weights_only=True)
with torch.no_grad():
    found = model.generate(**inputs, max_new_tokens={NEW_TOKENS}, do_sample=False)
torch.save(found, answer)
assert "qwenvl_ft" not in sys.modules
"""


def plain_answer(folder, adapter, question, place):
    """Return the tokens that a second process generates with plain transformers and peft."""
    torch.save(question, place / "question.pt")
    words = [sys.executable, "-c", PLAIN, str(folder), str(adapter or ""), str(place / "question.pt")]
    words += [str(place / "answer.pt"), *experts_implementation(load_config(str(folder)), "float32").values()]
    words += [""] * (len(words) < 8)
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(place / "answer.pt", weights_only=True)


@pytest.fixture(scope="module")
def question(processor):
    messages = [
        {"role": "user", "content": [{"type": "image", "image": picture(96, 64)}, {"type": "text", "text": "What?"}]}
    ]
    return dict(
        processor.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
    )


@pytest.mark.parametrize("kind", KINDS)
def test_full_training_freezes_saves_and_serves(checkpoints, data, tmp_path, question, kind):
    start = load_file(checkpoints[kind] / "model.safetensors")
    result = run(
        checkpoints[kind],
        data,
        tmp_path,
        "tuner.train_type=full",
        "tuner.freeze_vit=true",
        "tuner.freeze_aligner=false",
    )
    assert result.steps == 4
    trained = load_file(tmp_path / "model.safetensors")
    assert trained.keys() == start.keys()
    moved = {name for name, value in trained.items() if not torch.equal(value, start[name])}
    vision = {name for name in start if "visual." in name and "merger" not in name}
    assert not moved & vision, "a frozen part moved"
    assert any("language_model" in name for name in moved)
    assert any("visual.merger" in name for name in moved)
    assert any("deepstack_merger_list" in name for name in moved) == any("deepstack" in name for name in start)
    model = load_model(str(tmp_path), torch_dtype="float32", attn_impl="packed_sdpa").eval()
    with torch.no_grad():
        own = model.generate(**question, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert torch.equal(plain_answer(tmp_path, None, question, tmp_path), own)
    assert own.shape[1] > question["input_ids"].shape[1]


def test_a_lora_run_goes_on_to_the_same_weights_and_is_served_by_peft(tiny_dir, data, tmp_path, question):
    more = (
        "tuner.train_type=lora",
        "tuner.freeze_vit=false",
        "tuner.lora_dropout=0.1",
        "training.save_strategy=steps",
        "training.save_steps=2",
    )
    whole, again = tmp_path / "whole", tmp_path / "again"
    run(tiny_dir, data, whole, *more)
    run(tiny_dir, data, again, *more, f"training.resume_from_checkpoint={whole / 'checkpoint-2'}")
    expected, found = (load_file(folder / "adapter_model.safetensors") for folder in (whole, again))
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert any(
        ".visual." in name and float(value.abs().max()) > 0 for name, value in expected.items() if "lora_B" in name
    )
    middle = load_file(whole / "checkpoint-2" / "adapter_model.safetensors")
    assert not all(torch.equal(middle[name], value) for name, value in expected.items()), "vacuous: nothing moved"
    model = load_model(str(whole), torch_dtype="float32").eval()
    with torch.no_grad():
        own = model.generate(**question, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert torch.equal(plain_answer(tiny_dir, whole, question, tmp_path), own)


def test_eval_loss_is_the_mean_over_all_tokens(tiny_dir, encoder, tmp_path):
    losses = []
    for size in (1, 3, 8):
        trainer = make_trainer(tmp_path / str(size), tiny_dir, encoder, per_device_eval_batch_size=size)
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)
    step_loss, _ = one_step(make_trainer(tmp_path / "step", tiny_dir, encoder, per_device_train_batch_size=8))
    assert losses[0] == pytest.approx(step_loss, rel=1e-6)


def test_a_batch_of_prompts_is_answered_as_each_alone(checkpoints, encoder, mixed_records):
    from qwenvl_ft.evaluation.generate import generate

    model = load_model(str(checkpoints["dense"]), torch_dtype="float32").eval()
    with torch.no_grad():
        for value in model.model.language_model.layers.parameters():
            value.mul_(4)  # so that answers differ
    options = {"encoder": encoder, "max_new_tokens": NEW_TOKENS}
    together = generate(model, encoder.processor, mixed_records, batch_size=8, **options)
    assert together == generate(model, encoder.processor, mixed_records, batch_size=1, **options)
    assert len(set(together)) > 1, "vacuous: every answer is the same"
