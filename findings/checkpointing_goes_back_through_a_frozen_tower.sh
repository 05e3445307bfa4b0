#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0: activation checkpointing runs the backward pass through a frozen vision tower.
#
# activation_checkpointing_enable has the output of every module's input embeddings ask for a gradient, which reentrant
# checkpoints needed. A vision tower's patch embedding is one of them. So the tower, which an ordinary backward pass leaves
# out, is recomputed and differentiated although none of its weights trains, also with use_reentrant=False, the default,
# for which nothing needs it. disable_input_require_grads() takes it away. Qwen3-VL's tower alone has no such embedding.
#
# Seen, whether the output of a frozen tower's last block asks for a gradient, without and with checkpointing:
#   LLaVA, InternVL, Gemma 3 and Qwen2.5-VL False True, Qwen3-VL False False
# Needs: python3 (3.10 or newer), the network for pip (about 3 GB with CUDA's torch).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 \
    pillow==13.0.0
cd "$work"
cat > towers.py <<'PYTHON'
import logging
import warnings

import torch
from transformers import (AutoModelForImageTextToText, CLIPVisionConfig, Gemma3Config, InternVLConfig, LlamaConfig,
                          LlavaConfig, Qwen2_5_VLConfig, Qwen3VLConfig, SiglipVisionConfig)

logging.disable(logging.ERROR)
warnings.simplefilter("ignore")
size = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2)
rope = dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 3, 3])
qwen = dict(depth=2, hidden_size=16, intermediate_size=32, num_heads=2, out_hidden_size=32, patch_size=4)
tower = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4)
marks = dict(image_token_id=63, video_token_id=62, vision_start_token_id=61, vision_end_token_id=60)
square = dict(pixel_values=torch.zeros(1, 3, 8, 8))
patches = dict(pixel_values=torch.zeros(4, 96), image_grid_thw=torch.tensor([[1, 2, 2]]))
made = {
    "llava": (LlavaConfig(vision_config=CLIPVisionConfig(**tower), text_config=LlamaConfig(**size), image_token_index=63), square, 4),
    "internvl": (InternVLConfig(vision_config=tower, text_config=size | {"model_type": "qwen2"}, image_token_id=63), square, 1),
    "gemma3": (Gemma3Config(vision_config=SiglipVisionConfig(**tower), text_config=size | {"head_dim": 16}, mm_tokens_per_image=4,
                            image_token_index=63, image_token_id=63), square, 4),
    "qwen2_5_vl": (Qwen2_5_VLConfig(text_config=size | {"rope_parameters": rope},
                                    vision_config=qwen | {"fullatt_block_indexes": [0, 1]}, **marks), patches, 1),
    "qwen3_vl": (Qwen3VLConfig(text_config=size | {"head_dim": 16, "rope_parameters": rope | {"mrope_interleaved": True}},
                               vision_config=qwen | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}, **marks),
                 patches, 1),
}
for name, (config, picture, tokens) in made.items():
    model = AutoModelForImageTextToText.from_config(config).train()
    seeing = getattr(model.model, "visual", None) or model.model.vision_tower
    seeing.requires_grad_(False)
    ids = torch.tensor([[1, 2] + [63] * tokens + [3, 4]])
    more = dict(picture)
    if name.startswith("qwen"):
        more["mm_token_type_ids"] = (ids == 63).long()
    if name == "gemma3":
        more["token_type_ids"] = (ids == 63).long()
    last = [module for module in seeing.modules() if type(module).__name__.endswith(("EncoderLayer", "VisionLayer", "VisionBlock"))][-1]
    kept = []
    last.register_forward_hook(lambda _, __, output: kept.append((output[0] if isinstance(output, tuple) else output).requires_grad))
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model(input_ids=ids, labels=ids, use_cache=False, **more)
    print(name, *kept)
PYTHON
said=$("$work/venv/bin/python" towers.py 2>/dev/null | grep -E "^(llava|internvl|gemma3|qwen)")
echo "$said"
[ "$said" = "llava False True
internvl False True
gemma3 False True
qwen2_5_vl False True
qwen3_vl False False" ]
