#!/usr/bin/env bash
# A recipe on chosen GPUs: one by python, several by torchrun.   recipes/train.sh config=mine.yaml gpus=0,1
#
# `config` (or `recipe`: a file or a name) and `gpus` can be variables of the environment too; `gpus=` is the CPU.
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
