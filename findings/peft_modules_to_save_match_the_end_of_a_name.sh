#!/usr/bin/env bash
# peft 0.21.2, torch 2.13.0: modules_to_save=["head"] trains lm_head, too.
#
# A list in target_modules, exclude_modules or the keys of rank_pattern names whole components of a module's path: "proj"
# does not mean q_proj, and PEFT says so. One would expect modules_to_save, which names the modules that train whole
# beside LoRA, to be read in the same way. It takes every module whose path ends in the text, in the middle of a
# component, too, and says nothing: a classifier's "head" brings the language model's lm_head into training and into
# every saved adapter.
#
# Seen:
#   target_modules proj: Target modules {'proj'} not found in the base model
#   modules_to_save head: head lm_head
# Needs: python3 (3.10 or newer), the network for pip (200 MB: torch for the CPU).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 peft==0.21.2 numpy==2.4.6
cd "$work"
cat > names.py <<'PYTHON'
from peft import LoraConfig, get_peft_model
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.lm_head, self.head = nn.Linear(8, 8), nn.Linear(8, 30), nn.Linear(8, 2)


try:
    get_peft_model(Net(), LoraConfig(target_modules=["proj"]))
except ValueError as error:
    print("target_modules proj:", str(error).partition(".")[0])
model = get_peft_model(Net(), LoraConfig(target_modules=["q_proj"], modules_to_save=["head"]))
whole = {name.split(".")[2] for name, p in model.named_parameters() if p.requires_grad and "modules_to_save" in name}
print("modules_to_save head:", *sorted(whole))
PYTHON
found=$("$work/venv/bin/python" -W ignore names.py)
echo "$found"
expected="target_modules proj: Target modules {'proj'} not found in the base model
modules_to_save head: head lm_head"
[ "$found" = "$expected" ] || { echo "not what was seen with these versions:"; echo "$expected"; exit 1; }
