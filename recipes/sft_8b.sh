#!/usr/bin/env bash
# Full fine-tuning of 8B on one node.   NGPU=8 recipes/sft_8b.sh data.train=my.jsonl training.learning_rate=5e-6
set -euo pipefail
accelerate launch --num_processes "${NGPU:-8}" -m qwenvl_ft.train recipe=sft_8b "$@"
