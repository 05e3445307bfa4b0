#!/usr/bin/env bash
# torch 2.13.0 on Python 3.11.7: torchrun refuses a line for an option that stands behind the script and is the script's.
#
# What follows the script is passed on to it, and so it is with --name, also with --tee, which torchrun has itself. But
# argparse looks at all words of the line before it gives the rest away, and ends with status 2 where one abbreviates two
# options of torchrun: --run fits --run-path and --run_path, --log and --no and --max fit several. (Each option with two
# words is there twice, so every beginning of it is ambiguous.) `--` in front of the script helps.
#
# Seen: error: ambiguous option: --run could match --run-path, --run_path
# Needs: python3 (3.11), the network for pip (about 3 GB with CUDA's torch).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy
cd "$work"
echo 'import sys; print(sys.argv[1:])' > job.py
torchrun() { (OMP_NUM_THREADS=1 "$work/venv/bin/python" -m torch.distributed.run --standalone "$@" 2>&1 || true) | tail -1; }
for option in --run --log --no --max; do
    said=$(torchrun job.py $option a)
    echo "$said"
    [[ $said == *"error: ambiguous option: $option could match "* ]]
done
[ "$(torchrun job.py --name a)" = "['--name', 'a']" ]
[ "$(torchrun job.py --tee a)" = "['--tee', 'a']" ]
[ "$(torchrun -- job.py --run a)" = "['--run', 'a']" ]
