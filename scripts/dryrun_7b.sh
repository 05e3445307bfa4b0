#!/usr/bin/env bash
# Two stages of the 7B recipe, two steps each, on random weights: 16 GB of memory, 28 GB of disk below runs/, about 12
# minutes on two cores. What it does and its flags: the head of scripts/dryrun_7b.py.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(nproc)}"
source "$(dirname "$0")/env.sh"
exec python scripts/dryrun_7b.py "$@"
