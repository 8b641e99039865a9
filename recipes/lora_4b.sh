#!/usr/bin/env bash
# LoRA, on one GPU or several.   NGPU=1 recipes/lora_4b.sh data.train=my.jsonl training.learning_rate=5e-5
set -euo pipefail
accelerate launch --num_processes "${NGPU:-1}" -m qwenvl_ft.train recipe=lora_4b "$@"
