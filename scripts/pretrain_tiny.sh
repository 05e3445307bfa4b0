#!/usr/bin/env bash
# Makes a tiny base model anew, from random weights, and probes what it can do: about an hour on two cores of a CPU
# with AVX512-BF16 (two to three times as long without; --no-bf16 is then faster).
#
#   bash scripts/pretrain_tiny.sh --out DIR [--family llava|qwen2_5_vl|qwen3_vl|t5] [--seed N] [--no-bf16]
#       [--phases NAME ... [--start-from DIR]]     one after the other: the shipped T5s are one before and one after first
source "$(dirname "$0")/env.sh"
torchrun --nproc-per-node 2 -m scripts.pretrain_tiny "$@"
out=
while [ $# -gt 0 ]; do
    case $1 in --out) out=$2 ;; --out=*) out=${1#--out=} ;; esac
    shift
done
python -m scripts.probe_tiny --base "$out" --json "$out/skills.json"
