#!/usr/bin/env bash
# Run a recipe on chosen GPUs, with python on one and torchrun on several.   recipes/train.sh config=mine.yaml gpus=0,1
#
# `config` (or `recipe`; a file or a name) and `gpus` may also be environment variables; `gpus=` selects the CPU.
# Everything else: section.key=value or --flag value.
set -euo pipefail
gpus=${gpus-0}
chosen=${recipe:-${config:-}}
rest=()
for word in "$@"; do
    case $word in
        config=* | recipe=*) chosen=${word#*=} ;;
        gpus=*) gpus=${word#gpus=} ;;
        *) rest+=("$word") ;;
    esac
done
if [ -z "$chosen" ]; then
    echo "error: name a recipe: recipes/train.sh config=mine.yaml gpus=0" >&2
    exit 2
fi
export CUDA_VISIBLE_DEVICES=$gpus
commas=${gpus//[!,]/}
processes=$((${#commas} + 1))
launcher=(python)
[ "$processes" -eq 1 ] || launcher=(torchrun --nproc_per_node "$processes")
exec "${launcher[@]}" -m qwenvl_ft.train recipe="$chosen" "${rest[@]}"
