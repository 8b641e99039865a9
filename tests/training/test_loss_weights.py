"""data.loss_weights gives the weighted mean over the global batch, however it is split."""

import json

import pytest
import torch
import torch.nn.functional as F
from cases import picture
from run_cases import ONE_FULL_EPOCH, first_step, short_run

from qwenvl_ft import train as train_function
from qwenvl_ft.assemble import build_datasets, build_processor
from qwenvl_ft.data.collate import PaddedCollator, QwenVLCollator, vision_fillers
from qwenvl_ft.errors import RecipeError
from qwenvl_ft.model.load import load_model
from qwenvl_ft.model.patch_embed import use_raw_patches
from qwenvl_ft.recipe.load import load_recipe
from qwenvl_ft.training.loss import target_weights

WEIGHTS = {"long": 0.25}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two records with short answers, two with long ones."""
    folder = tmp_path_factory.mktemp("weighted")
    for name, length in (("short", 2), ("long", 30)):
        lines = []
        for k in range(2):
            picture(64 + 32 * k, 64, k).save(folder / f"{name}{k}.png")
            record = {
                "images": [f"{name}{k}.png"],
                "query": "What?",
                "response": " ".join(f"{name}{i}" for i in range(length)),
            }
            lines.append(json.dumps(record))
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


def recipe_of(tiny_dir, data, output, *more):
    sets = {name: {"annotation_path": str(data / f"{name}.jsonl")} for name in ("short", "long")}
    settings = short_run(
        tiny_dir,
        "short,long",
        output,
        f"data.datasets={json.dumps(sets)}",
        f"data.loss_weights={json.dumps(WEIGHTS)}",
        "template.max_length=400",
        *ONE_FULL_EPOCH,
        *more,
    )
    return load_recipe(None, settings)


@pytest.fixture(scope="module")
def samples(tiny_dir, data, tmp_path_factory):
    recipe = recipe_of(tiny_dir, data, tmp_path_factory.mktemp("none"))
    dataset = build_datasets(recipe, build_processor(recipe), 42)[0]
    return [dataset[k] for k in range(4)]


def by_hand(tiny_dir, processor, samples, weights):
    """Return loss and gradient norm for the four samples, each alone."""
    model = load_model(str(tiny_dir), torch_dtype="float32")
    use_raw_patches(model, processor.image_processor)
    total, count = 0.0, 0.0
    for sample in samples:
        labels = sample["labels"][1:]
        weight = weights[sample["source"].dataset] if sample["source"].dataset in weights else 1.0
        inputs = {key: value for key, value in QwenVLCollator()([sample]).items() if key not in ("labels", "sources")}
        logits = model(**inputs).logits[0, :-1]
        total = total + weight * F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
        count += weight * int((labels != -100).sum())
    (total / count).backward()
    norms = [parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None]
    return (total / count).item(), torch.stack(norms).norm().item()


@pytest.mark.parametrize(("size", "accumulation", "padding_free"), [(4, 1, True), (1, 4, True), (2, 2, False)])
def test_any_split_gives_the_weighted_mean_by_hand(
    tiny_dir, data, processor, samples, tmp_path, size, accumulation, padding_free
):
    split = (f"training.per_device_train_batch_size={size}", f"training.gradient_accumulation_steps={accumulation}")
    train_function(recipe_of(tiny_dir, data, tmp_path, *split, f"training.padding_free={str(padding_free).lower()}"))
    assert first_step(tmp_path) == pytest.approx(by_hand(tiny_dir, processor, samples, WEIGHTS), rel=1e-4)
    assert by_hand(tiny_dir, processor, samples, {}) != pytest.approx(
        by_hand(tiny_dir, processor, samples, WEIGHTS), rel=1e-3
    ), "vacuous"


def test_evaluation_is_not_weighted(tiny_dir, data, processor, samples, tmp_path):
    val = [
        f"data.val={json.dumps([str(data / 'short.jsonl'), str(data / 'long.jsonl')])}",
        "training.eval_strategy=epoch",
    ]
    result = train_function(recipe_of(tiny_dir, data, tmp_path, *val, "training.learning_rate=0"))
    logs = [json.loads(line) for line in (tmp_path / "trainer_log.jsonl").read_text().splitlines()]
    assert result.steps
    (loss,) = [entry["eval_loss"] for entry in logs if "eval_loss" in entry]
    assert loss == pytest.approx(by_hand(tiny_dir, processor, samples, {})[0], rel=1e-4)


def test_each_token_has_its_data_sets_weight_and_fillers_none(samples, processor):
    chosen = [samples[0], samples[3]]
    assert [sample["source"].dataset for sample in chosen] == ["short", "long"]
    counts = [int((sample["labels"] != -100).sum()) for sample in chosen]
    expected = [1.0] * counts[0] + [0.25] * counts[1]
    fillers = vision_fillers(processor, ("image", "video"))
    pad = processor.tokenizer.pad_token_id
    for collator in (QwenVLCollator(fillers), PaddedCollator(pad, fillers)):
        assert target_weights(collator(chosen), WEIGHTS).tolist() == expected
    assert target_weights(QwenVLCollator()([samples[3]]), {"short": 2.0, "long": 0.5}).unique().tolist() == [0.5]


def test_a_group_of_several_data_sets_has_their_mean(samples):
    from dataclasses import replace

    grouped = samples[0] | {"source": replace(samples[0]["source"], dataset="short+long")}
    assert target_weights(QwenVLCollator()([grouped]), WEIGHTS).unique().tolist() == [0.625]


def test_a_name_that_is_no_data_set_is_an_error(tiny_dir, data, tmp_path):
    recipe = recipe_of(tiny_dir, data, tmp_path, 'data.loss_weights={"lang": 2}')
    recipe.data.loss_weights = {"lang": 2.0}
    with pytest.raises(RecipeError, match=r"data.loss_weights: 'lang' is none of .* Did you mean 'long'"):
        build_datasets(recipe, build_processor(recipe), 42)
