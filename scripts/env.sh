# Sourced by the commands: makes .venv from requirements.txt on first use, again when requirements.txt has changed,
# and puts it first on PATH. Nothing outside this folder is touched.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
stamp=.venv/requirements-$(sha256sum requirements.txt | cut -c1-16)
if [ ! -e "$stamp" ]; then
    python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "Python 3.11 or newer is needed; set PYTHON to its path." >&2
        exit 1
    }
    echo "First use: installing requirements.txt into .venv (about 2 minutes and 2 GB; several GB more with CUDA) ..."
    "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    touch "$stamp"
fi
PATH="$PWD/.venv/bin:$PATH"
export PATH PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
# One thread a process: two runs side by side use two cores better than one run uses both.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
# Nothing here is compiled; bitsandbytes, which transformers' Trainer imports, would load the compiler at every start.
export TORCHDYNAMO_DISABLE="${TORCHDYNAMO_DISABLE:-1}"
