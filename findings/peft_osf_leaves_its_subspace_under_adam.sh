#!/usr/bin/env bash
# peft 0.21.2, torch 2.13.0: under Adam, OSF changes the singular directions that it freezes.
#
# OSF freezes a weight's largest singular directions and keeps the trained ones orthogonal to them, so that an earlier
# task loses nothing along the frozen ones. PEFT projects the gradients for it. One would expect the change of the weight
# to have no part along the frozen directions, whatever the optimizer. That holds for SGD. Adam divides every entry by a
# root of its own, which turns a projected gradient out of its subspace: after 50 steps on a linear layer a sixth to a
# quarter of the change lies along the frozen left directions, a smaller learning rate does not cure it, and neither
# training nor saving says a word. (The parameters have to be projected again after every step.)
#
# Seen (norm of the change's part along the frozen directions over the norm of the change, left and right):
#   SGD 0.1     0.000 0.000
#   AdamW 0.01  0.255 0.201
#   AdamW 0.001 0.170 0.151
# Needs: python3 (3.10 or newer), the network for pip (200 MB: torch for the CPU).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 peft==0.21.2 numpy==2.4.6
cd "$work"
cat > osf.py <<'PYTHON'
import torch
from peft import OSFConfig, get_peft_model
from torch import nn

KEPT = 12


def shares(optimizer, lr):
    torch.manual_seed(0)
    net = nn.Sequential()
    net.add_module("layer", nn.Linear(32, 24, bias=False))
    before = net.layer.weight.detach().clone()
    left, _, right = torch.linalg.svd(before, full_matrices=False)
    model = get_peft_model(net, OSFConfig(target_modules=["layer"], effective_rank=KEPT))
    steps = optimizer([p for p in model.parameters() if p.requires_grad], lr=lr)
    inputs, targets = torch.randn(256, 32), torch.randn(256, 24)
    for _ in range(50):
        steps.zero_grad()
        (model(inputs) - targets).square().mean().backward()
        steps.step()
    with torch.no_grad():
        change = model(torch.eye(32)).T - before
    return (left[:, :KEPT].T @ change).norm() / change.norm(), (change @ right[:KEPT].T).norm() / change.norm()


for name, optimizer, lr in (("SGD", torch.optim.SGD, 0.1), ("AdamW", torch.optim.AdamW, 1e-2), ("AdamW", torch.optim.AdamW, 1e-3)):
    print(name, lr, *(f"{share:.3f}" for share in shares(optimizer, lr)))
PYTHON
found=$("$work/venv/bin/python" -W ignore osf.py)
echo "$found"
expected="SGD 0.1 0.000 0.000
AdamW 0.01 0.255 0.201
AdamW 0.001 0.170 0.151"
[ "$found" = "$expected" ] || { echo "not what was seen with these versions:"; echo "$expected"; exit 1; }
