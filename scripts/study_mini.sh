#!/usr/bin/env bash
# The study of docs/results: seven policies on CoIN-mini with several seeds, as many runs at a time as there are cores.
#
#   bash scripts/study_mini.sh [OUT] [SEEDS]      default: docs/results/mini "0 1 2"
#
# Runs that are done are not repeated. Prints the table and writes it, the runs' facts and the figures into OUT.
source "$(dirname "$0")/env.sh"
out=${1:-docs/results/mini}
seeds=${2:-0 1 2}
jobs=${JOBS:-$(nproc)}
policies="
zero_shot           --method zero_shot
lora                --method lora
fixed_ema           --method fixed_ema
llaca-no-grouping   --method llaca --grouping false
llaca               --method llaca
lora-grouping       --method lora --grouping true
multi_task          --method multi_task
"
lines=$(for seed in $seeds; do
    sed '/^$/d' <<<"$policies" | while read -r name flags; do echo "$flags --seed $seed --run $name-seed$seed"; done
done)
names=$(sed 's/.*--run //' <<<"$lines")
python -m data.mini.build
xargs -P "$jobs" -I{} sh -c 'python -m llaca.train {}' <<<"$lines"
xargs -P "$jobs" -I{} sh -c 'python -m eval.report --run {} --out runs/{}/tables >runs/{}/eval.log' <<<"$names"
# shellcheck disable=SC2086
python -m eval.report --run $names --out "$out"
