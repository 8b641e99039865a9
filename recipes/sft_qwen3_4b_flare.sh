#!/usr/bin/env bash
# Qwen3-VL-4B on FLARE25, from where converted_data is.   NPROC_PER_NODE=4 batch_size=2 recipes/sft_qwen3_4b_flare.sh
# Variables: datasets, batch_size, grad_accum_steps, lr, output_dir. Everything else: section.key=value or --flag value.
set -euo pipefail
own=()
[ -z "${datasets:-}" ] || own+=("data.train=$datasets")
[ -z "${batch_size:-}" ] || own+=("training.per_device_train_batch_size=$batch_size")
[ -z "${grad_accum_steps:-}" ] || own+=("training.gradient_accumulation_steps=$grad_accum_steps")
[ -z "${lr:-}" ] || own+=("training.learning_rate=$lr")
[ -z "${output_dir:-}" ] || own+=("training.output_dir=$output_dir")
accelerate launch --num_processes "${NPROC_PER_NODE:-${NGPU:-1}}" -m qwenvl_ft.train recipe=flare25 "${own[@]}" "$@"
