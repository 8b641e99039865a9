"""Errors that stop a run (settings, records, memory, a loss that is not finite) are one line with the cause."""

from types import SimpleNamespace

import pytest
import torch
from run_cases import run_settings, write_records

from qwenvl_ft import train as train_function
from qwenvl_ft.errors import TrainingError
from qwenvl_ft.recipe.load import load_recipe
from qwenvl_ft.train import main
from qwenvl_ft.training.out_of_memory import remedies
from qwenvl_ft.training.trainer import QwenVLTrainer


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_records(tmp_path_factory.mktemp("run_data"))


def test_a_full_device_is_one_line_with_what_this_run_has_left_to_try(tiny_dir, data, tmp_path, monkeypatch, capsys):
    step = QwenVLTrainer.training_step

    def full(self, *arguments, **more):
        if self.state.global_step == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. Much more of it.")
        return step(self, *arguments, **more)

    monkeypatch.setattr(QwenVLTrainer, "training_step", full)
    more = ("training.gradient_accumulation_steps=3", "training.per_device_train_batch_size=2")
    assert main([*run_settings(tiny_dir, data, tmp_path, *more), "model.attn_impl=sdpa"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == (
        "error: out of memory after step 2: CUDA out of memory. Tried to allocate 2 GiB. Try, in this order: "
        "training.activation_checkpointing=true; "
        "training.per_device_train_batch_size=1 training.gradient_accumulation_steps=6, the same batch; "
        "model.attn_impl=auto; a lower template.max_pixels; training.optim=adamw_8bit; tuner.train_type=lora; "
        "deepspeed.enabled=true deepspeed.config=zero3_offload."
    )


def test_memory_is_first_saved_where_it_costs_least():
    recipe = load_recipe("lora_4b", ["training.gradient_accumulation_steps=4"])
    args = SimpleNamespace(**recipe.training.arguments, world_size=2)
    share = "training.sequence_parallel_size=2 training.gradient_accumulation_steps=8, the same batch"
    assert remedies(recipe, args) == [
        share,
        "template.max_length=2048",
        "a lower template.max_pixels",
        "deepspeed.enabled=true deepspeed.config=zero3",
        "quantization.quantization_bit=4",
        "training.activation_checkpointing_kwargs.offload=true",
        "deepspeed.enabled=true deepspeed.config=zero3_offload",
    ]
    offload = "training.activation_checkpointing_kwargs.offload=true"
    words = [
        offload,
        "training.optim=adamw_8bit",
        "template.max_length=2048",
        "deepspeed.enabled=true",
        "deepspeed.config=zero3_offload",
    ]
    shared = [*words, "training.sequence_parallel_size=2"]
    assert remedies(load_recipe("sft_4b", shared), args) == ["a lower template.max_pixels", "tuner.train_type=lora"]
    for refused in (["tuner.train_type=longlora"], ["training.padding_free=false", "training.packing=false"]):
        assert share not in remedies(load_recipe("lora_4b", refused), args), "two processes cannot share its rows"


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_records(tiny_dir, data, tmp_path):
    """The embedding of a token that only record r4 has gives NaN."""
    from qwenvl_ft import assemble

    recipe = load_recipe(None, run_settings(tiny_dir, data, tmp_path, "training.packing=false"))
    tokens = lambda i: set(assemble.build_processor(recipe).tokenizer(f"it is {i} ")["input_ids"])  # noqa: E731
    (token,) = tokens(4) - tokens(5)
    build = assemble.build_model

    def poisoned(recipe, args, train_set):
        model = build(recipe, args, train_set)

        def spoil(module, inputs, output):
            return torch.where((inputs[0] == token)[..., None], float("nan"), output)

        model.get_input_embeddings().register_forward_hook(spoil)
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assemble, "build_model", poisoned)
        with pytest.raises(
            TrainingError, match=r"step \d+: the loss is nan in the row of .*train\.jsonl:5 \(id 'r4'\)\."
        ):
            train_function(recipe)


WRONG = {
    "model.model=": "model.model is not set",
    "model.model=/no/such/model": "/no/such/model",
    "data.train=": "data.train is not set",
    "data.train=nowhere.jsonl": "do not find nowhere.jsonl",
    "data.train=flare_x": "do not find flare_x",
    "training.learning_rate=abc": "training.learning_rate: 'abc' is not a number",
    "template.max_length=-5": "template.max_length: -5 must be above 0",
    "tuner.lora_rnk=8": "Did you mean 'lora_rank'?",
    "tunner.lora_rank=8": "Did you mean 'tuner'?",
    "training.lerning_rate=1": "Did you mean 'learning_rate'?",
    "tuner.train_type=lorra": "Did you mean 'lora'?",
    "training.lr_scheduler_type=cosin": "Did you mean 'cosine'?",
    "training.optim=adamw_torc": "Did you mean 'adamw_torch'?",
    "recipe=lora_5b": "Did you mean 'lora_4b'?",
    "recipe=no/such.yaml": "there is no such file",
    "--lora_rnak 8": "unknown flag --lora_rnak. Did you mean --lora_rank?|Did you mean 'lora_rank'?",
    "hello": "neither section.key=value nor a flag",
    "training.save_strategy=best training.eval_strategy=no": "needs evaluations",
    "training.save_strategy=best data.val=null": "Set data.val",
    "template.max_pixels=1048576": "lets one image take 1024 tokens",
    "training.padding_free=false": "Set training.packing=false",
    "model.torch_dtype=bfloat16 training.bf16=false": "would keep trainable weights in 16 bits",
    "training.do_train=false": "training.do_train=false cannot be honoured",
    "training.do_eval=false": "Set eval_strategy=no",
    "training.output_dir=/proc/run": "/proc cannot be written to",
    "model.attn_impl=flash": "is not one of the choices",
    "model.attn_impl=flash_attn": "model.attn_impl=flash_attention_2 cannot be used",
    "tuner.train_type=lora tuner.target_modules=[q_porj]": "q_porj",
    "tuner.freeze_llm=true tuner.freeze_vit=true tuner.freeze_aligner=true": "freeze",
    "training.resume_from_checkpoint=/no/checkpoint-1": "no such folder",
    "deepspeed.enabled=true deepspeed.config=zero9": "Did you mean 'zero",
    "data.train=a%x": "must be a positive percentage",
    "training.remove_unused_columns=true": "cannot be honoured",
}
"""Overrides -> part of the message; ``|`` separates alternatives."""


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_setting_is_one_line_exit_code_2_and_nothing_written(
    tiny_dir, data, tmp_path, capsys, words, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    output = tmp_path / "out"
    assert main([*run_settings(tiny_dir, data, output), *words.split()]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert any(part in errors[0] for part in WRONG[words].split("|")), errors[0]
    assert not output.exists()
    assert not list(tmp_path.iterdir())


BAD_RECORDS = {
    "not JSON": ('{"image": ', "train.jsonl:2: not valid JSON"),
    "no format": ('{"prompt": "x"}', "train.jsonl:2: no format has the keys prompt"),
    "an image that is not there": (
        '{"image": "none.png", "messages": [{"role": "user", "content": "<image>"}]}',
        "none.png does not exist",
    ),
    "more tags than images": (
        '{"conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}]}',
        "more <image> tags than media",
    ),
    "a role that is not one": ('{"conversations": [{"from": "narrator", "value": "x"}]}', "has from='narrator'"),
    "a control token": (
        '{"messages": [{"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": "x"}]}',
        "control token <|im_end|>",
    ),
    "a corrupt image": (
        '{"image": "broken.png", "messages": [{"role": "user", "content": "<image>"}]}',
        "broken.png is not an image",
    ),
}


@pytest.mark.parametrize("case", BAD_RECORDS)
def test_a_bad_record_is_one_line_that_names_it(tiny_dir, data, tmp_path, capsys, case):
    record, message = BAD_RECORDS[case]
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "broken.png").write_text("no image")
    good = '{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}'
    (folder / "train.jsonl").write_text(f"{good}\n{record}\n")
    output = tmp_path / "out"
    assert main([*run_settings(tiny_dir, data, output), f"data.train={folder / 'train.jsonl'}"]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in error
    assert "train.jsonl" in error
    assert not output.exists()
