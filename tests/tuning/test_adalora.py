"""AdaLoRA gives the same weights as peft's own loop after every step, the target rank, and a loadable checkpoint."""

import json
from dataclasses import replace

import pytest
import torch
from cases import RECORDS, ListRecords, answers_of, make_trainer, quiet_arguments
from peft import AdaLoraConfig, PeftModel, get_peft_model
from run_cases import short_run, write_questions
from safetensors.torch import load_file
from transformers.trainer_utils import SaveStrategy

from qwenvl_ft import assemble, train
from qwenvl_ft.data.plan.dataset import SampleDataset
from qwenvl_ft.errors import RecipeError
from qwenvl_ft.model.load import load_model
from qwenvl_ft.recipe.load import load_recipe
from qwenvl_ft.training.loss import loss_sum, split_labels
from qwenvl_ft.training.run_length import require_enough_steps
from qwenvl_ft.tuning.methods.adalora import STATE
from qwenvl_ft.tuning.prepare import prepare_model
from qwenvl_ft.tuning.targets import adapter_targets

SCHEDULE = {
    "train_type": "adalora",
    "adalora_init_r": 6,
    "adalora_target_r": 2,
    "adalora_tinit": 1,
    "adalora_tfinal": 1,
    "adalora_deltaT": 2,
}
TARGETS = ["q_proj", "linear_fc1"]


@pytest.fixture
def settings(tuner):
    return tuner(**SCHEDULE, target_modules=TARGETS)


def trainer_of(model, folder, encoder, tiny_dir, *, save_steps=None, **arguments):
    options = {"max_steps": 6, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "optim": "adamw_torch"}
    trainer = make_trainer(folder, tiny_dir, encoder, records=answers_of(3, 5, 2, 4), **(options | arguments))
    if save_steps:
        trainer.args.save_strategy, trainer.args.save_steps = SaveStrategy.STEPS, save_steps
    return type(trainer)(
        model,
        trainer.args,
        processor=encoder.processor,
        train_dataset=trainer.train_dataset,
        packing=False,
        max_length=512,
    )


def test_over_a_bfloat16_model_the_rank_of_a_layer_stays_frozen(fresh, settings):
    """peft converts the adapter to float32, and the parameter that holds the rank may come back trainable."""
    models = [prepare_model(fresh(torch_dtype=dtype), settings) for dtype in ("float32", "bfloat16")]
    whole, half = ({name: value.requires_grad for name, value in model.named_parameters()} for model in models)
    assert whole == half
    assert [trains for name, trains in half.items() if ".ranknum." in name] == [False] * len(adapted(models[1]))


def adapted(model):
    return [name for name, _ in model.named_parameters() if ".lora_E." in name]


def ranks(model):
    return {name: int((value != 0).sum()) for name, value in model.named_parameters() if ".lora_E." in name}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_is_pefts_own_loop(fresh, settings, encoder, tiny_dir, tmp_path, accumulation):
    """Two samples per step in one or two micro-batches: pruning follows optimizer steps, the loss has the penalty."""
    torch.manual_seed(0)
    model = prepare_model(fresh(), settings)
    reference_base = fresh()
    torch.manual_seed(0)
    config = AdaLoraConfig(
        init_r=6,
        target_r=2,
        tinit=1,
        tfinal=1,
        deltaT=2,
        total_step=6,
        lora_alpha=32,
        orth_reg_weight=0.5,
        target_modules=adapter_targets(fresh(), settings),
        task_type="CAUSAL_LM",
    )
    reference = get_peft_model(reference_base, config)
    trainer = trainer_of(
        model,
        tmp_path,
        encoder,
        tiny_dir,
        per_device_train_batch_size=2 // accumulation,
        gradient_accumulation_steps=accumulation,
    )
    seen = []
    original = trainer.compute_loss

    def spy(model, inputs, *args, **kwargs):
        seen.append(dict(inputs["batch"].tensors))
        return original(model, inputs, *args, **kwargs)

    trainer.compute_loss = spy
    trainer.train()
    optimizer = torch.optim.AdamW([p for p in reference.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    reference.train()
    steps = [seen[i : i + accumulation] for i in range(0, len(seen), accumulation)]
    assert len(steps) == 6
    for number, passes in enumerate(steps, start=1):
        optimizer.zero_grad()
        tokens = sum(inputs["targets"].numel() for inputs in passes)
        loss = sum(loss_sum(reference, inputs) for inputs in passes) / tokens
        terms = []
        for name, value in reference.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                square = value @ value.T if "lora_A" in name else value.T @ value
                terms.append(torch.norm(square - torch.eye(len(square)), p="fro"))
        (loss + 0.5 * sum(terms) / len(terms)).backward()
        optimizer.step()
        reference.base_model.update_and_allocate(number)
    ours = dict(model.named_parameters())
    for name, value in reference.named_parameters():
        if value.requires_grad:
            torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-5)
    assert ranks(model) == ranks(reference)


def test_ranks_end_at_the_target_and_plain_peft_opens_what_is_saved(
    fresh, settings, encoder, tiny_dir, logits, tmp_path
):
    model = prepare_model(fresh(), settings)
    trainer_of(model, tmp_path / "run", encoder, tiny_dir).train()
    found = ranks(model)
    assert sum(found.values()) == 2 * len(found)
    assert len(set(found.values())) > 1, "vacuous: every layer has the same rank"
    trained = logits(model)
    model.save_pretrained(tmp_path / "saved")
    state = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    assert sum(value.shape[0] for key, value in state.items() if "lora_A" in key) == sum(found.values())
    config = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert config["total_step"] == 6
    again = PeftModel.from_pretrained(fresh(), tmp_path / "saved")
    torch.testing.assert_close(logits(again), trained)
    torch.testing.assert_close(logits(again.merge_and_unload()), trained, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_between_two_cuts_holds_what_has_grown_since(fresh, settings, train, logits, tmp_path):
    """peft's own save omits ranks that the last pruning zeroed, although the optimizer has changed them since."""
    model = prepare_model(fresh(), settings)
    model.begin(10)
    train(model)
    model.after_step(2)
    assert model.peft_config["default"].rank_pattern, "vacuous: nothing was cut"
    train(model)
    trained = logits(model)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(fresh(), tmp_path)), trained)


def test_a_resumed_run_cuts_as_the_whole_one(fresh, settings, encoder, tiny_dir, tmp_path):
    whole = prepare_model(fresh(), settings)
    start = {name: value.detach().clone() for name, value in whole.named_parameters()}
    trainer_of(whole, tmp_path / "run", encoder, tiny_dir, save_steps=3).train()
    checkpoint = tmp_path / "run" / "checkpoint-3"
    assert (checkpoint / STATE).is_file()
    torch.manual_seed(5)
    other = prepare_model(fresh(), settings)
    trainer_of(other, tmp_path / "run", encoder, tiny_dir, save_steps=3).train(resume_from_checkpoint=str(checkpoint))
    found = dict(other.named_parameters())
    assert all(torch.equal(found[name], value) for name, value in whole.named_parameters())
    assert any(not torch.equal(start[name], value) for name, value in whole.named_parameters()), "vacuous"
    (checkpoint / STATE).unlink()
    best = prepare_model(fresh(), settings)
    best.load_adapter(checkpoint, "default")  # what load_best_model_at_end does, here without the state
    opened = PeftModel.from_pretrained(load_model(tiny_dir, torch_dtype="float32", attn_impl="sdpa"), checkpoint)
    sample = split_labels(next(iter(trainer_of(best, tmp_path / "x", encoder, tiny_dir).get_train_dataloader())))
    torch.testing.assert_close(loss_sum(best.eval(), sample), loss_sum(opened.eval(), sample))


def test_a_second_stage_cuts_its_own_ranks_and_none_of_a_frozen_first(fresh, tuner, encoder, tiny_dir, tmp_path):
    first = tuner(**SCHEDULE, target_modules=["linear_fc1"], freeze_llm=True)
    trainer_of(prepare_model(fresh(), first), tmp_path / "first", encoder, tiny_dir).train()
    trained = tmp_path / "stage_1"
    before = prepare_model(fresh(), first)
    with torch.no_grad():
        for name, value in before.named_parameters():
            if ".lora_E." in name:
                value.fill_(1e-4)  # less than any other: a budget that they share would cut them first
    before.save_pretrained(trained)
    second = tuner(**SCHEDULE, target_modules=["q_proj"], freeze_vit=True, resume_from_checkpoint=str(trained))
    second = replace(second, freeze_aligner=True)
    model = prepare_model(fresh(), second)
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    trainer_of(model, tmp_path / "second", encoder, tiny_dir).train()
    left = ranks(model)
    own = {name: count for name, count in left.items() if ".language_model." in name}
    assert sum(own.values()) == 2 * len(own), "adalora_target_r each, on average"
    assert all(count == 6 for name, count in left.items() if name not in own)
    kept = [name for name, value in start.items() if ".visual." in name and ".lora_" in name]
    assert kept
    assert all(torch.equal(start[name], value) for name, value in model.named_parameters() if name in kept)


def test_schedules_without_room_for_cuts_are_refused(fresh, tuner, encoder, tiny_dir, tmp_path):
    with pytest.raises(RecipeError, match=r"adalora_target_r=6 is not below tuner.adalora_init_r=6"):
        prepare_model(fresh(), tuner(train_type="adalora", adalora_init_r=6, adalora_target_r=6))
    model = prepare_model(
        fresh(), tuner(train_type="adalora", adalora_tinit=4, adalora_tfinal=2, target_modules=TARGETS)
    )
    with pytest.raises(RecipeError, match=r"adalora_tinit=4 .*adalora_tfinal=2 .* run's 6 .*counts from the end"):
        trainer_of(model, tmp_path, encoder, tiny_dir).train()
    with pytest.raises(RecipeError, match=r"adalora has no layer to adapt"):
        prepare_model(fresh(), tuner(train_type="adalora", target_regex="^$", modules_to_save=["model.visual.merger"]))


class Loads(Exception):
    """The model is loaded."""


def loads(*_):
    raise Loads


@pytest.mark.parametrize("length", [["training.max_steps=6"], ["training.num_train_epochs=1"]])
def test_a_run_that_is_too_short_for_the_cuts_is_refused_before_the_model_is_loaded(
    length, tiny_dir, tmp_path, monkeypatch
):
    """Eight samples are eight steps, and the eight of the schedule leave none."""
    data = write_questions(tmp_path, 8)
    more = ["tuner.train_type=adalora", "tuner.adalora_tinit=4", "tuner.adalora_tfinal=4", "training.packing=false"]
    recipe = load_recipe(None, short_run(tiny_dir, data, tmp_path / "run", *more, *length))
    monkeypatch.setattr(assemble, "load_model", loads)
    with pytest.raises(RecipeError, match=r"adalora_tinit=4 .*adalora_tfinal=4 .* leave none of the run's [68] steps"):
        train(recipe)
    longer = load_recipe(None, [*short_run(tiny_dir, data, tmp_path / "run", *more), "training.max_steps=9"])
    with pytest.raises(Loads):
        train(longer)


@pytest.mark.parametrize(("sharing", "steps"), [(1, 2), (2, 4)])
def test_the_steps_of_a_run_are_those_of_groups_that_share_rows(sharing, steps, encoder, tmp_path, monkeypatch):
    """Eight samples on four ranks are two steps, and four if two ranks share each row."""
    dataset = SampleDataset(ListRecords(RECORDS[:1] * 8), encoder, cache_dir=tmp_path / "cache")
    more = ["tuner.train_type=adalora", "tuner.adalora_tinit=1", "training.packing=false"]
    more.append(f"training.sequence_parallel_size={sharing}")
    args = quiet_arguments(tmp_path, num_train_epochs=1, per_device_train_batch_size=1)
    monkeypatch.setattr(type(args), "world_size", 4)
    fits, short = (load_recipe(None, [*more, f"tuner.adalora_tfinal={steps - 2 + late}"]) for late in (0, 1))
    require_enough_steps(fits, args, dataset)
    with pytest.raises(RecipeError, match=f"leave none of the run's {steps} steps"):
        require_enough_steps(short, args, dataset)
