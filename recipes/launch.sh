#!/usr/bin/env bash
# Start a recipe on the GPUs of this node, alone or as one of several nodes; the sft_*.sh and lora_*.sh scripts call it.
#
#   NPROC_PER_NODE=8 recipes/launch.sh recipe=sft_8b data.train=my.jsonl
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 recipes/launch.sh recipe=sft_8b data.train=my.jsonl    # NODE_RANK=1 there
#
# Environment variables: NPROC_PER_NODE (or NGPU; 1), NNODES (1), NODE_RANK, MASTER_ADDR, MASTER_PORT (29500), and
# MAX_RESTARTS (0): how often torchrun starts all processes again after one has failed. With restarts the nodes meet at
# MASTER_ADDR and need no NODE_RANK. docs/many_machines.md explains them.
set -euo pipefail
fail() {
    echo "error: $1" >&2
    exit 2
}
port=${MASTER_PORT:-29500}
words=(--nproc_per_node "${NPROC_PER_NODE:-${NGPU:-1}}")
restarts=${MAX_RESTARTS:-0}
if [ "${NNODES:-1}" = 1 ]; then
    if [ -n "${MASTER_PORT:-}" ]; then words+=(--master_port "$port"); else words+=(--standalone); fi
else
    [ -n "${MASTER_ADDR:-}" ] || fail "NNODES=$NNODES needs MASTER_ADDR, the address of one of the nodes."
    if [ "$restarts" = 0 ]; then
        [ -n "${NODE_RANK:-}" ] || fail "NNODES=$NNODES needs NODE_RANK, the number of this node: 0 at MASTER_ADDR."
        words+=(--nnodes "$NNODES" --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR" --master_port "$port")
    else
        words+=(--nnodes "$NNODES" --rdzv_backend c10d --rdzv_endpoint "$MASTER_ADDR:$port")
        words+=(--rdzv_id "${SLURM_JOB_ID:-qwenvl_ft}")
    fi
fi
[ "$restarts" = 0 ] || words+=(--max_restarts "$restarts")
exec torchrun "${words[@]}" -m qwenvl_ft.train "$@"
