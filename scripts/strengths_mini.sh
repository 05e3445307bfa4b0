#!/usr/bin/env bash
# The settings of the compared methods on the first four tasks of CoIN-mini, measured on the development split: the mini
# recipe's are chosen here, by Avg.ACC.
#
#   bash scripts/strengths_mini.sh [--seeds 0] [--out DIR]      runs that are done are not repeated
source "$(dirname "$0")/env.sh"
exec python -m eval.reproduce strengths --mini --split dev --out docs/results/strengths "$@"
