#!/usr/bin/env bash
# A job for Slurm: one torchrun per node.   sbatch --nodes 4 recipes/slurm.sh recipe=sft_8b data.train=my.jsonl
#
# Submit it in the folder that holds recipes/; everything else is passed to the run. GPUs per node: --gpus-per-node. A
# job that Slurm starts again (requeue) resumes from the last checkpoint. docs/many_machines.md explains the settings.
#SBATCH --job-name=qwenvl_ft
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --output=%x-%j.log
set -euo pipefail
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${MASTER_ADDR:-${nodes%%$'\n'*}}
export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
export NNODES=$SLURM_JOB_NUM_NODES
export NPROC_PER_NODE=${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}}
folder=${SLURM_SUBMIT_DIR:-$PWD}/recipes
# shellcheck disable=SC2016 # SLURM_NODEID is known on each node only
exec srun --kill-on-bad-exit=1 bash -c 'NODE_RANK=$SLURM_NODEID exec "$0" "$@"' "$folder/launch.sh" "$@"
