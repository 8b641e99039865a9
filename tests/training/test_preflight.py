"""Faults that transformers would find late are found first: before data are read, and before anything is written."""

import json
import os
import subprocess
import sys

import pytest
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.recipe.load import load_recipe
from qwenvl_ft.train import main
from qwenvl_ft.training.deepspeed import deepspeed_config, hierarchical
from qwenvl_ft.training.preflight import preflight
from qwenvl_ft.training.prepare import prepare_run
from qwenvl_ft.training.trackers import set_tracker_variables

TENSORBOARD = "training.report_to=tensorboard"


def settings(tiny_dir, folder, *more):
    """Settings of a run whose data do not exist, which is the error if no check before fails."""
    return [
        f"model.model={tiny_dir}",
        "model.torch_dtype=float32",
        "training.use_cpu=true",
        "training.report_to=none",
        f"training.output_dir={folder / 'run'}",
        f"data.train={folder / 'nothing.jsonl'}",
        *more,
    ]


REFUSED = {
    "a file for a folder": (["training.output_dir=/dev/null"], "training.output_dir=/dev/null: /dev/null is a file."),
    "a folder in a file": (
        ["training.output_dir=/dev/null/a"],
        "training.output_dir=/dev/null/a: /dev/null is a file.",
    ),
    "an optimizer that is not installed": (
        ["training.optim=adamw_torch_npu_fused"],
        "training.optim=adamw_torch_npu_fused cannot be built: ValueError: Trainer failed to import",
    ),
    "an option that is no pair": (
        ["training.optim_args=momentum"],
        "training.optim_args='momentum' is not key=value,key=value. Example: momentum=0.9.",
    ),
    "an option that the optimizer has not": (
        ["training.optim=adamw_torch", "training.optim_args=momentum=0.9"],
        "training.optim_args='momentum=0.9': training.optim=adamw_torch has no 'momentum'. Remove it.",
    ),
    "an option of the wrong type": (
        ["training.optim=sgd", "training.optim_args=momentum=fast"],
        "training.optim=sgd with optim_args='momentum=fast' cannot be built: ValueError: could not convert",
    ),
    "an option out of its limits": (
        ["training.optim=sgd", "training.optim_args=momentum=-1"],
        "training.optim=sgd with optim_args='momentum=-1' cannot be built: ValueError: Invalid momentum value: -1.0",
    ),
    "an unknown option of the schedule": (
        ["training.lr_scheduler_kwargs.num_cycle=2"],
        'training.lr_scheduler_type=cosine with lr_scheduler_kwargs={"num_cycle": 2} cannot be built: TypeError',
    ),
    "a schedule without what it needs": (
        ["training.lr_scheduler_type=warmup_stable_decay"],
        "training.lr_scheduler_type=warmup_stable_decay cannot be built: ",
    ),
    "a floor that is no number": (
        ["training.lr_scheduler_type=cosine_with_min_lr", "training.lr_scheduler_kwargs.min_lr=low"],
        "training.lr_scheduler_kwargs.min_lr='low' is not a number. Example: 1e-6.",
    ),
    "a floor, and more": (
        [
            "training.lr_scheduler_type=cosine_with_min_lr",
            "training.lr_scheduler_kwargs.min_lr=1e-6",
            "training.lr_scheduler_kwargs.num_cycles=2",
        ],
        "training.lr_scheduler_kwargs.num_cycles has no effect with min_lr",
    ),
    "a tracker that is not installed": (
        ["training.report_to=[tensorboard,neptune]"],
        "training.report_to=neptune: its package is not installed. Install it, or choose another tracker: none, ",
    ),
    "a tracker that does not know us": (
        ["training.report_to=wandb"],
        "training.report_to=wandb: there is no API key. Log in with wandb login, set WANDB_API_KEY, or log to a folder",
    ),
    "kernels that are not installed": (
        ["training.use_liger_kernel=true"],
        "training.use_liger_kernel=true",
    ),
    "a compiler that is not here": (
        ["training.torch_compile_backend=hpu_backend"],
        "training.torch_compile=true with hpu_backend cannot compile on this machine: Invalid backend",
    ),
    "shards for one process": (
        ["training.fsdp=full_shard"],
        "training.fsdp=full_shard shards the model over processes, but there is only one.",
    ),
    "rows shared by more processes than run": (
        ["training.sequence_parallel_size=2"],
        "training.sequence_parallel_size=2 lets 2 processes share each row, but the run has 1. Start a multiple of 2 ",
    ),
    "rows shared by processes that have no head each": (
        ["training.sequence_parallel_size=3"],
        "training.sequence_parallel_size=3 does not divide the model's 4 attention heads. Set one of 1, 2, 4.",
    ),
    "a misspelt way of sharding": (["training.fsdp=full_shrad"], "training: Unknown `fsdp` option: full_shrad"),
    "a backend that this torch has not": (["training.ddp_backend=cncl"], "training.ddp_backend=cncl is not part of"),
    "a hub out of reach": (
        ["training.push_to_hub=true"],
        "training.push_to_hub=true, but the hub denies access: ",
    ),
    "a file that is not there": (
        ["training.fsdp=full_shard", "training.fsdp_config=no.json"],
        "training: [Errno 2] No such file or directory: 'no.json'",
    ),
    "an attention that cannot run here": (["model.attn_impl=flash_attention_2"], "model.attn_impl=flash_attention_2 "),
    "a scaling that is none": (["model.rope_scaling=yarm"], "unknown type of model.rope_scaling 'yarm'."),
    "an unknown key of a scaling": (
        ["model.rope_scaling.type=yarn", "model.rope_scaling.facto=2"],
        "model.rope_scaling of type yarn: unknown key 'facto'.",
    ),
    "a module that is none": (
        ["model.device_map.model.visul=cpu"],
        "model.device_map names 'model.visul', which is not a module. Did you mean 'model.visual'?",
    ),
    "a device that is not here": (["model.device_map=cuda:64"], "model.device_map places 'all' on 'cuda:64', but this"),
    "a size that is none": (["model.device_map=cpu", "model.max_memory.cpu=lots"], "model.max_memory gives 'cpu' the"),
    "a layer to adapt that is none": (["tuner.target_modules=[q_prj]"], "tuner.target_modules names 'q_prj', which is"),
    "layers to adapt that are frozen": (
        ["tuner.target_regex=.*visual.*qkv"],
        "tuner.target_regex '.*visual.*qkv' matches only modules of vision, which the recipe freezes.",
    ),
    "a module to train in full that is none": (
        ["tuner.train_type=full", "tuner.modules_to_save=[model.visual.mergr]"],
        "tuner.modules_to_save names 'model.visual.mergr', which is not a module of the model.",
    ),
    "a start that is none": (["tuner.init_weights=pisa"], "unknown tuner.init_weights 'pisa'. Did you mean 'pissa'?"),
    "a rank for what is not adapted": (
        ["tuner.rank_pattern={qkv: 4}"],
        "tuner.rank_pattern names 'qkv', but no adap",
    ),
    "experts that are none": (
        ["tuner.target_parameters=[experts.down]"],
        "tuner.target_parameters names 'experts.down'",
    ),
    "a width that no block divides": (
        ["tuner.train_type=boft", "tuner.boft_block_size=7"],
        "tuner.train_type=boft: model.language_model.layers.0.self_attn.q_proj is 64 wide, which tuner.boft_block_",
    ),
    "a field that a method does not have": (
        ["tuner.train_type=oft", "tuner.peft_options={blocks: 4}"],
        "tuner.peft_options.blocks: tuner.train_type=oft has no such field.",
    ),
    "layers to cut that are none": (
        ["tuner.train_type=adalora", "tuner.target_modules=[q_prj]"],
        "tuner.target_modules names 'q_prj', which is",
    ),
    "an MLP to follow that is none": (
        ["tuner.train_type=adapter", "tuner.target_modules=[mpl]"],
        "tuner.target_modules 'mpl' matches no MLP that a bottleneck could follow.",
    ),
    "layers to edit that are none": (
        ["tuner.train_type=reft", "tuner.reft_layers=[9]"],
        "tuner.reft_layers=[9]: the language model has layers 0 to ",
    ),
    "a module to train beside new blocks that is none": (
        ["tuner.train_type=llamapro", "tuner.modules_to_save=[model.visual.mergr]"],
        "tuner.modules_to_save names 'model.visual.mergr', which is not a module of the model.",
    ),
    "a weight to freeze that is none": (
        ["tuner.train_type=full", "tuner.freeze_parameters=[model.layers.9]"],
        "tuner.freeze_parameters names 'model.layers.9', but no weight's name begins with it.",
    ),
    "the wrong family": (["model.model_type=qwen2_vl"], "model.model_type=qwen2_vl, but config.json of "),
    "rows beyond the model's positions": (
        ["template.max_length=32769"],
        "template.max_length=32769 exceeds the 32768 positions (max_position_embeddings) of ",
    ),
    "rows beyond the positions that dynamic leaves alone": (
        ["template.max_length=32769", "model.rope_scaling=dynamic"],
        "template.max_length=32769 exceeds the 32768 positions (max_position_embeddings) of ",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_one_line_before_data_are_read_and_nothing_is_written(name, tiny_dir, tmp_path, capsys, monkeypatch):
    for variable in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path.parent))  # no .netrc
    overrides, expected = REFUSED[name]
    assert main(settings(tiny_dir, tmp_path, *overrides)) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {expected}"), error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.soak
@pytest.mark.slow
def test_a_cpu_without_a_compiler_for_cpp_is_one_line(tiny_dir, tmp_path):
    words = [sys.executable, "-m", "qwenvl_ft.train", *settings(tiny_dir, tmp_path, "training.torch_compile=true")]
    env = os.environ | {"CXX": "/none", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path.parent / "inductor")}
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, env=env, check=False)
    assert done.returncode == 2
    error = done.stderr.splitlines()[-1]
    expected = "error: training.torch_compile=true with inductor cannot compile on this machine: InvalidCxxCompiler: "
    assert error.startswith(expected)
    assert "apt-get install g++" in error
    assert list(tmp_path.iterdir()) == []


TAKEN = {
    "nothing of the kind": [],
    "what an optimizer has": ["training.optim=sgd", "training.optim_args=momentum=0,nesterov=false"],
    "what a schedule needs": [
        "training.lr_scheduler_type=warmup_stable_decay",
        "training.lr_scheduler_kwargs.num_decay_steps=1000",
    ],
    "a floor that YAML reads as a text": [
        "training.lr_scheduler_type=cosine_with_min_lr",
        "training.lr_scheduler_kwargs.min_lr=1e-6",
    ],
    "a backend that one process has no use for": ["training.ddp_backend=gloo"],
    "positions stretched over the row": ["template.max_length=65536", "model.rope_scaling=yarn"],
    "positions that stretch beyond the row only": ["template.max_length=32768", "model.rope_scaling=dynamic"],
}


@pytest.mark.parametrize("name", TAKEN)
def test_what_is_right_comes_as_far_as_the_data(name, tiny_dir, tmp_path, capsys):
    assert main(settings(tiny_dir, tmp_path, *TAKEN[name])) == 2
    assert "nothing.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize("section", ["optimizer", "scheduler"])
def test_deepspeed_leaves_optimizer_and_schedule_to_the_recipe(section, tmp_path):
    config = {"zero_optimization": {"stage": 2}, "gradient_clipping": "auto"}
    assert deepspeed_config(config) == config
    path = tmp_path / "zero.json"
    path.write_text(json.dumps(config | {section: {"type": "AdamW"}}))
    with pytest.raises(RecipeError, match=rf'has its own "{section}"\. Remove it: training\.'):
        deepspeed_config(str(path))
    path.write_text("[1]")
    with pytest.raises(RecipeError, match=r"\[1\] is not a mapping"):
        deepspeed_config(str(path))


def test_logging_dir_is_the_folder_of_tensorboard(tiny_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "elsewhere")
    prepare_run(load_recipe(None, settings(tiny_dir, tmp_path)))
    assert os.environ["TENSORBOARD_LOGGING_DIR"] == "elsewhere"
    prepare_run(
        load_recipe(None, settings(tiny_dir, tmp_path, f"training.logging_dir={tmp_path / 'logs'}", TENSORBOARD))
    )
    from transformers.integrations import TensorBoardCallback

    callback = TensorBoardCallback()
    assert callback.logging_dir == str(tmp_path / "logs")


def test_only_trackers_in_report_to_get_their_environment_variables(tiny_dir, tmp_path, monkeypatch):
    variables = {"WANDB_PROJECT": "scans", "WANDB_ENTITY": "clinic", "SWANLAB_API_KEY": "secret"}
    for variable in variables:
        monkeypatch.delenv(variable, raising=False)
    words = ["training.wandb_project=scans", "training.wandb_entity=clinic", "training.swanlab_token=secret"]
    prepare_run(load_recipe(None, settings(tiny_dir, tmp_path)))
    assert not variables.keys() & os.environ.keys(), "vacuous: something is set where nothing is read"
    recipe = load_recipe(None, settings(tiny_dir, tmp_path, *words, "training.report_to=[wandb,swanlab]"))
    set_tracker_variables(recipe.training, ["wandb", "swanlab"])
    assert {name: os.environ[name] for name in variables} == variables
    assert "secret" not in recipe.to_yaml()
    with pytest.raises(RecipeError, match=r"wandb_project='scans' is not read with training\.report_to=tensorboard\."):
        load_recipe(None, settings(tiny_dir, tmp_path, words[0], TENSORBOARD))
    with pytest.raises(RecipeError, match=r"training\.swanlab_token is not read with"):
        load_recipe(None, settings(tiny_dir, tmp_path, words[2], TENSORBOARD))
    with pytest.raises(RecipeError, match=r"training\.swanlab_token is only read by swanlab"):
        set_tracker_variables(recipe.training, ["wandb"])


def test_a_second_copy_of_sharded_weights_reaches_deepspeed_with_zero_3_only():
    section = load_recipe(None, ["deepspeed.zero_hpz_partition_size=8", "deepspeed.enabled=true"]).deepspeed
    config = deepspeed_config("zero3")
    filled = hierarchical(config, section)
    assert filled["zero_optimization"] == config["zero_optimization"] | {"zero_hpz_partition_size": 8}
    read = {key: value for key, value in filled["zero_optimization"].items() if value != "auto"}
    assert DeepSpeedZeroConfig(**read).zero_hpz_partition_size == 8
    with pytest.raises(RecipeError, match=r"zero_hpz_partition_size=8 is for weights .* the stage is 2"):
        hierarchical(deepspeed_config("zero2"), section)


def test_one_process_with_several_gpus_or_a_locked_folder_is_refused(tiny_dir, tmp_path, monkeypatch):
    recipe = load_recipe(None, settings(tiny_dir, tmp_path))
    args = prepare_run(recipe)
    with monkeypatch.context() as patched:
        patched.setattr(args, "_n_gpu", 2)
        with pytest.raises(RecipeError, match=r"one process sees 2 GPUs\. Launch one per GPU"):
            preflight(recipe, args)
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # root may write everywhere
    with pytest.raises(RecipeError, match=rf"{tmp_path} cannot be written to\."):
        preflight(recipe, args)
