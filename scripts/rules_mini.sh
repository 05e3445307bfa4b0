#!/usr/bin/env bash
# What each rule of the balance weight does at CoIN-mini's size, measured on the development split: the mini recipe's
# default is chosen here.
#
#   bash scripts/rules_mini.sh [OUT] [SEEDS] [RULES]      default: docs/results/rules "0", all rules below
#
# All runs use grouping. The first three stages found groups, so no average runs in them: they are trained once a seed.
# eq45_norm_ones, eq45_elem and eq14_elem leave (0, 1) at every step at this size: they are fixed-0.99.
source "$(dirname "$0")/env.sh"
out=${1:-docs/results/rules}
seeds=${2:-0}
jobs=${JOBS:-$(nproc)}
rules="
eq45                --average eq45
eq14                --average eq14
lcia_release        --average lcia_release
lcia_release-0.2    --average lcia_release --constant 0.2
lcia_release-0.1    --average lcia_release --constant 0.1
lcia_release-0.05   --average lcia_release --constant 0.05
next_release        --average next_release
secant-1            --average secant --horizon 1
secant-2            --average secant --horizon 2
fixed-0.99          --average fixed --beta 0.99
fixed-0.995         --average fixed --beta 0.995
"
python -m data.mini.build
only=${3:-$(sed '/^$/d' <<<"$rules" | awk '{print $1}')}
rules=$(awk -v only=" $(tr '\n' ' ' <<<"$only") " 'NF && index(only, " " $1 " ")' <<<"$rules")
lines=$(for seed in $seeds; do
    sed '/^$/d' <<<"$rules" | while read -r name flags; do echo "$flags --seed $seed --run rule-$name-seed$seed"; done
done)
names=$(sed 's/.*--run //' <<<"$lines")
for seed in $seeds; do
    common=runs/lora-grouping-seed$seed
    python -m llaca.train --method lora --grouping true --seed "$seed" --run "$(basename "$common")"
    for name in $(grep -- "-seed$seed$" <<<"$names"); do
        [ -d "runs/$name/stages" ] && continue
        rm -rf "runs/$name.copy"
        mkdir -p "runs/$name.copy/stages"
        cp -r "$common"/stages/0[123]-* "runs/$name.copy/stages/"
        mv "runs/$name.copy" "runs/$name"
    done
done
xargs -P "$jobs" -I{} sh -c 'python -m llaca.train --method llaca {}' <<<"$lines"
names="$names $(for seed in $seeds; do echo "lora-grouping-seed$seed"; done)"
printf '%s\n' $names | xargs -P "$jobs" -I{} sh -c 'python -m eval.report --split dev --run {} --out runs/{}/tables-dev >runs/{}/eval-dev.log'
# shellcheck disable=SC2086
python -m eval.report --split dev --run $names --out "$out"
