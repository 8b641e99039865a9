#!/usr/bin/env bash
# Demo: write the digits data set and a tiny random checkpoint, train, and evaluate.
#
#   [FAMILY=qwen3_5] examples/digits/demo.sh [PYTHON] [FOLDER] [section.key=value ...]      (make demo)
set -euo pipefail
python=${1:-python}
folder=${2:-.demo}
family=${FAMILY:-qwen3_vl}
tiny=$folder/tiny$([ "$family" = qwen3_vl ] || echo "-$family")
shift $(($# < 2 ? $# : 2))

"$python" examples/digits/make_digits.py "$folder/digits"
[ -e "$tiny/processor_config.json" ] || "$python" -m qwenvl_ft.cli.main tiny "$tiny" --family "$family"

# One thread for the model and the other cores for the dataloader: layers this small are slower on several threads.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
rm -rf "$folder/run"
begin=$(date +%s)
"$python" -m accelerate.commands.launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
    -m qwenvl_ft.train recipe=digits model.model="$tiny" \
    data.train="$folder/digits/train.jsonl" data.val="$folder/digits/val.jsonl" training.output_dir="$folder/run" "$@"
echo "training and evaluation took $(($(date +%s) - begin)) s"
echo "ask it: $(dirname "$python")/qwenvl-ft infer --model $folder/run" \
    "--image $folder/digits/images/1500.png --prompt 'Which digit is this?'"
