#!/usr/bin/env bash
# The balance weight over the steps and how often it fell back: beta_over_steps.png.
#
#   bash scripts/figure5.sh [--mini] [--seeds 0 1 2] [--out DIR]      runs that are done are not repeated
source "$(dirname "$0")/env.sh"
exec python -m eval.reproduce figure5 "$@"
