"""launch.sh and slurm.sh: what torchrun is given on one node and on several."""

import os
import subprocess
from pathlib import Path

import pytest

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
VARIABLES = (
    "NGPU",
    "NPROC_PER_NODE",
    "NNODES",
    "NODE_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "MAX_RESTARTS",
    "SLURM_JOB_ID",
)


def stand_in(folder, name, body):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{body}\n")
    (folder / name).chmod(0o755)


def launch(tmp_path, script="launch.sh", arguments=("recipe=lora_4b", "a=b c"), **variables):
    """Run a script with a stand-in for torchrun that prints its arguments."""
    stand_in(tmp_path / "bin", "torchrun", 'printf "%s\\n" "$@"')
    env = {name: value for name, value in os.environ.items() if name not in VARIABLES} | variables
    env["PATH"] = f"{tmp_path / 'bin'}:{env['PATH']}"
    return subprocess.run([RECIPES / script, *arguments], env=env, capture_output=True, text=True, check=False)


RUN = ["-m", "qwenvl_ft.train", "recipe=lora_4b", "a=b c"]
TWO = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "NPROC_PER_NODE": "8"}


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({}, "--nproc_per_node 1 --standalone"),
        ({"NGPU": "4"}, "--nproc_per_node 4 --standalone"),
        ({"NGPU": "4", "NPROC_PER_NODE": "2", "NNODES": "1"}, "--nproc_per_node 2 --standalone"),
        ({"MASTER_PORT": "1234"}, "--nproc_per_node 1 --master_port 1234"),
        ({"MAX_RESTARTS": "3"}, "--nproc_per_node 1 --standalone --max_restarts 3"),
        (TWO, "--nproc_per_node 8 --nnodes 2 --node_rank 1 --master_addr 10.0.0.1 --master_port 29500"),
        (
            TWO | {"MAX_RESTARTS": "3", "MASTER_PORT": "7"},
            "--nproc_per_node 8 --nnodes 2 --rdzv_backend c10d --rdzv_endpoint 10.0.0.1:7 --rdzv_id qwenvl_ft "
            "--max_restarts 3",
        ),
    ],
)
def test_the_variables_reach_torchrun(variables, words, tmp_path):
    done = launch(tmp_path, **variables)
    assert done.stdout.splitlines() == [*words.split(), *RUN], done.stderr


@pytest.mark.parametrize("missing", ["MASTER_ADDR", "NODE_RANK"])
def test_a_variable_that_several_nodes_need_is_asked_for(missing, tmp_path):
    done = launch(tmp_path, **{name: value for name, value in TWO.items() if name != missing})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: NNODES=2 needs {missing}, ")


def test_the_7b_script_runs_on_several_nodes_too(tmp_path):
    done = launch(tmp_path, "sft_7b.sh", ["data.train=x"], **TWO)
    assert done.stdout.split()[2:6] == ["--nnodes", "2", "--node_rank", "1"]


def test_a_slurm_job_starts_one_torchrun_on_each_node(tmp_path):
    """With stand-ins for scontrol, which lists the nodes, and srun, which runs its command on each of them."""
    stand_in(tmp_path / "bin", "scontrol", "echo node-7; echo node-8")
    stand_in(tmp_path / "bin", "srun", 'shift; for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done')
    job = {"SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "node-[7-8]", "SLURM_JOB_NUM_NODES": "2"}
    job |= {"SLURM_GPUS_ON_NODE": "4", "SLURM_SUBMIT_DIR": str(RECIPES.parent)}
    done = launch(tmp_path, "slurm.sh", **job)
    nodes = [
        [*f"--nproc_per_node 4 --nnodes 2 --node_rank {rank} --master_addr node-7 --master_port 20041".split(), *RUN]
        for rank in (0, 1)
    ]
    assert done.stdout.splitlines() == nodes[0] + nodes[1], done.stderr
