#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0: gradient accumulation changes what Qwen2.5-VL and Qwen3-VL are trained on.
#
# Since 4.46 Trainer counts the supervised tokens of a whole step and divides by them, so that two micro-batches of one
# record give the step of one micro-batch of both. For classes with accepts_loss_kwargs = False it counts nothing: each
# micro-batch is averaged by itself, and a record of one answered token weighs as much as one of many. The multimodal Qwen
# classes have it, their text-only siblings and LLaVA do not. There is no warning, and a subclass's own compute_loss gets
# num_items_in_batch None.
#
# Seen, one SGD step on a record of 1 and one of 11 supervised tokens, largest difference of a weight between 1 x 2 and
# 2 x 1 records, relative to the largest change of a weight:
#   LlavaForConditionalGeneration and Qwen2ForCausalLM below 1e-3, Qwen2.5-VL and Qwen3-VL above 0.1
# Needs: python3 (3.10 or newer), the network for pip (about 3 GB with CUDA's torch).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 \
    accelerate==1.15.0 pillow==13.0.0
cd "$work"
cat > steps.py <<'PYTHON'
import copy
import logging

import torch
from transformers import (CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, Qwen2Config,
                          Qwen2ForCausalLM, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen3VLConfig,
                          Qwen3VLForConditionalGeneration, Trainer, TrainingArguments)

logging.disable(logging.ERROR)
size = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, initializer_range=0.2)
rope = dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 3, 3])
vision = dict(depth=1, hidden_size=16, intermediate_size=32, num_heads=2, out_hidden_size=32, patch_size=4)
clip = CLIPVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=8,
                        patch_size=4)
made = {
    "llava": LlavaForConditionalGeneration(LlavaConfig(vision_config=clip, text_config=LlamaConfig(**size), image_token_index=63)),
    "qwen2": Qwen2ForCausalLM(Qwen2Config(**size)),
    "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(
        text_config=size | {"rope_parameters": rope}, vision_config=vision | {"fullatt_block_indexes": [0]})),
    "qwen3_vl": Qwen3VLForConditionalGeneration(Qwen3VLConfig(
        text_config=size | {"head_dim": 16, "rope_parameters": rope | {"mrope_interleaved": True}},
        vision_config=vision | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]})),
}
ids = torch.arange(2, 26).view(2, 12)
labels = ids.clone()
labels[0, 2:] = -100  # one supervised token is left after the shift, of the other record eleven
records = [{"input_ids": row, "labels": own, "attention_mask": torch.ones(12, dtype=torch.long)}
           for row, own in zip(ids, labels)]
for name, model in made.items():
    ends = []
    for batch, accumulation in ((2, 1), (1, 2)):
        args = TrainingArguments("out", per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
                                 max_steps=1, learning_rate=1.0, lr_scheduler_type="constant", optim="sgd",
                                 max_grad_norm=0.0, report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True)
        own = copy.deepcopy(model)
        Trainer(own, args, train_dataset=records).train()
        ends.append({key: weight.detach() for key, weight in own.named_parameters()})
    start = dict(model.named_parameters())
    moved = max((end - start[key]).abs().max().item() for key, end in ends[0].items())
    apart = max((ends[1][key] - end).abs().max().item() for key, end in ends[0].items()) / moved
    print(name, "alike" if apart < 1e-3 else "apart" if apart > 0.1 else apart)
PYTHON
said=$("$work/venv/bin/python" steps.py 2>/dev/null | grep -E "^(llava|qwen)")
echo "$said"
[ "$said" = "llava alike
qwen2 alike
qwen2_5_vl apart
qwen3_vl apart" ]
