#!/usr/bin/env bash
# trl 1.16.0, transformers 5.23.0, torch 2.13.0: BEMACallback's average of a short run is the untrained model.
#
# The callback (bias-corrected EMA, arXiv 2508.00180) averages at every 400th step by default and at no other, the last
# one not either. A run of fewer steps, as many fine-tunings are, saves the weights it started from under out/bema, as a
# whole model and without a word. And it writes the averages of the weights that train into those of the whole model, in
# the order of both, so that a single frozen tensor, let alone LoRA, ends the training at the first average.
#
# Seen:
#   399 steps: trained True, saved average is the start True
#   400 steps: trained True, saved average is the start False
#   frozen embedding: RuntimeError
# Needs: python3 (3.10 or newer), the network for pip (about 3 GB with CUDA's torch).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 \
    trl==1.16.0 accelerate==1.15.0
cd "$work"
cat > bema.py <<'PYTHON'
import logging

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from trl import BEMACallback

logging.disable(logging.ERROR)


def train(steps, frozen, **settings):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                                         num_attention_heads=2, num_key_value_heads=2))
    model.model.embed_tokens.requires_grad_(not frozen)
    start = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    ids = torch.arange(8)
    args = TrainingArguments("out", max_steps=steps, learning_rate=1e-2, per_device_train_batch_size=1, report_to="none",
                             save_strategy="no", disable_tqdm=True, use_cpu=True)
    Trainer(model, args, train_dataset=[{"input_ids": ids, "labels": ids}] * 500, callbacks=[BEMACallback(**settings)]).train()
    saved = LlamaForCausalLM.from_pretrained("out/bema").state_dict()
    moved = any(not torch.equal(weight, start[name]) for name, weight in model.named_parameters())
    kept = all(torch.equal(saved[name], weight) for name, weight in start.items())
    return f"trained {moved}, saved average is the start {kept}"


print("399 steps:", train(399, False))
print("400 steps:", train(400, False))
try:
    print("frozen embedding:", train(2, True, update_freq=1))
except Exception as error:
    print("frozen embedding:", type(error).__name__)
PYTHON
said=$("$work/venv/bin/python" bema.py 2>/dev/null | grep -E "^(399|400|frozen)")
echo "$said"
[ "$said" = "399 steps: trained True, saved average is the start True
400 steps: trained True, saved average is the start False
frozen embedding: RuntimeError" ]
