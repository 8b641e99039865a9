#!/usr/bin/env bash
# Full fine-tuning of 8B on one node.   NGPU=8 recipes/sft_8b.sh data.train=my.jsonl training.learning_rate=5e-6
set -euo pipefail
NPROC_PER_NODE=${NPROC_PER_NODE:-${NGPU:-8}} exec "$(dirname "$0")/launch.sh" recipe=sft_8b "$@"
