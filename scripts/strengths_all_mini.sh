#!/usr/bin/env bash
# EWC's and PGP's settings on all eight tasks of CoIN-mini, measured on the development split: those that the first four
# tasks choose (strengths_mini.sh) hold so firmly that what comes late is hardly learnt.
#
#   bash scripts/strengths_all_mini.sh [--seeds 0] [--out DIR]      runs that are done are not repeated
source "$(dirname "$0")/env.sh"
exec python -m eval.reproduce strengths_all --mini --split dev --out docs/results/strengths_all "$@"
