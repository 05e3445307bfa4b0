#!/usr/bin/env bash
# A table or figure of the paper, or a study of our own (studies/studies.yaml): trains what is missing, evaluates, and
# sets the paper's numbers beside ours.
#
#   bash scripts/reproduce.sh NAME [--mini] [--seeds 0 1 2] [--out DIR]      runs that are done are not repeated
#   bash scripts/reproduce.sh --help                                         the names, and every option
source "$(dirname "$0")/env.sh"
exec python -m studies.reproduce "$@"
