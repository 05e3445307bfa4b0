#!/usr/bin/env bash
# peft 0.21.2, torch 2.13.0: OFT's rotation, at the defaults, is orthogonal only as long as it is small.
#
# Orthogonal fine-tuning multiplies a weight by a rotation, which keeps its singular values, and so the angles between
# its neurons: that is the method. One would expect PEFT's OFT to keep them at any learning rate. At its default,
# use_cayley_neumann=True, the inverse of Cayley's map is a series cut after a few terms; it is close for a small rotation
# and no rotation at all once the skew matrix's norm comes near 1. Fifty steps of AdamW at 1e-3 move a singular value by
# 0.4 %, at 1e-2 by 82 %, and nothing warns. use_cayley_neumann=False keeps all to seven digits at both.
#
# Seen (largest relative change of a singular value of the weight after 50 steps):
#   series 0.001 0.0036
#   series 0.01 0.82
#   inverse 0.001 below 1e-5
#   inverse 0.01 below 1e-5
# Needs: python3 (3.10 or newer), the network for pip (200 MB: torch for the CPU).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 peft==0.21.2 numpy==2.4.6
cd "$work"
cat > oft.py <<'PYTHON'
import torch
from peft import OFTConfig, get_peft_model
from torch import nn


def moved(lr, **given):
    torch.manual_seed(0)
    net = nn.Sequential()
    net.add_module("layer", nn.Linear(32, 24, bias=False))
    before = torch.linalg.svdvals(net.layer.weight.detach())
    model = get_peft_model(net, OFTConfig(target_modules=["layer"], oft_block_size=16, **given))
    steps = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    inputs, targets = torch.randn(256, 32), torch.randn(256, 24)
    for _ in range(50):
        steps.zero_grad()
        (model(inputs) - targets).square().mean().backward()
        steps.step()
    with torch.no_grad():
        after = torch.linalg.svdvals(model(torch.eye(32)).T)
    return float(((after - before).abs() / before).max())


for label, given in (("series", {}), ("inverse", {"use_cayley_neumann": False})):
    for lr in (1e-3, 1e-2):
        change = moved(lr, **given)
        print(label, lr, "below 1e-5" if change < 1e-5 else f"{change:.2g}")
PYTHON
found=$("$work/venv/bin/python" -W ignore oft.py)
echo "$found"
expected="series 0.001 0.0036
series 0.01 0.82
inverse 0.001 below 1e-5
inverse 0.01 below 1e-5"
[ "$found" = "$expected" ] || { echo "not what was seen with these versions:"; echo "$expected"; exit 1; }
