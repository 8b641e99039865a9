#!/usr/bin/env bash
# Qwen3-VL comes in 2B, 4B, 8B and 32B (dense) and 30B-A3B and 235B-A22B (MoE): there is no 7B. This script runs 8B.
set -euo pipefail
echo "There is no Qwen3-VL-7B; the nearest is 8B. Running recipes/sft_8b.sh." >&2
exec "$(dirname "$0")/sft_8b.sh" "$@"
