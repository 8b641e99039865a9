"""Runs on Qwen2-VL and Qwen2.5-VL: which parts train, resume to the same bits, and what plain transformers loads."""

import pytest
import torch
from cases import OLDER_KINDS, picture
from run_cases import EVALUATED_TWICE, short_run, write_questions
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from qwenvl_ft.data.collate import QwenVLCollator
from qwenvl_ft.data.encode.encoder import Encoder
from qwenvl_ft.errors import CheckpointError
from qwenvl_ft.export.merge import merge
from qwenvl_ft.export.serving import export
from qwenvl_ft.model.anatomy import canonical_name
from qwenvl_ft.model.load import load_model, load_processor
from qwenvl_ft.recipe.load import load_recipe
from qwenvl_ft.recipe.schema import TunerConfig
from qwenvl_ft.train import train
from qwenvl_ft.training.loss import loss_sum, split_labels
from qwenvl_ft.tuning.prepare import prepare_model

FLAGS = {"vision": "freeze_vit", "merger": "freeze_aligner", "llm": "freeze_llm"}
PLACES = {"vision": ("visual.blocks.", "visual.patch_embed."), "merger": ("visual.merger.",)}
"""Part -> where its weights are, written down here once more."""
UNFROZEN = [f"tuner.{flag}=false" for flag in FLAGS.values()]


each_kind = pytest.mark.parametrize("kind", OLDER_KINDS)
newer_first = pytest.mark.parametrize("kind", [pytest.param(OLDER_KINDS[0], marks=pytest.mark.soak), OLDER_KINDS[1]])
"""For tests of whole runs, in which the two differ least."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Write records with images of two sizes and without images."""
    return write_questions(tmp_path_factory.mktemp("data"), 6, answer="number", widths=(64, 150), text_every=3)


def run(model, data, folder, *more):
    settings = short_run(
        model,
        data,
        folder,
        f"data.val={data}",
        *EVALUATED_TWICE,
        "training.save_strategy=steps",
        "training.save_steps=2",
        *UNFROZEN,
        *more,
    )
    return train(load_recipe(None, settings))


def named_part(name):
    name = canonical_name(name)
    return next((part for part, places in PLACES.items() if any(place in name for place in places)), "llm")


def trainable(model):
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


@each_kind
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("part", FLAGS)
def test_one_part_trains_and_the_others_stay(checkpoints, kind, part, method):
    """Every weight of the part (or every linear layer, with LoRA) changes in two steps, and no other."""
    encoder = Encoder(load_processor(str(checkpoints[kind])))
    record = {"image": picture(150, 90), "conversations": [{"from": "human", "value": "<image>What?"}]}
    record["conversations"].append({"from": "gpt", "value": "A blur."})
    batch = split_labels(QwenVLCollator()([encoder(record)]))
    model = load_model(checkpoints[kind], torch_dtype="float32", attn_impl="packed_sdpa").train()
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"}
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    frozen = {flag: other != part for other, flag in FLAGS.items()}
    model = prepare_model(model, TunerConfig(train_type=method, lora_dropout=0.0, **frozen))
    adapters = {name: value.detach().clone() for name, value in trainable(model).items() if "lora_" in name}
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2, weight_decay=0.0)
    for _ in range(2):
        optimizer.zero_grad()
        loss_sum(model, batch).backward()
        optimizer.step()
    after = dict(model.named_parameters())
    bare = {canonical_name(name): value for name, value in after.items() if "lora_" not in name}
    moved = {name for name, value in before.items() if not torch.equal(bare[name], value)}
    if method == "full":
        assert moved == {name for name in before if named_part(name) == part}
        return
    assert not moved
    assert all(not torch.equal(after[name], value) for name, value in adapters.items())
    assert {canonical_name(name).partition(".lora_")[0] for name in adapters} == {
        name for name in linear if named_part(name) == part
    }


def answers(model, folder):
    """Return the logits and the generated tokens for a question about an image, prepared by transformers."""
    processor = AutoProcessor.from_pretrained(folder)
    content = [{"type": "image", "image": picture(150, 90)}, {"type": "text", "text": "What?"}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    inputs = processor.apply_chat_template([{"role": "user", "content": content}], **options)
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
        return logits, model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False)


def plain(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")


@newer_first
def test_a_full_run_resumes_to_the_same_bits_and_plain_transformers_loads_it(checkpoints, data, kind, tmp_path):
    whole, again = tmp_path / "whole", tmp_path / "again"
    more = "tuner.train_type=full", "training.activation_checkpointing=true"
    assert run(checkpoints[kind], data, whole, *more).steps == 4
    run(checkpoints[kind], data, again, *more, f"training.resume_from_checkpoint={whole / 'checkpoint-2'}")
    start, middle, end, found = (
        load_file(folder / "model.safetensors") for folder in (checkpoints[kind], whole / "checkpoint-2", whole, again)
    )
    assert start.keys() == end.keys()
    assert {name.split(".")[0] for name in end} == {"visual", "model"}, "names of the released models"
    assert all(torch.equal(found[name], value) for name, value in end.items())
    assert not any(torch.equal(middle[name], value) for name, value in end.items() if name.endswith("weight"))
    (logits, tokens), (own, own_tokens) = (
        answers(model, whole) for model in (plain(whole), load_model(str(whole), torch_dtype="float32"))
    )
    torch.testing.assert_close(own, logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(own_tokens, tokens)
    assert not torch.allclose(answers(plain(checkpoints[kind]), whole)[0], logits, atol=1e-2), "vacuous: not trained"


@pytest.mark.soak
@each_kind
def test_a_lora_run_resumes_and_its_merged_model_answers_alike(checkpoints, data, kind, tmp_path):
    whole, again = tmp_path / "whole", tmp_path / "again"
    more = "tuner.train_type=lora", "tuner.lora_dropout=0.1", "training.learning_rate=1e-2"
    run(checkpoints[kind], data, whole, *more)
    run(checkpoints[kind], data, again, *more, f"training.resume_from_checkpoint={whole / 'checkpoint-2'}")
    expected, found = (load_file(folder / "adapter_model.safetensors") for folder in (whole, again))
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    merge(str(whole), str(tmp_path / "merged"))
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert stored.keys() == load_file(checkpoints[kind] / "model.safetensors").keys()
    adapted, merged = answers(load_model(str(whole), torch_dtype="float32"), whole), tmp_path / "merged"
    logits, tokens = answers(plain(merged), merged)
    torch.testing.assert_close(logits, adapted[0], rtol=1e-3, atol=1e-4)
    assert torch.equal(tokens, adapted[1])
    assert not torch.allclose(answers(plain(checkpoints[kind]), whole)[0], logits, atol=1e-2), "vacuous: not trained"
    with pytest.raises(CheckpointError, match=f"adapters of {kind} is not known here. Serve the merged model"):
        export(str(whole), str(tmp_path / "served"), "vllm")
    export(str(merged), str(tmp_path / "served"), "vllm")
    assert torch.equal(answers(plain(tmp_path / "served"), merged)[1], tokens)
