#!/usr/bin/env bash
# The study of docs/results/mini: seven policies on CoIN-mini with three seeds.
#
#   bash scripts/study_mini.sh [--seeds 0 1 2] [--out DIR]      runs that are done are not repeated
source "$(dirname "$0")/env.sh"
exec python -m eval.reproduce policies --mini --seeds 0 1 2 --out docs/results/mini "$@"
