"""The error for a wrong recipe is one line with file, key, value and fix. The exit code is 2; nothing is written."""

import pytest

from qwenvl_ft.cli.main import main
from qwenvl_ft.errors import RecipeError
from qwenvl_ft.recipe.argv import recipe_from_argv
from qwenvl_ft.recipe.load import load_recipe

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
        "FILE: custom.allow_url: unknown key. Did you mean 'allow_urls'? Known: allow_urls, augmentation, "
        "check_dataset_strategy, dataset_num_proc, datasets, datasets_root, emit_norm, high_bit_depth, "
        "ignored_keys, image_frame, image_timeout, images_per_user_turn, label, label_pattern, loss_weights, "
        "max_bad_fraction, max_image_pixels, max_record_bytes, media_outside_root, media_root, object_order, "
        "object_pattern, on_error, readers, split_dataset_ratio, stream_cache, stream_rounds, stream_window, "
        "streaming, summary_ratio, train, train_dataset_mix_ds, train_dataset_mix_ratio, "
        "train_dataset_sample, val, val_dataset_sample, video_timeout, window.",
    ),
    "a misspelt choice": (
        "template: {truncation_strategy: rihgt}",
        "FILE: template.truncation_strategy: 'rihgt' is not one of the choices. Did you mean 'right'? Known: delete, "
        "left, raise, right.",
    ),
    "a misspelt choice of transformers": (
        "training: {save_strategy: bset}",
        "FILE: training.save_strategy: 'bset' is not one of the choices. Did you mean 'best'? Known: best, epoch, no, "
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
        "FILE: both extends and inherit are set. Keep extends.",
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
    "null for a list or a text": ("data: {train: null}", "FILE: data.train: null is not a value of this key."),
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
        "FILE: template.template: 'llava' is not one of the choices. Known: qwen, qwen2_5_vl, qwen2_vl, qwen3_5, "
        "qwen3_5_moe, qwen3_vl, qwen3_vl_moe.",
    ),
    "a misspelt tracker": (
        "training: {report_to: tensorbord}",
        "FILE: training.report_to: 'tensorbord' is not one of the choices. Did you mean 'tensorboard'? Known: all, "
        "azure_ml, clearml, codecarbon, comet_ml, dagshub, dvclive, flyte, kubeflow, mlflow, neptune, none, swanlab, "
        "tensorboard, trackio, wandb.",
    ),
    "a metric that evaluation does not give": (
        "{data: {val: v.jsonl}, training: {metric_for_best_model: eval_accuracy, save_strategy: best}}",
        "training.metric_for_best_model=eval_accuracy is not computed by evaluation. Known: eval_loss, "
        "eval_perplexity.",
    ),
    "the metric of one of several sets": (
        "{data: {val: {dogs: d.jsonl}}, training: {metric_for_best_model: eval_cats_loss, save_strategy: best}}",
        "training.metric_for_best_model=eval_cats_loss is not computed by evaluation. Did you mean 'eval_dogs_loss'? "
        "Known: eval_dogs_loss, eval_dogs_perplexity, eval_loss, eval_perplexity.",
    ),
    "a backend that is none": (
        "training: {ddp_backend: foo}",
        "FILE: training.ddp_backend: 'foo' is not one of the choices. Known: ccl, cncl, gloo, hccl, mccl, mpi, nccl, "
        "xccl.",
    ),
    "the beginning of an optimizer's name": (
        "training: {optim: adamw}",
        "FILE: training.optim: 'adamw' is not one of the choices. Did you mean 'adamw_torch'? Known: ...",
    ),
    "a line break in a key": (
        'tuner: {"lora\\nrank": 8}',
        "FILE: tuner.lora rank: unknown key. Did you mean 'lora_rank'? Known: ...",
    ),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_a_wrong_file_gives_one_exact_line(name, write, tmp_path):
    text, expected = WRONG_FILES[name]
    path = write("wrong.yaml", text)
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    message = str(error.value)
    expected = expected.replace("FILE", str(path)).replace("FOLDER", str(tmp_path))
    assert message.startswith(expected[:-3]) if expected.endswith("...") else message == expected
    assert "\n" not in message


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
    "model.rope_scaling.type and model.rope_scaling.type.x are both set. Set the whole mapping, or its keys.",
    "recipe=a --config b": "--config=b: 'a' is named already. Name one file; it may extend others.",
    "recipe=lora4b": "there is no recipe 'lora4b'. Did you mean 'lora_4b'? Known: ",
    "recipe=": "recipe= names no recipe. Example: recipe=lora_4b.",
    "extends=lora_4b": "override: extends belongs in a file. On the command line, use base_config=lora_4b.",
    "--save_safetensors True": "--save_safetensors: checkpoints are always safetensors. Remove it.",
    "recipe=no/such.yaml": "recipe no/such.yaml: there is no such file.",
    "--max_steps 5 6": "'6' is neither section.key=value nor a flag. Example: training.learning_rate=1e-5.",
}


@pytest.mark.parametrize("words", WRONG_ARGUMENTS)
def test_a_wrong_command_line_gives_one_exact_line(words):
    with pytest.raises(RecipeError) as error:
        recipe_from_argv(words.split())
    message, expected = str(error.value), WRONG_ARGUMENTS[words]
    assert message.startswith(expected) if expected.endswith("Known: ") else message == expected
    assert "\n" not in message


def test_a_missing_base_that_is_shipped_is_suggested(write):
    path = write("mine.yaml", "extends: lora_4b.yaml")
    with pytest.raises(RecipeError, match=r"Did you mean /\S+/recipes/lora_4b\.yaml\? Paths start at the folder of"):
        load_recipe(path)


@pytest.mark.parametrize("words", ["training.learning_rate=abc", "--no_such_flag 1", "recipe=nope", "data.nope=1"])
def test_the_command_prints_one_line_exits_with_2_and_writes_nothing(words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command in (["train"], ["recipe", "lora_4b"]):
        assert main([*command, *words.split()]) == 2
        said = capsys.readouterr()
        assert said.err.startswith("error: ")
        assert said.err.count("\n") == 1
        assert said.out == ""
    assert list(tmp_path.iterdir()) == []
