#!/usr/bin/env bash
# LoRA on Qwen3-VL-30B-A3B (MoE), eight GPUs.   NGPU=8 recipes/sft_30a3b_lora.sh data.train=my.jsonl --lora_rank 64
set -euo pipefail
NPROC_PER_NODE=${NPROC_PER_NODE:-${NGPU:-8}} exec "$(dirname "$0")/launch.sh" recipe=lora_30b_a3b "$@"
