"""accelerate's configuration reaches a run as variables; what contradicts the recipe is an error in one line."""

import os

import pytest

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.recipe.load import load_recipe
from qwenvl_ft.training.arguments import build_arguments


@pytest.fixture
def arguments(tiny_dir, tmp_path, monkeypatch):
    def build(environment, *overrides):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        data = ["data.train=a.jsonl", f"training.output_dir={tmp_path}", "training.use_cpu=true"]
        return build_arguments(load_recipe(None, [f"model.model={tiny_dir}", *data, *overrides]))

    return build


BF16 = {"ACCELERATE_MIXED_PRECISION": "bf16"}
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true"}
ADALORA = ("tuner.train_type=adalora",)
FP32 = "model.torch_dtype=float32"
FAULTS = {
    "bf16 over a float32 recipe": (
        BF16,
        (FP32,),
        r"mixed_precision: bf16 .* the recipe says none by model.torch_dtype=float32, training.bf16=False .* 'no'",
    ),
    "bf16 under FSDP2 over a float32 recipe": (BF16 | FSDP, (FP32,), r"mixed_precision: bf16"),
    "fp16 over a bf16 recipe": (
        {"ACCELERATE_MIXED_PRECISION": "fp16"},
        ("model.torch_dtype=bfloat16",),
        r"mixed_precision: fp16 .* the recipe says bf16 .* Set mixed_precision: 'bf16' there",
    ),
    "AdaLoRA under accelerate's FSDP": (FSDP, ADALORA, r"which FSDP in accelerate's configuration does not keep"),
    "GaLore under accelerate's FSDP": (
        FSDP,
        ("tuner.train_type=full", "training.use_galore=true"),
        r"needs whole gradients, .* Remove FSDP in accelerate's configuration",
    ),
    "LISA under accelerate's FSDP": (
        FSDP,
        ("tuner.train_type=full", "tuner.freeze_llm=false", "training.lisa_activated_layers=1"),
        r"which DeepSpeed and FSDP ignore",
    ),
    "two shardings": (FSDP, ("deepspeed.enabled=true",), r"deepspeed.enabled=true and FSDP in accelerate's config"),
    "FSDP twice": (FSDP, ("training.fsdp=full_shard",), r"training.fsdp and FSDP in accelerate's configuration both"),
    "FSDP1 of accelerate": (FSDP | {"FSDP_VERSION": "1"}, (), r"is of version 1, .* Set fsdp_version: 2 there"),
    "FSDP of accelerate without a version": (FSDP | {"FSDP_VERSION": ""}, (), r"is of version 1, .* not supported"),
    "FSDP1 of the recipe": (
        {},
        ("training.fsdp=full_shard", "training.fsdp_config.version=1"),
        r"training.fsdp_config.version=1 flattens weights, .* Set it to 2",
    ),
    "DeepSpeed of accelerate alone": (DEEPSPEED, (), r"DeepSpeed in accelerate's configuration is not checked"),
    "layers recomputed twice": (
        FSDP | {"FSDP_ACTIVATION_CHECKPOINTING": "true"},
        (FP32, "training.activation_checkpointing=true"),
        r"fsdp_activation_checkpointing, .* three times",
    ),
    "compiled": ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, (FP32,), r"dynamo_backend: inductor"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_contradiction_is_one_line(arguments, case):
    environment, overrides, message = FAULTS[case]
    with pytest.raises(RecipeError, match=message) as raised:
        arguments(environment, *overrides)
    assert "\n" not in str(raised.value)


AGREE = {
    "no launcher": ({}, (FP32,), "no"),
    "the defaults of accelerate": (
        {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"},
        ("model.torch_dtype=bfloat16",),
        "bf16",
    ),
    "FSDP2 of accelerate": (FSDP, (FP32,), "no"),
    "bf16 twice": (BF16, ("model.torch_dtype=bfloat16",), "bf16"),
    "bf16 over float32 weights": (BF16, (FP32, "training.bf16=true"), "bf16"),
}


@pytest.mark.parametrize("case", AGREE)
def test_what_agrees_trains_in_the_precision_of_the_recipe(arguments, case):
    environment, overrides, precision = AGREE[case]
    assert arguments(environment, *overrides).mixed_precision == precision


def test_without_the_check_the_variable_would_win(tiny_dir, tmp_path, monkeypatch):
    """Guards against vacuity: transformers takes the launcher's precision where both flags are false."""
    from transformers import TrainingArguments

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, bf16=False, fp16=False)
    assert args.mixed_precision == "bf16"


def test_an_earlier_run_that_compiled_is_no_configuration_of_accelerate(arguments, monkeypatch):
    """Before accelerate 1.2, transformers sets the launcher's variable itself; the next recipe must not find it."""
    from qwenvl_ft.training import arguments as module

    class Setting(module.TrainingArguments):
        def __post_init__(self):
            super().__post_init__()
            if self.torch_compile:
                os.environ["ACCELERATE_DYNAMO_BACKEND"] = self.torch_compile_backend

    monkeypatch.setattr(module, "TrainingArguments", Setting)
    monkeypatch.delenv("ACCELERATE_DYNAMO_BACKEND", raising=False)
    assert arguments({}, FP32, "training.torch_compile=true").torch_compile
    assert not arguments({}, FP32).torch_compile
    compiled = {"ACCELERATE_DYNAMO_BACKEND": "EAGER"}
    assert arguments(compiled, FP32, "training.torch_compile=true").torch_compile
    assert os.environ["ACCELERATE_DYNAMO_BACKEND"] == "EAGER", "the launcher's own variable is kept"
