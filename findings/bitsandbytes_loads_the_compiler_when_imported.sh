#!/usr/bin/env bash
# bitsandbytes 0.50.2, torch 2.13.0: importing bitsandbytes loads torch's compiler, of which it compiles nothing.
#
# torch.compile is known to be lazy: the decorator returns at once, and work begins with the first call. The compilation
# does; the import of torch._inductor does not. bitsandbytes decorates some of its CPU functions, so that `import
# bitsandbytes`, and with it PEFT and transformers' Trainer, which import it where it is installed, brings the compiler
# into every process. Of the two variables that turn torch.compile off, only the older, TORCHDYNAMO_DISABLE=1, spares
# nine tenths of it; with TORCH_COMPILE_DISABLE=1 all of it is loaded all the same.
#
# Seen (modules of torch._inductor after the import):
#   torch alone: 0 | bitsandbytes: 180 | TORCH_COMPILE_DISABLE=1: 180 | TORCHDYNAMO_DISABLE=1: 17
#   after torch.compile(len), not called: 180
# Needs: python3 (3.10 or newer), the network for pip (300 MB: torch for the CPU).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip=("$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check)
"${pip[@]}" torch==2.13.0 numpy==2.4.6 packaging==26.3
"${pip[@]}" --no-deps bitsandbytes==0.50.2
cd "$work"
cat > loaded.py <<'PYTHON'
import sys

import torch

exec(sys.argv[1])
print(sum(name.startswith("torch._inductor.") for name in sys.modules))
PYTHON
loaded() { env "${@:2}" "$work/venv/bin/python" -W ignore loaded.py "$1" 2> errors || { cat errors >&2; exit 1; }; }
found="torch alone: $(loaded pass A=1) | bitsandbytes: $(loaded 'import bitsandbytes' A=1)"
found+=" | TORCH_COMPILE_DISABLE=1: $(loaded 'import bitsandbytes' TORCH_COMPILE_DISABLE=1)"
found+=" | TORCHDYNAMO_DISABLE=1: $(loaded 'import bitsandbytes' TORCHDYNAMO_DISABLE=1)"
echo "$found"
compiled="after torch.compile(len), not called: $(loaded 'torch.compile(len)' A=1)"
echo "$compiled"
expected="torch alone: 0 | bitsandbytes: 180 | TORCH_COMPILE_DISABLE=1: 180 | TORCHDYNAMO_DISABLE=1: 17"
[ "$found" = "$expected" ] && [ "$compiled" = "after torch.compile(len), not called: 180" ] ||
    { echo "not what was seen with these versions: $expected, and 180"; exit 1; }
