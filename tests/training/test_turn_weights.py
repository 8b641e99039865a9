"""A turn's loss_weight gives the weighted mean sum(w * nll) / sum(w), however the batch is split."""

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from cases import picture
from run_cases import ONE_FULL_EPOCH, first_step, short_run

from qwenvl_ft import train as train_function
from qwenvl_ft.assemble import build_datasets, build_processor
from qwenvl_ft.data.collate import ASIDE, PaddedCollator, QwenVLCollator, vision_fillers
from qwenvl_ft.model.load import load_model
from qwenvl_ft.model.patch_embed import use_raw_patches
from qwenvl_ft.recipe.load import load_recipe
from qwenvl_ft.training.loss import split_labels, target_weights

WEIGHTS = [(0.25, 1.5), (None, 0), (3, None), (0.1, 0.7)]
"""``loss_weight`` of the two answers of each record."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("turns")
    lines = []
    for k, weights in enumerate(WEIGHTS):
        picture(64 + 32 * k, 64, k).save(folder / f"{k}.png")
        turns = []
        for place, weight in enumerate(weights):
            answer = " ".join(f"word{i}" for i in range(2 + 7 * place + 3 * k))
            turns += [
                {"role": "user", "content": [{"type": "text", "value": "What?"}]},
                {"role": "assistant", "content": answer} | ({} if weight is None else {"loss_weight": weight}),
            ]
        turns[0]["content"].insert(0, {"type": "image_url", "value": f"{k}.png"})
        lines.append(json.dumps({"messages": turns}))
    (folder / "turns.jsonl").write_text("\n".join(lines))
    return folder / "turns.jsonl"


def words_of(tiny_dir, data, output, *more):
    settings = (
        "template.max_length=600",
        *ONE_FULL_EPOCH,
    )
    return short_run(tiny_dir, str(data), output, *settings, *more)


def recipe_of(*arguments):
    return load_recipe(None, words_of(*arguments))


@pytest.fixture(scope="module")
def samples(tiny_dir, data, tmp_path_factory):
    recipe = recipe_of(tiny_dir, data, tmp_path_factory.mktemp("none"))
    dataset = build_datasets(recipe, build_processor(recipe), 42)[0]
    return [dataset[k] for k in range(4)]


def by_hand(tiny_dir, processor, samples, *, weighted=True):
    """Return loss and gradient norm for the samples, each alone.

    The weight of a label follows from the answers themselves: a weighted turn is found by its number of labels.
    """
    model = load_model(str(tiny_dir), torch_dtype="float32")
    use_raw_patches(model, processor.image_processor)
    total, count = 0.0, 0.0
    for sample, weights in zip(samples, WEIGHTS[: len(samples)], strict=True):
        labels = sample["labels"][1:]
        inputs = {key: value for key, value in QwenVLCollator()([sample]).items() if key not in ASIDE}
        losses = F.cross_entropy(model(**inputs).logits[0, :-1], labels, ignore_index=-100, reduction="none").double()
        learned = (labels != -100).nonzero()[:, 0]
        turns = torch.tensor_split(learned, (learned.diff() > 1).nonzero()[:, 0] + 1)
        used = [weight for weight in weights if weight != 0]
        assert len(turns) == len(used)
        for turn, weight in zip(turns, used, strict=True):
            factor = 1.0 if weight is None or not weighted else weight
            total = total + factor * losses[turn].sum()
            count += factor * len(turn)
    (total / count).backward()
    norms = [parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None]
    return (total / count).item(), torch.stack(norms).norm().item()


@pytest.mark.parametrize(
    "split",
    [
        ("per_device_train_batch_size=4", "gradient_accumulation_steps=1"),
        ("per_device_train_batch_size=1", "gradient_accumulation_steps=4"),
        ("per_device_train_batch_size=2", "gradient_accumulation_steps=2", "padding_free=false"),
        ("per_device_train_batch_size=1", "gradient_accumulation_steps=1", "packing=true"),
    ],
    ids=["one row", "four passes", "padded", "packed"],
)
def test_any_split_gives_the_weighted_mean_by_hand(tiny_dir, data, processor, samples, tmp_path, split):
    train_function(recipe_of(tiny_dir, data, tmp_path, *(f"training.{word}" for word in split)))
    expected = by_hand(tiny_dir, processor, samples)
    assert first_step(tmp_path) == pytest.approx(expected, rel=1e-4)
    assert by_hand(tiny_dir, processor, samples, weighted=False) != pytest.approx(expected, rel=1e-3), "vacuous"


@pytest.mark.soak
@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_give_the_same_mean_where_one_of_them_has_no_weights(
    tiny_dir, data, processor, samples, tmp_path
):
    two = data.with_name("two.jsonl")
    two.write_text("".join(data.read_text().splitlines(keepends=True)[:2]))
    assert ["label_weights" in sample for sample in samples[:2]] == [True, False]
    words = words_of(tiny_dir, two, tmp_path, "training.per_device_train_batch_size=1")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, *torchrun, "-m", "qwenvl_ft.train", *words]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert first_step(tmp_path) == pytest.approx(by_hand(tiny_dir, processor, samples[:2]), rel=1e-4)


def test_evaluation_is_not_weighted(tiny_dir, data, processor, samples, tmp_path):
    more = (f"data.val={data}", "training.eval_strategy=epoch", "training.learning_rate=0")
    train_function(recipe_of(tiny_dir, data, tmp_path, *more))
    logs = [json.loads(line) for line in (tmp_path / "trainer_log.jsonl").read_text().splitlines()]
    (loss,) = [entry["eval_loss"] for entry in logs if "eval_loss" in entry]
    assert loss == pytest.approx(by_hand(tiny_dir, processor, samples, weighted=False)[0], rel=1e-4)


def test_weights_of_turns_and_of_data_sets_multiply_and_fillers_have_none(samples, processor):
    fillers = vision_fillers(processor, ("image", "video"))
    pad = processor.tokenizer.pad_token_id
    chosen = [samples[0], samples[1]]
    own = [sample.get("label_weights", torch.ones(len(sample["labels"]))) for sample in chosen]
    expected = torch.cat([w[1:][s["labels"][1:] != -100] for w, s in zip(own, chosen, strict=True)])
    assert set(expected.tolist()) == {0.25, 1.5, 1.0}
    name = samples[0]["source"].dataset
    for collator in (QwenVLCollator(fillers), PaddedCollator(pad, fillers)):
        batch = collator(chosen)
        assert torch.equal(target_weights(batch, {}), expected)
        assert torch.equal(target_weights(batch, {name: 0.5}), expected * 0.5)
        assert torch.equal(split_labels(batch, {})["target_weights"], expected)
        assert not {"target_weights", "label_weights"} & split_labels(batch).keys()
    assert "label_weights" not in QwenVLCollator()([samples[1]]), "a turn that is left out needs no weights"
