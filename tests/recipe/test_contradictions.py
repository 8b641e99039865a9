"""Settings that contradict each other, or that training would not read, are errors that name the key to change."""

import json

import pytest

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.recipe.load import load_recipe
from qwenvl_ft.recipe.refused import FIXED
from qwenvl_ft.recipe.values import shown

CONTRADICTIONS = {
    "training.train_sampling_strategy=sequential cannot be honoured: the rows of each epoch are planned from "
    "sample lengths. Use random or group_by_length.": ["training.train_sampling_strategy=sequential"],
    "template.max_pixels=1048576 lets one image take 1024 tokens, but template.max_length=512. Lower the first or "
    "raise the second.": ["template.max_pixels=1048576", "template.max_length=512"],
    "template.min_pixels=2000 is above template.max_pixels=1000. Lower the first.": [
        "template.min_pixels=2000",
        "template.max_pixels=1000",
    ],
    "tuner.freeze_llm, freeze_vit and freeze_aligner are all true, so nothing would train. Set one of them to false.": [
        "tuner.freeze_llm=true"
    ],
    "training.pack_dataset_break_mode=break would cut samples, and images with them. Use no_break_longest_only.": [
        "training.pack_dataset_break_mode=break"
    ],
    "training.padding_free=false pads each sample to a row of its own. Set training.packing=false too.": [
        "training.padding_free=false"
    ],
    "tuner.train_type=adalora ranks weights by their gradients, which deepspeed does not keep. Remove deepspeed "
    "(accelerate launch runs several processes without it), or set tuner.train_type=lora.": [
        "tuner.train_type=adalora",
        "deepspeed.enabled=true",
    ],
    "training.sequence_parallel_size=2 shares packed or joined rows, but training.padding_free=false pads them. Remove "
    "one.": ["training.sequence_parallel_size=2", "training.padding_free=false"],
    "training.include_num_input_tokens_seen=all counts a row on each process, so training.sequence_parallel_size=2 "
    "would multiply it by 2. Remove it; tokens_per_second counts each row once.": [
        "training.sequence_parallel_size=2",
        "training.include_num_input_tokens_seen=all",
    ],
    "tuner.train_type=longlora shifts groups of tokens within a row, which training.sequence_parallel_size=2 would "
    "divide between processes. Set tuner.train_type=lora.": [
        "training.sequence_parallel_size=2",
        "tuner.train_type=longlora",
    ],
    "tuner.reft_positions=f1+l1 counts the tokens of a prompt, which training.sequence_parallel_size=2 may divide "
    "between processes. Set tuner.reft_positions=all.": [
        "training.sequence_parallel_size=2",
        "tuner.train_type=reft",
    ],
    "training.load_best_model_at_end=true needs an evaluation set. Set data.val.": [
        "training.load_best_model_at_end=true"
    ],
    "training.save_strategy=best needs evaluations. Set training.eval_strategy=steps and training.eval_steps.": [
        "training.save_strategy=best",
        "data.val=v.jsonl",
        "training.eval_strategy=no",
    ],
    "training.early_stopping_patience needs an evaluation set. Set data.val.": ["training.early_stopping_patience=2"],
    "training.eval_strategy=steps needs an evaluation set. Set data.val.": ["training.eval_strategy=steps"],
    "evaluation.run_after_training=true needs records to answer. Set evaluation.data or data.val.": [
        "evaluation.run_after_training=true"
    ],
    "training.load_best_model_at_end=true needs a checkpoint at each evaluation, but training.save_strategy=epoch and "
    "training.eval_strategy=steps. Make them equal, or set training.save_strategy=best.": [
        "training.load_best_model_at_end=true",
        "training.save_strategy=epoch",
        "data.val=v.jsonl",
    ],
    "training.load_best_model_at_end=true needs checkpoints at evaluations, but training.save_steps=50 is not a "
    "multiple of training.eval_steps=20. Change one of them.": [
        "training.load_best_model_at_end=true",
        "training.save_steps=50",
        "training.eval_steps=20",
        "data.val=v.jsonl",
    ],
    "training.eval_on_start=true needs an evaluation set. Set data.val.": ["training.eval_on_start=true"],
    "training.do_eval=true needs an evaluation set. Set data.val.": ["training.do_eval=true"],
    "template.max_length=9000 exceeds model.max_model_len=8999. Lower the first or raise the second, or set both by "
    "global_max_length.": ["template.max_length=9000", "model.max_model_len=8999"],
    "training.activation_checkpointing_kwargs.use_reentrant=true gives no gradient to weights that follow frozen "
    "ones, such as adapters in the vision tower. Set it to false.": [
        "training.gradient_checkpointing_kwargs.use_reentrant=true"
    ],
    "training.activation_checkpointing_kwargs: unknown key 'every_n_layer'. Did you mean 'every_n_layers'? Known: "
    "determinism_check, early_stop, every_n_layers, offload, preserve_rng_state, use_reentrant.": [
        "training.activation_checkpointing_kwargs.every_n_layer=2"
    ],
    "training.fsdp_config: unknown key 'fsdp_versions'. Did you mean 'version'? Known: activation_checkpointing, "
    "auto_wrap_policy, backward_prefetch, cpu_offload, cpu_ram_efficient_loading, forward_prefetch, limit_all_gathers, "
    "min_num_params, reshard_after_forward, state_dict_type, sync_module_states, transformer_layer_cls_to_wrap, "
    "use_orig_params, version.": ["training.fsdp_config.fsdp_versions=2", "training.fsdp=full_shard"],
    "training.greater_is_better=true would keep the checkpoint with the highest eval_loss, which is the worst. Remove "
    "training.greater_is_better.": [
        "training.greater_is_better=true",
        "training.load_best_model_at_end=true",
    ],
    "training.activation_checkpointing_kwargs='x' is not a mapping. Example: {every_n_layers: 2}.": [
        "training.activation_checkpointing_kwargs=x"
    ],
    "training.activation_checkpointing_kwargs.every_n_layers=0 is not a whole number above 0. Example: 2.": [
        "training.activation_checkpointing_kwargs.every_n_layers=0"
    ],
    "training.activation_checkpointing_kwargs.offload='maybe' is not true or false.": [
        "training.activation_checkpointing_kwargs.offload=maybe"
    ],
    "training.torch_compile_mode=max-autotune records one CUDA graph per row length, and almost every row has a "
    "different length. Use max-autotune-no-cudagraphs.": ["training.torch_compile_mode=max-autotune"],
    "training.torch_compile=true and training.use_liger_kernel=true both fuse the same operations. Keep one.": [
        "training.torch_compile=true",
        "training.use_liger_kernel=true",
    ],
    "training.torch_compile_backend=cudagraphs records one CUDA graph per row length, and almost every row has a "
    "different length. Remove it.": ["training.torch_compile_backend=cudagraphs"],
    "training.output_dir is empty. Name a folder: training.output_dir=output.": ["training.output_dir="],
}


@pytest.mark.parametrize("expected", CONTRADICTIONS)
def test_contradicting_settings_are_an_error_and_each_alone_is_not(expected):
    overrides = CONTRADICTIONS[expected]
    assert message_of(overrides) == expected
    for left_out in range(len(overrides)):
        assert message_of(overrides[:left_out] + overrides[left_out + 1 :]) != expected, "not needed for the error"


OTHERWISE = {
    "ignore_data_skip": True,
    "accelerator_config": {"split_batches": True},
    "eval_accumulation_steps": 4,
    "length_column_name": "size",
    "label_names": ["words"],
    "include_for_metrics": ["inputs"],
}
"""Field with only one valid value -> another value, if that is not the negation."""


@pytest.mark.parametrize("name", FIXED)
def test_a_field_without_effect_accepts_only_its_one_value(name):
    only, why = FIXED[name]
    other = OTHERWISE[name] if name in OTHERWISE else not only
    message = message_of([f"training.{name}={word(other)}"])
    assert message == f"override: training.{name}={shown(other)} cannot be honoured: {why}. Remove the key."
    assert message_of([f"training.{name}={word(only)}"]) is None


def word(value):
    """Return a value as it is typed on the command line."""
    return value if isinstance(value, str) else json.dumps(value)


def test_overriding_train_type_drops_the_base_recipe_s_keys_for_the_old_method(write):
    """The saved result can be loaded again. Keys set after train_type that it does not read are an error."""
    base = write("base.yaml", "tuner: {train_type: lora, lora_rank: 64, use_dora: true, target_modules: [q_proj]}")
    recipe = load_recipe(base, ["tuner.train_type=full"])
    assert (recipe.tuner.lora_rank, recipe.tuner.use_dora, recipe.tuner.target_modules) == (8, False, ["all-linear"])
    recipe.save(base.with_name("saved.yaml"))
    assert load_recipe(base.with_name("saved.yaml")) == recipe
    full = write("full.yaml", "tuner: {train_type: full}")
    after = write("after.yaml", "extends: full.yaml\ntuner: {lora_rank: 64}")
    assert load_recipe(full).tuner.lora_rank == 8
    with pytest.raises(RecipeError, match=r"tuner\.lora_rank=64 is not read with"):
        load_recipe(after)


def test_max_model_len_lowers_the_default_max_length():
    assert load_recipe(None, ["model.max_model_len=4096"]).template.max_length == 4096
    assert load_recipe(None, ["model.max_model_len=40960"]).template.max_length == 8192


def message_of(overrides):
    try:
        load_recipe(None, overrides)
    except RecipeError as error:
        return str(error)
    return None
