#!/usr/bin/env bash
# Qwen3-VL-4B on FLARE25; run beside converted_data.   NPROC_PER_NODE=4 batch_size=2 recipes/sft_qwen3_4b_flare.sh
# Environment variables: datasets, batch_size, grad_accum_steps, lr, output_dir.
# Everything else: section.key=value or --flag value.
set -euo pipefail
extra=()
[ -z "${datasets:-}" ] || extra+=("data.train=$datasets")
[ -z "${batch_size:-}" ] || extra+=("training.per_device_train_batch_size=$batch_size")
[ -z "${grad_accum_steps:-}" ] || extra+=("training.gradient_accumulation_steps=$grad_accum_steps")
[ -z "${lr:-}" ] || extra+=("training.learning_rate=$lr")
[ -z "${output_dir:-}" ] || extra+=("training.output_dir=$output_dir")
exec "$(dirname "$0")/launch.sh" recipe=flare25 "${extra[@]}" "$@"
