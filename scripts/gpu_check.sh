#!/usr/bin/env bash
# Checks this build on a machine with a GPU in eight minutes: scripts/gpu_check.py says what, and the flags.
source "$(dirname "$0")/env.sh"
exec python -m scripts.gpu_check "$@"
