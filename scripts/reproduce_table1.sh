#!/usr/bin/env bash
# Table 1: LLaVA-7B, all methods. The paper's numbers stand beside ours.
#
#   bash scripts/reproduce_table1.sh [--mini] [--seeds 0 1 2] [--out DIR]      runs that are done are not repeated
source "$(dirname "$0")/env.sh"
exec python -m eval.reproduce table1 "$@"
