#!/usr/bin/env bash
# LoRA on Qwen3-VL-4B, one or more GPUs.   NGPU=1 recipes/lora_4b.sh data.train=my.jsonl training.learning_rate=5e-5
set -euo pipefail
accelerate launch --num_processes "${NGPU:-1}" -m qwenvl_ft.train recipe=lora_4b "$@"
