"""Every optimizer of transformers that is installed trains our parameter groups; those that cannot are refused."""

import importlib.util

import pytest
import torch
from cases import RECORDS, ListRecords, quiet_arguments
from transformers import Trainer
from transformers.training_args import OptimizerNames

from qwenvl_ft.data.plan.dataset import SampleDataset
from qwenvl_ft.errors import RecipeError
from qwenvl_ft.model.anatomy import part_of
from qwenvl_ft.model.load import load_model
from qwenvl_ft.recipe.load import load_recipe
from qwenvl_ft.training.arguments import galore
from qwenvl_ft.training.loss import loss_sum, split_labels
from qwenvl_ft.training.trainer import QwenVLTrainer
from qwenvl_ft.tuning.optimizer import build_optimizer, param_groups

PACKAGES = {
    "bnb": "bitsandbytes",
    "8bit": "bitsandbytes",
    "paged": "bitsandbytes",
    "lion": "bitsandbytes",
    "ademamix": "bitsandbytes",
    "galore": "galore_torch",
    "apollo": "apollo_torch",
    "schedule_free": "schedulefree",
    "stable_adamw": "optimi",
    "torch_4bit": "torchao",
    "torch_8bit": "torchao",
    "anyprecision": "torchdistx",
    "xla": "torch_xla",
    "npu": "torch_npu",
}
"""Part of an optimizer's name -> the package it comes from."""
REFUSED = tuple(name.value for name in OptimizerNames if name.value.endswith("layerwise")) + (
    "lomo",
    "adalomo",
    "grokadamw",
)
RATES = {"vision": 3e-3, "merger": 2e-3, "llm": 1e-3}
PROJECTION = {"optim_target_modules": ["mlp", "self_attn"], "optim_args": "rank=4,update_proj_gap=2,scale=1.0"}


def require(name):
    if name == "galore_adamw_8bit" and not torch.cuda.is_available():
        pytest.skip("galore_torch's 8-bit optimizer asks for a CUDA device")
    for mark, package in PACKAGES.items():
        if mark in name and importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


def arguments(folder, name, **more):
    projection = PROJECTION if name.startswith(("galore", "apollo")) else {}
    options = {"optim": name, "learning_rate": RATES["llm"], "weight_decay": 0.1}
    return quiet_arguments(folder, **(options | projection | more))


@pytest.fixture(scope="module")
def batch(encoder, mixed_records):
    from qwenvl_ft.data.collate import QwenVLCollator

    return split_labels(QwenVLCollator()([encoder(mixed_records[0])]))


@pytest.mark.parametrize("name", [name.value for name in OptimizerNames if name.value not in REFUSED])
def test_every_optimizer_moves_each_part_at_its_own_rate(checkpoints, batch, tmp_path, name):
    """With another learning rate for one part, all other parts end at the same bits."""
    require(name)

    def run(**rates):
        torch.manual_seed(0)
        model = load_model(checkpoints["dense"], torch_dtype="float32", attn_impl="sdpa").train()
        groups = param_groups(
            model,
            learning_rate=rates["llm"],
            vit_lr=rates["vision"],
            aligner_lr=rates["merger"],
            weight_decay=0.1,
        )
        cls, options = Trainer.get_optimizer_cls_and_kwargs(arguments(tmp_path, name), model)
        optimizer = build_optimizer(cls, options, groups, model)
        assert {group["name"].split("/")[0]: float(group["lr"]) for group in optimizer.param_groups} == pytest.approx(
            rates
        )
        if hasattr(optimizer, "train"):
            optimizer.train()
        for _ in range(8 if "radam" in name else 2):  # RAdam waits for its variance to settle
            optimizer.zero_grad()
            loss_sum(model, batch).backward()
            optimizer.step()
        return {key: value.detach().clone() for key, value in model.named_parameters()}

    start = {
        key: value.detach().clone()
        for key, value in load_model(checkpoints["dense"], torch_dtype="float32").named_parameters()
    }
    first, still = run(**RATES), run(**(RATES | {"merger": 0.0}))
    for part in RATES:
        assert any(not torch.equal(first[key], start[key]) for key in start if part_of(key) == part), part
    assert all(torch.equal(still[key], start[key]) for key in start if part_of(key) == "merger")


def trained(folder, checkpoint, encoder, name, *, resume=None, **more):
    """Train four steps, saving every second one, and return the trainer."""
    model = load_model(checkpoint, torch_dtype="float32", attn_impl="sdpa")
    args = arguments(folder, name, max_steps=4, save_steps=2, logging_steps=1, disable_tqdm=True, **more)
    dataset = SampleDataset(ListRecords(RECORDS, "optimizers"), encoder, cache_dir=folder / "cache")
    trainer = QwenVLTrainer(
        model, args, processor=encoder.processor, train_dataset=dataset, max_length=256, vit_lr=3e-3, aligner_lr=2e-3
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


RESUMED = (
    "adamw_torch_fused",
    "adamw_8bit",
    "lion_32bit",
    "adafactor",
    "sgd",
    "rmsprop",
    "galore_adamw",
    "apollo_adamw",
    "schedule_free_adamw",
)


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_ends_at_the_same_bits(checkpoints, encoder, tmp_path, name):
    require(name)
    more = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 1} if "free" in name else {}
    whole = trained(tmp_path / "whole", checkpoints["dense"], encoder, name, **more)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    again = trained(tmp_path / "again", checkpoints["dense"], encoder, name, resume=str(checkpoint), **more)
    expected, found = whole.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    halfway = load_model(checkpoint, torch_dtype="float32").state_dict()
    assert not all(torch.equal(expected[key], halfway[key]) for key in halfway if key in expected), "vacuous"


def test_a_schedule_free_checkpoint_holds_the_averaged_weights(checkpoints, encoder, tmp_path):
    """Evaluation weights, not those that gradients are computed at."""
    require("schedule_free_adamw")
    options = {"lr_scheduler_type": "constant"}
    trainer = trained(tmp_path, checkpoints["dense"], encoder, "schedule_free_adamw", **options)
    trainer.save_model(str(tmp_path / "last"))
    saved = load_model(tmp_path / "last", torch_dtype="float32").state_dict()
    trainer.optimizer.eval()
    averaged = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    assert all(torch.equal(saved[key], averaged[key]) for key in saved if key in averaged)
    trainer.optimizer.train()
    moved = trainer.model.state_dict()
    assert not all(torch.equal(moved[key], averaged[key]) for key in averaged), "vacuous: both are the same"


def test_galore_takes_the_step_of_the_paper(tmp_path):
    """One step by hand: Adam on the projected gradient, projected back, at the part's own learning rate."""
    require("galore_adamw")
    from torch import nn

    torch.manual_seed(0)
    model = nn.Module()
    model.visual = nn.Module()
    model.visual.merger = nn.Module()
    model.visual.merger.mlp = nn.Linear(12, 8)
    weight = model.visual.merger.mlp.weight
    start, rank, scale, rate = weight.detach().clone(), 3, 0.5, 2e-3
    recipe = load_recipe(
        None,
        [
            "tuner.train_type=full",
            "training.optimizer=galore",
            f"training.galore_rank={rank}",
            f"training.galore_scale={scale}",
        ],
    )
    args = quiet_arguments(tmp_path, **{"adam_epsilon": 1e-8} | galore(recipe))
    cls, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
    groups = param_groups(model, learning_rate=1.0, aligner_lr=rate, weight_decay=0.0)
    optimizer = build_optimizer(cls, options, groups, model)
    assert [group["name"] for group in optimizer.param_groups] == ["merger/projected", "merger/no_decay"]
    gradient = torch.randn(8, 12)
    weight.grad, model.visual.merger.mlp.bias.grad = gradient.clone(), torch.zeros(8)
    optimizer.step()
    basis = torch.linalg.svd(gradient, full_matrices=False)[0][:, :rank]  # the shorter side
    low = basis.T @ gradient
    step = low / low.abs()  # the first step of Adam
    torch.testing.assert_close(weight.detach(), start - rate * scale * basis @ step, rtol=1e-4, atol=1e-6)
    assert optimizer.state[weight]["exp_avg"].shape == (rank, 12), "the memory that it is for"


def test_weights_that_a_projection_names_and_none_trains_are_an_error(checkpoints, tmp_path):
    require("galore_adamw")
    model = load_model(checkpoints["dense"], torch_dtype="float32")
    model.requires_grad_(False)
    model.model.visual.merger.requires_grad_(True)
    cls, options = Trainer.get_optimizer_cls_and_kwargs(arguments(tmp_path, "galore_adamw"), model)
    with pytest.raises(RecipeError, match="none of those named in"):
        build_optimizer(cls, options, param_groups(model, learning_rate=1e-3), model)


ADAPTED = ["tuner.train_type=lora"]
FULL = ["tuner.train_type=full"]
REFUSALS = {
    "training.optim=lomo": (FULL, "updates each weight as soon as its gradient is computed"),
    "training.optim=galore_adamw_layerwise": (FULL, "vit_lr and aligner_lr would have no effect"),
    "training.optim=grokadamw": (FULL, "checkpoints do not hold"),
    "training.optim=schedule_free_adamw": (FULL, "Set it to constant_with_warmup"),
    "training.use_galore=true": (ADAPTED, "train_type=lora trains adapters"),
    "training.optimizer=galore": (ADAPTED, "trains adapters"),
    "training.optim=galore_adamw": (FULL, "needs the names of the modules to project"),
    "training.optim=apollo_adamw": (ADAPTED, "projects the gradients of whole weights"),
    "training.galore_rank=8": (FULL, "is not read with training.use_galore=false"),
    "training.lorap_lr_ratio=16": (FULL, "lorap_lr_ratio=16 is not read with tuner.train_type=full"),
    "training.optimizer=lorap": (FULL, "optimizer=lorap is for LoRA's B matrices"),
    "training.lisa_activated_layers=2": (ADAPTED, "full training of the language model"),
    "training.lisa_step_interval=5": (FULL, "is not read with training.lisa_activated_layers=0"),
}


@pytest.mark.parametrize("given", REFUSALS)
def test_what_cannot_be_together_is_one_line(given):
    with_it, words = REFUSALS[given]
    with pytest.raises(RecipeError, match=words) as caught:
        load_recipe(None, [*with_it, given])
    assert "\n" not in str(caught.value)


def test_the_refused_are_refused_and_no_other():
    for name in OptimizerNames:
        overrides = ["tuner.train_type=full", f"training.optim={name.value}", "training.lr_scheduler_type=constant"]
        if name.value.startswith(("galore", "apollo")):
            overrides.append("training.optim_target_modules=[mlp]")
        if name.value in REFUSED:
            with pytest.raises(RecipeError):
                load_recipe(None, overrides)
        else:
            load_recipe(None, overrides)


def test_the_flags_of_the_guides_are_understood():
    from qwenvl_ft.recipe.argv import recipe_from_argv
    from qwenvl_ft.training.arguments import lora_plus

    flags = "--train_type full --use_galore true --galore_target_modules mlp self_attn --galore_rank 128"
    flags += " --galore_update_proj_gap 50 --galore_scale 1.0 --galore_proj_type std --optimizer adafactor"
    assert galore(recipe_from_argv(flags.split())) == {
        "optim": "galore_adafactor",
        "optim_target_modules": ["mlp", "self_attn"],
        "optim_args": "rank=128,update_proj_gap=50,scale=1.0,proj_type=std",
    }
    assert galore(recipe_from_argv(["--train_type", "full", "--optimizer", "galore"]))["optim"] == "galore_adamw"
    assert galore(recipe_from_argv([])) == {}
    assert lora_plus(recipe_from_argv(["--lorap_lr_ratio", "8"])) == 8
    assert lora_plus(recipe_from_argv(["--optimizer", "lorap"])) == 16
    assert lora_plus(recipe_from_argv([])) is None
    flags = "--train_type full --lisa_activated_layers 2 --lisa_step_interval 20"
    lisa = recipe_from_argv(flags.split()).training
    assert (lisa.lisa_activated_layers, lisa.lisa_step_interval) == (2, 20)
