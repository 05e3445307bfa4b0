#!/usr/bin/env bash
# The first version's headline, coin6: LoRA against LLaCA without grouping. The paper's numbers stand beside ours.
#
#   bash scripts/reproduce_abstract.sh [--mini] [--seeds 0 1 2] [--out DIR]      runs that are done are not repeated
source "$(dirname "$0")/env.sh"
exec python -m eval.reproduce abstract "$@"
