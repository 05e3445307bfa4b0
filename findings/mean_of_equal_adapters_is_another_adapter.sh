#!/usr/bin/env bash
# peft 0.21.2, torch 2.13.0: the mean of four adapters that are all the same is, by kind of merge, up to eight times it.
#
# add_weighted_adapter gets four LoRA adapters of equal weights and the weight 1/4 for each. One would expect the adapter
# itself from every kind. "linear", "dare_linear" and "magnitude_prune" (density 1: nothing is dropped) average A and B
# each with the square roots of the weights, so that the product has all sixteen pairs: 4 times. "cat" and the kinds
# that decompose the sum of products give it once. "ties" and "dare_ties" divide by the number of adapters, which the
# weights have done before: a quarter, decomposed or not. With use_rslora the merged adapter, whose alpha is made equal
# to its rank, is scaled by the square root of that rank once more: "linear" 8 times, "cat", whose rank is 16, 4 times,
# "svd" twice, "ties" a half.
#
# Seen (norm of the merged change over that of one adapter's):
#   lora:   linear 4 cat 1 svd 1 dare_linear 4 magnitude_prune 4 ties 0.25 dare_ties 0.25 ties_svd 0.25
#   rslora: linear 8 cat 4 svd 2 dare_linear 8 magnitude_prune 8 ties 0.5 dare_ties 0.5 ties_svd 0.5
# Needs: python3 (3.10 or newer), the network for pip (200 MB: torch for the CPU).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 peft==0.21.2 numpy==2.4.6
cd "$work"
cat > merge.py <<'PYTHON'
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

KINDS = ("linear", "cat", "svd", "dare_linear", "magnitude_prune", "ties", "dare_ties", "ties_svd")
COUNT = 4


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 12, bias=False)


torch.manual_seed(0)
up, down = torch.randn(12, 4), torch.randn(4, 16)
for label, rslora in (("lora:", False), ("rslora:", True)):
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["layer"], use_rslora=rslora)
    names, model = [f"a{number}" for number in range(COUNT)], get_peft_model(Net(), config, adapter_name="a0")
    for name in names[1:]:
        model.add_adapter(name, config)
    layer, told = model.base_model.model.layer, [label]
    for name in names:
        layer.lora_A[name].weight.data, layer.lora_B[name].weight.data = down.clone(), up.clone()
    one = layer.get_delta_weight("a0")
    for kind in KINDS:
        density = {} if kind in ("linear", "cat", "svd") else {"density": 1.0}
        model.add_weighted_adapter(names, [1 / COUNT] * COUNT, kind, combination_type=kind, **density)
        merged = layer.get_delta_weight(kind)
        ratio = float(merged.norm() / one.norm())
        assert torch.allclose(merged, ratio * one, rtol=1e-4, atol=1e-4), kind
        told += [kind, f"{ratio:.4g}"]
    print(*told)
PYTHON
found=$("$work/venv/bin/python" -W ignore merge.py)
echo "$found"
expected="lora: linear 4 cat 1 svd 1 dare_linear 4 magnitude_prune 4 ties 0.25 dare_ties 0.25 ties_svd 0.25
rslora: linear 8 cat 4 svd 2 dare_linear 8 magnitude_prune 8 ties 0.5 dare_ties 0.5 ties_svd 0.5"
[ "$found" = "$expected" ] || { echo "not what was seen with these versions:"; echo "$expected"; exit 1; }
