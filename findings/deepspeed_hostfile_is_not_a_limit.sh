#!/usr/bin/env bash
# deepspeed 0.19.8: a hostfile says less about where a job runs than its words do.
#
#   1. --num_gpus is "Max number of GPUs to use on each node" in --help. It takes the place of the slots, also of fewer:
#      with `worker.invalid slots=1`, --num_gpus 3 starts three processes.
#   2. A hostfile with one host runs on this machine, whichever host it names (after an ssh to that host has worked);
#      --force_multi is needed to go there.
#
# Seen with torch 2.13.0 on a machine without GPU: the command, which shows both at once, prints the ranks 0, 1, 2 of 3 and
# this machine's name.
# A stand-in for ssh says that the other host answers. Needs: python3, the network for pip (about 3 GB with CUDA's torch).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip=("$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check)
"${pip[@]}" torch==2.13.0 numpy setuptools wheel
"${pip[@]}" --no-build-isolation deepspeed==0.19.8

cd "$work"
mkdir bin
printf '#!/bin/sh\necho 127.0.0.1\n' > bin/ssh
chmod +x bin/ssh
cat > job.py <<'JOB'
import os, platform
open(f"rank-{os.environ['RANK']}", "w").write(f"{os.environ['RANK']} of {os.environ['WORLD_SIZE']} on {platform.node()}\n")
JOB
echo "worker.invalid slots=1" > hosts
export PATH="$work/bin:$PATH" DS_ACCELERATOR=cpu
"$work/venv/bin/python" -m deepspeed.launcher.runner --hostfile hosts --num_gpus 3 --no_local_rank job.py > log 2>&1
cat rank-*
expected=$(for rank in 0 1 2; do echo "$rank of 3 on $(python3 -c 'import platform; print(platform.node())')"; done)
[ "$(cat rank-*)" = "$expected" ]
