#!/usr/bin/env bash
# Table 3's methods; Qwen-VL itself is no LLaVA, so only with --mini. The paper's numbers stand beside ours.
#
#   bash scripts/reproduce_table3.sh --mini [--seeds 0 1 2] [--out DIR]      runs that are done are not repeated
source "$(dirname "$0")/env.sh"
exec python -m eval.reproduce table3 "$@"
