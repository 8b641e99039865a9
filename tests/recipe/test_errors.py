"""A wrong recipe is one line that names file, key, value and fix; exit code 2, nothing written."""

import json

import pytest

from qwenvl_ft.cli.main import main
from qwenvl_ft.errors import RecipeError
from qwenvl_ft.recipe.argv import recipe_from_argv
from qwenvl_ft.recipe.load import load_recipe
from qwenvl_ft.recipe.refused import FIXED
from qwenvl_ft.recipe.values import shown

ALL = "docs/reference.md lists all keys."

WRONG_FILES = {
    "a text for a number": (
        "training: {learning_rate: abc}",
        "FILE: training.learning_rate: 'abc' is not a number. Example: 1e-5.",
    ),
    "a text for a number of transformers": (
        "training: {weight_decay: a lot}",
        "FILE: training.weight_decay: 'a lot' is not a number. Example: 1e-5.",
    ),
    "a fraction for a whole number": (
        "tuner: {lora_rank: 8.5}",
        "FILE: tuner.lora_rank: 8.5 is not a whole number. Example: 8.",
    ),
    "a truth value for a number": (
        "tuner: {lora_rank: true}",
        "FILE: tuner.lora_rank: true is not a whole number. Example: 8.",
    ),
    "a word for a truth value": ("training: {bf16: maybe}", "FILE: training.bf16: 'maybe' is not true or false."),
    "a negative size": ("template: {max_length: -1}", "FILE: template.max_length: -1 must be above 0."),
    "a negative size of transformers": (
        "training: {per_device_train_batch_size: -2}",
        "FILE: training.per_device_train_batch_size: -2 must be above 0.",
    ),
    "a share above one": (
        "tuner: {lora_dropout: 1.5}",
        "FILE: tuner.lora_dropout: 1.5 must be at least 0 and below 1.",
    ),
    "not a number at all": (
        "training: {learning_rate: .nan}",
        "FILE: training.learning_rate: NaN is not a finite number.",
    ),
    "null where something has to be": (
        "tuner: {lora_rank: null}",
        "FILE: tuner.lora_rank: null is not a whole number. Example: 8.",
    ),
    "a mapping for a text": ("data: {media_root: {a: b}}", 'FILE: data.media_root: {"a": "b"} is not a text.'),
    "a number for a mapping": (
        "model: {max_memory: 40}",
        'FILE: model.max_memory: 40 is not a mapping. Example: {"key": "value"}.',
    ),
    "brackets that do not match": (
        'model: {max_memory: \'{"0": "40GB"\'}',
        'FILE: model.max_memory: \'{"0": "40GB"\' is not a mapping: its brackets or quotes do not match.',
    ),
    "a misspelt key": (
        "tuner: {lora_rnak: 8}",
        "FILE: tuner.lora_rnak: unknown key. Did you mean 'lora_rank'? Known: adalora_beta1, adalora_beta2, ...",
    ),
    "a misspelt key of transformers": (
        "training: {num_train_epoch: 3}",
        f"FILE: training.num_train_epoch: unknown key. Did you mean 'num_train_epochs'? {ALL}",
    ),
    "a key that resembles nothing": (
        "training: {zzzzqqqq: 3}",
        f"FILE: training.zzzzqqqq: unknown key. {ALL}",
    ),
    "a key under the other name of its section": (
        "custom: {allow_url: true}",
        "FILE: custom.allow_url: unknown key. Did you mean 'allow_urls'? Known: allow_urls, "
        "augmentation, check_dataset_strategy, dataset_num_proc, datasets, emit_norm, image_timeout, "
        "images_per_user_turn, label_pattern, loss_weights, max_bad_fraction, max_image_pixels, media_root, "
        "object_order, object_pattern, on_error, readers, split_dataset_ratio, summary_ratio, train, "
        "train_dataset_mix_ds, train_dataset_mix_ratio, train_dataset_sample, val, val_dataset_sample, video_timeout.",
    ),
    "a misspelt choice": (
        "template: {truncation_strategy: rihgt}",
        "FILE: template.truncation_strategy: 'rihgt' is not a choice here. Did you mean 'right'? Known: delete, left, "
        "raise, right.",
    ),
    "a misspelt choice of transformers": (
        "training: {save_strategy: bset}",
        "FILE: training.save_strategy: 'bset' is not a choice here. Did you mean 'best'? Known: best, epoch, no, "
        "steps.",
    ),
    "an unknown section": (
        "tunner: {lora_rank: 8}",
        "FILE: unknown section 'tunner'. Did you mean 'tuner'? Known: custom, data, deepspeed, evaluation, extends, "
        "global_max_length, inherit, model, phases, prompts, quantization, template, training, tuner.",
    ),
    "a key outside of its section": (
        "lora_rank: 8",
        "FILE: unknown section 'lora_rank'. Did you mean tuner.lora_rank?",
    ),
    "a section that is a word": (
        "model: some/model",
        "FILE: model is 'some/model', but a section is a mapping of keys.",
    ),
    "a list for a recipe": (
        "- a",
        "FILE: a recipe is a mapping of sections: model, quantization, template, data, prompts, tuner, training, "
        "deepspeed, evaluation.",
    ),
    "a number for a recipe": (
        "5",
        "FILE: a recipe is a mapping of sections: model, quantization, template, data, prompts, tuner, training, "
        "deepspeed, evaluation.",
    ),
    "a bracket left open": (
        "tuner:\n  target_modules: [a, b\ntraining: {}",
        "FILE:3: not valid YAML: did not find expected ',' or ']'.",
    ),
    "a tab": ("tuner:\n\tlora_rank: 8", "FILE:2: not valid YAML: found character that cannot start any token."),
    "a key twice": ("tuner: {lora_rank: 1}\ntuner: {}", "FILE:2: not valid YAML: found duplicate key tuner."),
    "a missing base": (
        "extends: nope.yaml",
        "FILE: extends: there is no FOLDER/nope.yaml. Paths start at the folder of wrong.yaml.",
    ),
    "a base that is a number": (
        "extends: 5",
        "FILE: extends: 5 is not a file name. Example: extends: [base.yaml, mine.yaml].",
    ),
    "two words for extends": (
        "extends: a.yaml\ninherit: a.yaml",
        "FILE: both extends and inherit are given. Keep extends.",
    ),
    "a reference to nothing": (
        "training: {vit_lr: '${training.nope}'}",
        "FILE: training.vit_lr: Interpolation key 'training.nope' not found. A literal $ is written \\$.",
    ),
    "a variable that is not set": (
        "data: {train: [a.jsonl, '${oc.env:NO_SUCH_VARIABLE}']}",
        "FILE: data.train[1]: Environment variable 'NO_SUCH_VARIABLE' not found. A literal $ is written \\$.",
    ),
    "a mapping in a list of texts": (
        "data: {train: [a.jsonl, {b: 1}]}",
        'FILE: data.train: ["a.jsonl", {"b": 1}] has an entry {"b": 1} that is not a text.',
    ),
    "a word where each entry is a mapping": (
        "data: {datasets: {a: a.jsonl}}",
        'FILE: data.datasets: {"a": "a.jsonl"} has an entry \'a.jsonl\' that is not a mapping. Example: '
        '{"key": "value"}.',
    ),
    "null for a list or a text": ("data: {train: null}", "FILE: data.train: null is no value here."),
    "a field that transformers dropped": (
        "training: {overwrite_output_dir: true}",
        "FILE: training.overwrite_output_dir: a run writes to output_dir even if files are there. Remove it.",
    ),
    "no folder for the run": ("training: {output_dir: null}", "FILE: training.output_dir: null is not a text."),
    "a number of steps that is none": (
        "training: {warmup_steps: 1.5}",
        "FILE: training.warmup_steps: 1.5 must be a whole number of steps, or a share of all steps from 0 to below 1.",
    ),
    "no steps at all": (
        "training: {max_steps: 0}",
        "FILE: training.max_steps: 0 must be above 0, or -1 for all of num_train_epochs.",
    ),
    "a number that no tensor holds": (
        "training: {max_steps: " + "9" * 400 + "}",
        f"FILE: training.max_steps: {'9' * 400} is too large. The largest is 9223372036854775807.",
    ),
    "the template of another model": (
        "template: {template: llava}",
        "FILE: template.template: 'llava' is not a choice here. Known: qwen, qwen2_5_vl, qwen2_vl, qwen3_vl, "
        "qwen3_vl_moe.",
    ),
    "a misspelt tracker": (
        "training: {report_to: tensorbord}",
        "FILE: training.report_to: 'tensorbord' is not a choice here. Did you mean 'tensorboard'? Known: all, "
        "azure_ml, clearml, codecarbon, comet_ml, dagshub, dvclive, flyte, kubeflow, mlflow, neptune, none, swanlab, "
        "tensorboard, trackio, wandb.",
    ),
    "a metric that evaluation does not give": (
        "training: {metric_for_best_model: eval_accuracy}",
        "training.metric_for_best_model=eval_accuracy is not computed by evaluation. Known: eval_loss, "
        "eval_perplexity.",
    ),
    "the metric of one of several sets": (
        "{data: {val: {dogs: d.jsonl}}, training: {metric_for_best_model: eval_cats_loss}}",
        "training.metric_for_best_model=eval_cats_loss is not computed by evaluation. Did you mean 'eval_dogs_loss'? "
        "Known: eval_dogs_loss, eval_dogs_perplexity, eval_loss, eval_perplexity.",
    ),
    "a backend that is none": (
        "training: {ddp_backend: foo}",
        "FILE: training.ddp_backend: 'foo' is not a choice here. Known: ccl, cncl, gloo, hccl, mccl, mpi, nccl, xccl.",
    ),
    "the beginning of an optimizer's name": (
        "training: {optim: adamw}",
        "FILE: training.optim: 'adamw' is not a choice here. Did you mean 'adamw_torch'? Known: ...",
    ),
    "a line break in a key": (
        'tuner: {"lora\\nrank": 8}',
        "FILE: tuner.lora rank: unknown key. Did you mean 'lora_rank'? Known: ...",
    ),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_a_wrong_file_is_one_exact_line(name, write, tmp_path):
    text, expected = WRONG_FILES[name]
    path = write("wrong.yaml", text)
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    message = str(error.value)
    expected = expected.replace("FILE", str(path)).replace("FOLDER", str(tmp_path))
    assert message.startswith(expected[:-3]) if expected.endswith("...") else message == expected
    assert "\n" not in message


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
    "training.padding_free=false pads each sample to a row of its own. Also set training.packing=false.": [
        "training.padding_free=false"
    ],
    "deepspeed.enabled=true places the model itself. Remove model.device_map.": [
        "deepspeed.enabled=true",
        "model.device_map=auto",
    ],
    "tuner.train_type=adalora ranks weights by their gradients, which deepspeed does not keep. Remove deepspeed "
    "(accelerate launch runs several processes without it), or set tuner.train_type=lora.": [
        "tuner.train_type=adalora",
        "deepspeed.enabled=true",
    ],
    "deepspeed.enabled=true and training.fsdp=full_shard both shard the model. Keep one.": [
        "deepspeed.enabled=true",
        "training.fsdp=full_shard",
    ],
    "training.fsdp=full_shard places the model itself. Remove model.device_map.": [
        "training.fsdp=full_shard",
        "model.device_map=auto",
    ],
    "model.max_memory limits model.device_map, which is not set. Add model.device_map=auto.": [
        'model.max_memory={"0": "40GB"}'
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
    "training.bf16 and training.fp16 are both true. Keep one.": ["training.bf16=true", "training.fp16=true"],
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
    "use_orig_params, version.": ["training.fsdp_config.fsdp_versions=2"],
    "tuner.use_dora=true is not read by tuner.train_type=full. Remove tuner.use_dora, or set tuner.train_type=lora.": [
        "tuner.train_type=full",
        "tuner.use_dora=true",
    ],
    'tuner.target_modules=["q_proj"] is not read by tuner.train_type=reft. Remove tuner.target_modules, or set '
    "tuner.train_type=lora.": ["tuner.train_type=reft", "tuner.target_modules=q_proj"],
    "tuner.reft_rank=2 is not read by tuner.train_type=lora. Remove tuner.reft_rank, or set tuner.train_type=reft.": [
        "tuner.reft_rank=2"
    ],
    'tuner.target_modules=["q_proj"] is not read by tuner.train_type=full. Remove '
    "tuner.target_modules, or set tuner.train_type=lora.": ["tuner.train_type=full", "tuner.target_modules=q_proj"],
    "training.greater_is_better=true would keep the checkpoint with the highest eval_loss, which is the worst. Remove "
    "training.greater_is_better.": [
        "training.greater_is_better=true",
        "training.metric_for_best_model=eval_loss",
    ],
    'training.optim_target_modules=["q_proj"] is read only by GaLore and APOLLO, but training.optim=sgd. Remove it, '
    "or use one of them.": ["training.optim_target_modules=[q_proj]", "training.optim=sgd"],
    "training.hub_model_id='me/mine' is read only with training.push_to_hub. Set it, or remove training."
    "hub_model_id.": ["training.hub_model_id=me/mine"],
    "training.activation_checkpointing_kwargs='x' is not a mapping. Example: {every_n_layers: 2}.": [
        "training.activation_checkpointing_kwargs=x"
    ],
    "training.activation_checkpointing_kwargs.every_n_layers=0 is not a whole number above 0. Example: 2.": [
        "training.activation_checkpointing_kwargs.every_n_layers=0"
    ],
    "training.activation_checkpointing_kwargs.offload='maybe' is not true or false.": [
        "training.activation_checkpointing_kwargs.offload=maybe"
    ],
    "training.torch_compile_mode=max-autotune records one CUDA graph per row length, and almost every row has another "
    "length. Use max-autotune-no-cudagraphs.": ["training.torch_compile_mode=max-autotune"],
    "training.torch_compile=true and training.use_liger_kernel=true both fuse the same operations. Keep one.": [
        "training.torch_compile=true",
        "training.use_liger_kernel=true",
    ],
    "training.torch_compile_backend=cudagraphs records one CUDA graph per row length, and almost every row has another "
    "length. Remove it.": ["training.torch_compile_backend=cudagraphs"],
    "training.output_dir is empty. Give a folder: training.output_dir=output.": ["training.output_dir="],
    "training.lr_scheduler_type=cosine has no min_lr. Set training.lr_scheduler_kwargs=null, or use "
    "cosine_warmup_with_min_lr.": ["training.lr_scheduler_kwargs.min_lr=1e-6"],
}


@pytest.mark.parametrize("expected", CONTRADICTIONS)
def test_settings_that_contradict_each_other_are_refused_and_each_of_them_alone_is_not(expected):
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
"""Field that can have one value only -> another value, where that is not the opposite."""


@pytest.mark.parametrize("name", FIXED)
def test_what_training_would_not_read_is_refused_and_its_only_value_is_taken(name):
    only, why = FIXED[name]
    other = OTHERWISE[name] if name in OTHERWISE else not only
    message = message_of([f"training.{name}={word(other)}"])
    assert message == f"override: training.{name}={shown(other)} cannot be honoured: {why}. Remove the key."
    assert message_of([f"training.{name}={word(only)}"]) is None


def word(value):
    """A value as one types it."""
    return value if isinstance(value, str) else json.dumps(value)


def test_full_over_a_recipe_with_an_adapter_takes_the_adapter_s_keys_with_it(write):
    """The other way round, what follows train_type is an error; what is saved can be read again."""
    base = write("base.yaml", "tuner: {train_type: lora, lora_rank: 64, use_dora: true, target_modules: [q_proj]}")
    recipe = load_recipe(base, ["tuner.train_type=full"])
    assert (recipe.tuner.lora_rank, recipe.tuner.use_dora, recipe.tuner.target_modules) == (8, False, ["all-linear"])
    recipe.save(base.with_name("saved.yaml"))
    assert load_recipe(base.with_name("saved.yaml")) == recipe
    full = write("full.yaml", "tuner: {train_type: full}")
    after = write("after.yaml", "extends: full.yaml\ntuner: {lora_rank: 64}")
    assert load_recipe(full).tuner.lora_rank == 8
    with pytest.raises(RecipeError, match=r"tuner\.lora_rank=64 is not read by"):
        load_recipe(after)


def test_a_shorter_model_shortens_rows_whose_length_nobody_gave():
    assert load_recipe(None, ["model.max_model_len=4096"]).template.max_length == 4096
    assert load_recipe(None, ["model.max_model_len=40960"]).template.max_length == 8192


def message_of(overrides):
    try:
        load_recipe(None, overrides)
    except RecipeError as error:
        return str(error)
    return None


WRONG_ARGUMENTS = {
    "tuner.lora_rank=abc": "override: tuner.lora_rank: 'abc' is not a whole number. Example: 8.",
    "--lora_rank -3": "override: --lora_rank: -3 must be above 0.",
    "--lora_rank abc": "override: --lora_rank: 'abc' is not a whole number. Example: 8.",
    "--tune_mm_llm maybe": "override: --tune_mm_llm: 'maybe' is not true or false.",
    "--learning_rate": "--learning_rate needs a value, as in --learning_rate VALUE.",
    "--lora_rnak 8": f"unknown flag --lora_rnak. Did you mean 'lora_rank'? {ALL}",
    "--galore_rnk 128": f"unknown flag --galore_rnk. Did you mean 'galore_rank'? {ALL}",
    "loras": "'loras' is neither section.key=value nor a flag. Example: training.learning_rate=1e-5.",
    "tuner=full": "override: tuner is a section. Set one of its keys: tuner.key=value.",
    "tunner.lora_rank=8": "override: unknown key 'tunner.lora_rank'. Did you mean 'tuner'? Known: ",
    "model.rope_scaling.type.x=1 model.rope_scaling.type=a model.rope_scaling.type.x=2": "override: "
    "model.rope_scaling.type.x: type is 'a' there, which has no keys.",
    "recipe=a --config b": "--config=b: 'a' is given already. Name one file; it may extend others.",
    "recipe=lora4b": "there is no recipe 'lora4b'. Did you mean 'lora_4b'? Known: ",
    "recipe=": "recipe= names no recipe. Example: recipe=lora_4b.",
    "extends=lora_4b": "override: extends belongs in a file. On the command line, use base_config=lora_4b.",
    "--save_safetensors True": "--save_safetensors: checkpoints are always safetensors. Remove it.",
    "recipe=no/such.yaml": "recipe no/such.yaml: there is no such file.",
    "--max_steps 5 6": "'6' is neither section.key=value nor a flag. Example: training.learning_rate=1e-5.",
}


@pytest.mark.parametrize("words", WRONG_ARGUMENTS)
def test_a_wrong_command_line_is_one_exact_line(words):
    with pytest.raises(RecipeError) as error:
        recipe_from_argv(words.split())
    message, expected = str(error.value), WRONG_ARGUMENTS[words]
    assert message.startswith(expected) if expected.endswith("Known: ") else message == expected
    assert "\n" not in message


def test_a_missing_base_that_is_shipped_is_pointed_out(write):
    path = write("mine.yaml", "extends: lora_4b.yaml")
    with pytest.raises(RecipeError, match=r"Did you mean /\S+/recipes/lora_4b\.yaml\? Paths start at the folder of"):
        load_recipe(path)


@pytest.mark.parametrize("words", ["training.learning_rate=abc", "--no_such_flag 1", "recipe=nope", "data.nope=1"])
def test_the_command_says_it_in_one_line_with_exit_code_2_and_writes_nothing(words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command in (["train"], ["recipe", "lora_4b"]):
        assert main([*command, *words.split()]) == 2
        said = capsys.readouterr()
        assert said.err.startswith("error: ")
        assert said.err.count("\n") == 1
        assert said.out == ""
    assert list(tmp_path.iterdir()) == []
