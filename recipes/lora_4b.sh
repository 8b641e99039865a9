#!/usr/bin/env bash
# LoRA on Qwen3-VL-4B, one or more GPUs.   NGPU=1 recipes/lora_4b.sh data.train=my.jsonl training.learning_rate=5e-5
set -euo pipefail
NPROC_PER_NODE=${NPROC_PER_NODE:-${NGPU:-1}} exec "$(dirname "$0")/launch.sh" recipe=lora_4b "$@"
