#!/usr/bin/env bash
# LoRA on Qwen3-VL-30B-A3B (MoE), eight GPUs.   NGPU=8 recipes/sft_30a3b_lora.sh data.train=my.jsonl --lora_rank 64
set -euo pipefail
accelerate launch --num_processes "${NGPU:-8}" -m qwenvl_ft.train recipe=lora_30b_a3b "$@"
