"""Runs over several nodes: hybrid sharding, nodes without a common disk, and restarts by the launcher."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from run_cases import short_run, write_questions
from safetensors.torch import load_file
from transformers import PreTrainedModel

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.recipe.load import load_recipe
from qwenvl_ft.training.hybrid_sharding import mesh_sizes, require_data_parallel
from qwenvl_ft.training.preflight import require_saving_on_each_node

TESTS = Path(__file__).resolve().parent
RECIPES = TESTS.parents[1] / "recipes"
HSDP = ["training.fsdp=full_shard", "training.fsdp_config.version=2", "training.parallelism_config.dp_shard_size=2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("machines_data")
    return write_questions(folder, 8, widths=(64, 96, 128), longest=4, text_every=2)


def settings(checkpoint, data, output, ranks, *more):
    """Four steps over all eight samples each, so that every number of ranks trains the same."""
    return short_run(
        checkpoint,
        data,
        output,
        "template.max_length=256",
        "tuner.train_type=full",
        "training.packing=false",
        "training.per_device_train_batch_size=1",
        f"training.gradient_accumulation_steps={8 // ranks}",
        "training.max_steps=4",
        "training.learning_rate=1e-3",
        "training.max_grad_norm=0.5",
        "training.logging_steps=1",
        *more,
    )


def watched(ranks, arguments, *options, **variables):
    """Run `watched_run` on some ranks of one node; ``options`` are torchrun's."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *options]
    command = [sys.executable, *launcher, str(TESTS / "watched_run.py"), *arguments]
    env = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-1000:]
    return done


def alone(arguments):
    done = subprocess.run([sys.executable, "-m", "qwenvl_ft.train", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def weights(output):
    return load_file(output / "model.safetensors")


def farthest(one, other):
    return max(float((one[name] - other[name]).abs().max()) for name in one.keys() & other.keys())


# -- hybrid sharding -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "ranks", "expected"),
    [
        ({"dp_shard_size": 8}, 32, (4, 8)),
        ({"dp_replicate_size": 2}, 16, (2, 8)),
        ({"dp_replicate_size": 2, "dp_shard_size": 2}, 4, (2, 2)),
        ({"dp_shard_size": 8}, 8, (1, 8)),
    ],
)
def test_the_size_that_is_not_given_follows_from_the_number_of_ranks(sizes, ranks, expected):
    found = mesh_sizes(sizes, ranks)
    assert (found["dp_replicate_size"], found["dp_shard_size"]) == expected


@pytest.mark.parametrize(
    ("sizes", "ranks", "message"),
    [
        ({"dp_shard_size": 8}, 12, r"has dp_shard_size=8, but the run has 12 ranks: .* Set dp_shard_size to"),
        (
            {"dp_replicate_size": 2, "dp_shard_size": 4},
            16,
            r"has dp_replicate_size=2, dp_shard_size=4, but .* 16 ranks",
        ),
        (
            {"dp_replicate_size": 4},
            4,
            r"has dp_replicate_size=4 on 4 ranks: each would hold a whole copy, which is DDP",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, ranks, message):
    with pytest.raises(RecipeError, match=rf"training\.parallelism_config {message}"):
        mesh_sizes(sizes, ranks)


@pytest.mark.parametrize(
    ("name", "kind", "instead"),
    [
        ("TP", "tensor", "training.fsdp=full_shard"),
        ("CP", "context", "training.sequence_parallel_size"),
        ("SP", "sequence", "training.sequence_parallel_size"),
    ],
)
def test_parallelism_that_accelerates_launcher_asks_for_is_refused(monkeypatch, name, kind, instead):
    require_data_parallel()
    monkeypatch.setenv(f"PARALLELISM_CONFIG_{name}_SIZE", "2")
    require_data_parallel()  # without the first variable accelerate ignores it
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    message = rf"accelerate's {kind} parallelism \(PARALLELISM_CONFIG_{name}_SIZE=2\) .*{instead}"
    with pytest.raises(RecipeError, match=message):
        require_data_parallel()


@pytest.mark.soak
@pytest.mark.distributed
@pytest.mark.timeout(1800)
def test_two_copies_over_two_ranks_each_train_the_weights_of_one_process(tiny_dir, data, tmp_path):
    """And the run that is resumed from their checkpoint ends with the same bits."""
    alone(settings(tiny_dir, data, tmp_path / "one", 1, "training.save_strategy=no"))
    halves = settings(tiny_dir, data, tmp_path / "four", 4, "training.save_strategy=steps", "training.save_steps=2")
    watched(4, [*halves, *HSDP])
    expected, begin = weights(tmp_path / "one"), weights(tiny_dir)
    assert farthest(weights(tmp_path / "four"), expected) <= 1e-6
    assert farthest(expected, begin) > 1e-3, "vacuous: nothing moved"
    ranks = [json.loads((tmp_path / f"four/sharding-{rank}.json").read_text()) for rank in range(4)]
    assert all(mesh == [2, 2] for rank in ranks for mesh, _, _ in rank.values())
    whole = sum(size for _, _, size in ranks[0].values())
    shares = [sum(own for _, own, _ in rank.values()) / whole for rank in ranks]
    assert shares == pytest.approx([1 / 2] * 4, abs=0.01), "a quarter each would be sharded over all four"
    finished = weights(tmp_path / "four")
    resumed = tmp_path / "resumed"
    shutil.copytree(tmp_path / "four/checkpoint-2", resumed / "checkpoint-2")
    more = settings(tiny_dir, data, resumed, 4, "training.save_strategy=no", "training.resume_from_checkpoint=true")
    watched(4, [*more, *HSDP])
    again = weights(resumed)
    assert all(torch.equal(finished[name], again[name]) for name in finished)


# -- restarts ------------------------------------------------------------------------------------------------------


def restarted_run(ranks, tiny_dir, data, tmp_path):
    """Run quietly, and with one rank killed at step 3 of 4; return both folders and the output of the second."""
    often = ("training.save_strategy=steps", "training.save_steps=2")
    watched(ranks, settings(tiny_dir, data, tmp_path / "quiet", ranks, *often))
    killed = settings(tiny_dir, data, tmp_path / "killed", ranks, *often)
    done = watched(ranks, killed, "--max_restarts=1", KILLED_AT="3")
    return tmp_path / "quiet", tmp_path / "killed", done


def assert_resumed(quiet, killed, done):
    assert f"resuming from {killed / 'checkpoint-2'}" in done.stdout
    steps = [json.loads(line)["step"] for line in (killed / "trainer_log.jsonl").read_text().splitlines()]
    assert [step for step in steps if step <= 3] in ([1, 2, 3, 3], [1, 2, 3]), "step 3 is trained again, no other"
    expected, actual = weights(quiet), weights(killed)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


@pytest.mark.soak
@pytest.mark.slow
def test_a_run_that_torchrun_restarts_goes_on_from_its_last_checkpoint_by_itself(tiny_dir, data, tmp_path):
    assert_resumed(*restarted_run(1, tiny_dir, data, tmp_path))


@pytest.mark.soak
@pytest.mark.distributed
@pytest.mark.timeout(1800)
def test_two_ranks_of_which_one_is_killed_end_with_the_weights_of_a_quiet_run(tiny_dir, data, tmp_path):
    assert_resumed(*restarted_run(2, tiny_dir, data, tmp_path))


# -- nodes without a common disk -----------------------------------------------------------------------------------


def on_two_nodes(tmp_path, tiny_dir, data, *more):
    """Run launch.sh on two nodes of one rank, each with its own working folder, data, caches and output.

    Returns the exit codes, and all that both have printed.
    """
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    port = str(20000 + os.getpid() % 20000)
    nodes = {"NNODES": "2", "NPROC_PER_NODE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    running = []
    for number in range(2):
        node = tmp_path / f"node{number}"
        if not node.exists():
            shutil.copytree(data.parent, node / "data")
        arguments = settings(tiny_dir, "data/train.jsonl", "out", 2, "training.save_strategy=steps", *more)
        own = {"NODE_RANK": str(number), "HF_DATASETS_CACHE": str(node / "cache"), "OMP_NUM_THREADS": "1"}
        command = [RECIPES / "launch.sh", *arguments, "training.save_steps=2"]
        env = os.environ | nodes | own | {"PATH": path}
        running.append(subprocess.Popen(command, cwd=node, env=env, stdout=-1, stderr=-2, text=True))
    printed = [process.communicate(timeout=1200)[0] for process in running]
    return [process.returncode for process in running], "\n".join(printed)


def written(folder):
    """Return the files below a folder, without hashes, dates and numbers of shards."""
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return {re.sub(r"-[0-9a-f]{32}|events\..*", "-*", name) for name in names}


FINAL = {"model.safetensors", "config.json", "recipe.yaml", "training.log", "trainer_log.jsonl", "trainer_state.json"}
CHECKPOINT = {"model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json", "plan.json", "recipe.yaml"}


@pytest.mark.soak
@pytest.mark.distributed
@pytest.mark.timeout(1800)
def test_nodes_with_disks_of_their_own_train_the_same_and_write_what_the_guide_says(tiny_dir, data, tmp_path):
    """Then the second node has no checkpoint to resume from, until the first one's is copied to it."""
    codes, printed = on_two_nodes(tmp_path, tiny_dir, data)
    assert codes == [0, 0], printed[-3000:]
    alone(settings(tiny_dir, data, tmp_path / "one", 1, "training.save_strategy=no"))
    first, second = (tmp_path / node for node in ("node0", "node1"))
    assert farthest(weights(first / "out"), weights(tmp_path / "one")) <= 1e-6
    for node in (first, second):
        assert {"cache/qwenvl_ft/lengths-*.npz", "cache/qwenvl_ft/records-*.arrow"} <= written(node), "its own"
    assert {f"checkpoint-4/{name}" for name in (*CHECKPOINT, "rng_state_0.pth")} | FINAL <= written(first / "out")
    own = {f"checkpoint-{step}/{name}" for step in (2, 4) for name in ("rng_state_1.pth", "manifest.json")}
    assert written(second / "out") == own | {"manifest.json"}
    for name in ("model.safetensors", "trainer_state.json"):
        (first / "out" / name).unlink()
    shutil.rmtree(first / "out/checkpoint-4")
    codes, printed = on_two_nodes(tmp_path, tiny_dir, data, "training.resume_from_checkpoint=true")
    assert 0 not in codes
    assert "checkpoint-2 is complete for rank 0, but for rank 1: it holds no trainer_state.json" in printed
    shutil.copytree(first / "out/checkpoint-2", second / "out/checkpoint-2", dirs_exist_ok=True)
    codes, printed = on_two_nodes(tmp_path, tiny_dir, data, "training.resume_from_checkpoint=true")
    assert codes == [0, 0], printed[-3000:]
    assert farthest(weights(first / "out"), weights(tmp_path / "one")) <= 1e-6


def test_the_model_is_not_saved_on_each_node_where_transformers_writes_it_on_one(tiny_dir, tmp_path, monkeypatch):
    """transformers 5.24 ignores the setting for whole models: the other nodes would get checkpoints without weights."""
    args = SimpleNamespace(save_on_each_node=True, world_size=4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    full, lora = (load_recipe(None, [f"tuner.train_type={kind}"]) for kind in ("full", "lora"))
    monkeypatch.setattr(PreTrainedModel, "should_save_on_this_rank", None, raising=False)
    with pytest.raises(RecipeError, match=r"training\.save_on_each_node=true: transformers .* on rank 0 only"):
        require_saving_on_each_node(full, args)
    require_saving_on_each_node(lora, args)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    require_saving_on_each_node(full, args)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.delattr(PreTrainedModel, "should_save_on_this_rank")
    if not hasattr(PreTrainedModel, "should_save_on_this_rank"):  # it may be inherited
        require_saving_on_each_node(full, args)
