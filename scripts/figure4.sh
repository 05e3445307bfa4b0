#!/usr/bin/env bash
# Accuracy on every task over the stages, LoRA and LLaCA: accuracy_over_stages.png, accuracy_matrices.png.
#
#   bash scripts/figure4.sh [--mini] [--seeds 0 1 2] [--out DIR]      runs that are done are not repeated
source "$(dirname "$0")/env.sh"
exec python -m eval.reproduce figure4 "$@"
