#!/usr/bin/env bash
# LoRA on the mixture of experts, eight GPUs.   NGPU=8 recipes/sft_30a3b_lora.sh data.train=my.jsonl --lora_rank 64
set -euo pipefail
accelerate launch --num_processes "${NGPU:-8}" -m qwenvl_ft.train recipe=lora_30b_a3b "$@"
