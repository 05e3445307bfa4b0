#!/usr/bin/env bash
# trl 1.16.0, transformers 5.23.0: SFTTrainer's loss on a vision-language model is, at its defaults, mostly that of
# picture placeholders.
#
# Of a conversation about a picture every token that is no padding is a label: the question, the chat template's words
# and each of the placeholders that stand for the picture, which the model is taught to say one after the other. A
# LLaVA-1.5 picture has 576 of them, so that an answer of four tokens is less than a hundredth of the mean over tokens
# that is trained on. Older examples of the library masked the placeholders in a collator of their own; the one
# in the trainer does not. assistant_only_loss or prompt-completion records leave them out.
#
# Seen (a small LLaVA of 36 tokens a picture, one record):
#   labels 50 of them placeholders 36 answer 4
# Needs: python3 (3.10 or newer), the network for pip (400 MB: torch for the CPU).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 \
    trl==1.16.0 accelerate==1.15.0 numpy==2.4.6 pillow==13.0.0
cd "$work"
cat > labels.py <<'PYTHON'
import torch
from datasets import Dataset
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from trl import SFTConfig, SFTTrainer

ANSWER = "a b c ."
CHAT = ("{% for message in messages %}{{ message['role'] + ' : ' }}{% for item in message['content'] %}"
        "{{ '<image> ' if item['type'] == 'image' else item['text'] + ' ' }}{% endfor %}"
        "{{ '<end> ' }}{% endfor %}")
words = ["<pad>", "<unk>", "<end>", "<image>", "user", "assistant", ":", "a", "b", "c", ".", "what", "is", "it", "?"]
draft = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
draft.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=draft, pad_token="<pad>", unk_token="<unk>", eos_token="<end>",
                                    extra_special_tokens={"image_token": "<image>"})
size = {"height": 48, "width": 48}
pictures = LlavaImageProcessorPil(do_pad=True, size={"shortest_edge": 48}, crop_size=size, do_center_crop=True)
processor = LlavaProcessor(pictures, tokenizer, patch_size=8, vision_feature_select_strategy="default",
                           num_additional_image_tokens=1, chat_template=CHAT)
vision = CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
                          image_size=48, patch_size=8)
text = LlamaConfig(vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                   num_attention_heads=1)
model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=3,
                                                  vision_feature_layer=-1))
turns = [{"role": "user", "content": "what is it ?"}, {"role": "assistant", "content": ANSWER}]
records = Dataset.from_list([{"images": [Image.new("RGB", (48, 48), "red")], "messages": turns}])
settings = SFTConfig(output_dir="out", report_to="none", use_cpu=True, per_device_train_batch_size=1)
trainer = SFTTrainer(model, settings, train_dataset=records, processing_class=processor)
[batch] = trainer.get_train_dataloader()
labels = batch["labels"][batch["labels"] != -100]
answer = len(tokenizer(ANSWER).input_ids)
print(f"labels {len(labels)} of them placeholders {int((labels == 3).sum())} answer {answer}")
assert torch.equal(labels, batch["input_ids"][batch["attention_mask"] == 1])
PYTHON
found=$("$work/venv/bin/python" -W ignore labels.py 2> errors | tail -1 || { cat errors >&2; exit 1; })
echo "$found"
[ "$found" = "labels 50 of them placeholders 36 answer 4" ] || { cat errors; echo "not what was seen"; exit 1; }
