#!/usr/bin/env bash
# Train five steps on a tenth of one data set to test model, data and memory. Nothing is kept.
#
#   recipes/dry_run.sh [section.key=value ...] [--flag value ...]
#
# Environment variables: recipe (flare25), datasets, batch_size, grad_accum_steps, NPROC_PER_NODE.
set -uo pipefail
output_dir=$(mktemp -d "${TMPDIR:-/tmp}/dry_run.XXXXXX")
trap 'rm -rf "$output_dir"' EXIT
line=$(printf '=%.0s' {1..60})
printf '%s\nDRY RUN: %s, 5 steps on %s\n%s\n' "$line" "${recipe:-flare25}" "${datasets:=flare_neojaundice%10}" "$line"
begin=$(date +%s)
TMPDIR="$output_dir" "$(dirname "$0")/launch.sh" recipe="${recipe:-flare25}" \
    data.train="$datasets" training.max_steps=5 training.per_device_train_batch_size="${batch_size:-1}" \
    training.gradient_accumulation_steps="${grad_accum_steps:-2}" training.save_strategy=no training.save_final=false \
    training.eval_strategy=no training.logging_steps=1 training.report_to=none training.output_dir="$output_dir" "$@"
code=$?
steps=$(grep -c '"loss"' "$output_dir/trainer_log.jsonl" 2>/dev/null)
memory=$(grep -o '"peak_memory_gib": [0-9.]*' "$output_dir/trainer_log.jsonl" 2>/dev/null | tail -1 | cut -d' ' -f2)
echo "$line"
if [ "$code" -eq 0 ]; then
    echo "DRY RUN PASSED: ${steps:-0} steps in $(($(date +%s) - begin)) s, every loss finite, peak memory ${memory:-unknown} GiB"
    exit 0
fi
cat <<HINTS
DRY RUN FAILED after ${steps:-0} of 5 steps and $(($(date +%s) - begin)) s (exit code $code)
  do not find ...      the data is not converted, or not in this folder: qwenvl-ft convert flare
  out of memory        --max_pixels 25088, batch_size=1, or deepspeed.config=zero3_offload
  loss not finite      --learning_rate 5e-6, --bf16, --max_grad_norm 0.5
  no such model        model.model=DIRECTORY, or a hub id with network access
HINTS
exit 1
