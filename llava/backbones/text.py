"""Language models without pictures: Qwen2, Qwen2.5 and Qwen3, asked in ChatML, and T5, which reads a question with its
encoder and answers with its decoder.

T5 (arXiv 1910.10683, with v1.1 and Flan-T5) is asked nothing but the question, as its own tokenizer encodes it, and
answers once: a record has one turn. LoRA goes on every linear layer of both stacks. Its embeddings are never resized:
that would put the input embedding in the place of v1.1's trained head.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.utils import ModelOutput

from llava.backbone import AS_IS, Backbone, BaseOptions, unwrapped
from llava.backbones.chatml import CHATML, own_words
from llava.backbones.qwen_vl import check_vocabulary
from llava.conversation import IGNORE, Template
from llava.files import check_tokenizer, read_object

SYSTEM = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
NO_THOUGHT = "<think>\n\n</think>\n\n"  # how Qwen3 is asked to answer at once


def read_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a folder. Raises FileNotFoundError or ValueError naming the file or folder."""
    check_tokenizer(path)
    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # of many classes, none of which names the folder
        raise ValueError(f"{path}: the tokenizer cannot be read ({' '.join(str(error).split())})") from error


class Qwen2(Backbone):
    """Qwen2ForCausalLM, asked as the folder's chat template says; without one as Qwen2.5-Instruct is."""

    model_class = Qwen2ForCausalLM
    config_class = Qwen2Config
    template = replace(CHATML, system=SYSTEM, placeholder=None)
    lora_targets = r"(.*\.)?layers\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"

    def __init__(
        self, config: PreTrainedConfig, processor: PreTrainedTokenizerBase | None, options: BaseOptions = AS_IS
    ):
        super().__init__(config, processor, options)
        if processor is not None:
            self.template = own_words(processor, self.template)

    @classmethod
    def read_processor(cls, path: Path, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
        """As `Backbone.read_processor`. Raises ValueError as `own_words` does."""
        tokenizer = read_tokenizer(path)
        check_vocabulary(path, tokenizer, config.vocab_size)
        try:
            own_words(tokenizer, cls.template)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        return tokenizer

    def language(self, model: nn.Module) -> nn.Module:
        """The Qwen."""
        return unwrapped(model).model


class Qwen3(Qwen2):
    """Qwen3ForCausalLM, which answers every turn without thinking first."""

    model_class = Qwen3ForCausalLM
    config_class = Qwen3Config
    template = replace(Qwen2.template, system="", assistant=f"{CHATML.assistant}{NO_THOUGHT}")


class T5(Backbone):
    """T5ForConditionalGeneration. A record is one sequence, question and answer, until the model takes it."""

    model_class = T5ForConditionalGeneration
    config_class = T5Config
    template = Template(
        system="", user="", assistant="</s>", lead="", end="</s>", placeholder=None, gap="", several=False
    )
    lora_targets = r"(.*\.)?(encoder|decoder)\.block\..*\.(q|k|v|o|wi|wi_0|wi_1|wo)"
    quantizable = False  # parts of it stay in float32, whatever is asked for
    generates = True

    @classmethod
    def read_processor(cls, path: Path, config: T5Config) -> PreTrainedTokenizerBase:
        """As `Backbone.read_processor`. The tokenizer leaves the end of text to the template."""
        tokenizer = read_tokenizer(path)
        if tokenizer.eos_token != cls.template.end or tokenizer.pad_token_id != config.pad_token_id:
            raise ValueError(
                f"{path}: T5's tokenizer ends texts with {cls.template.end} and pads with token {config.pad_token_id}; "
                f"this one with {tokenizer.eos_token!r} and {tokenizer.pad_token_id}"
            )
        if len(tokenizer) > config.vocab_size:
            raise ValueError(f"{path}: the tokenizer has {len(tokenizer)} words, the model {config.vocab_size}")
        tokenizer.backend_tokenizer.post_processor = None
        return tokenizer

    @classmethod
    def check_sharding(cls, path: Path) -> None:
        """As `Backbone.check_sharding`: while weights come in shards, transformers takes v1.1's head for its embedding,
        since it compares what is left of the two, which is nothing."""
        if read_object(path / "config.json").get("tie_word_embeddings") is False:
            raise ValueError(f"{path} has a head of its own, which ZeRO 3 would lose: take --zero none, 0, 1 or 2")

    def answer_logits(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[ModelOutput, Tensor]:
        """As `Backbone.answer_logits`: what is not supervised goes into the encoder, the rest into the decoder."""
        labels = batch["labels"]
        answered = labels != IGNORE
        asked = batch["attention_mask"].bool() & ~answered
        width, counts = int(asked.sum(1).max()), answered.sum(1, keepdim=True)
        present = torch.arange(int(counts.max()), device=labels.device) < counts
        targets = labels.new_full(present.shape, self.config.pad_token_id)
        targets[present] = labels[answered]
        begin = targets.new_full((len(targets), 1), self.config.decoder_start_token_id)
        outputs = model(
            input_ids=batch["input_ids"][:, :width].masked_fill(~asked[:, :width], self.config.pad_token_id),
            attention_mask=asked[:, :width].long(),
            decoder_input_ids=torch.cat([begin, targets[:, :-1]], 1),
            use_cache=False,
        )
        outputs["logits"] = outputs.logits[present]
        return outputs, targets[present]

    def language(self, model: nn.Module) -> nn.Module:
        """The decoder."""
        return unwrapped(model).decoder

    def run_layer(self, model: nn.Module, records: int, tokens: int, dtype: torch.dtype) -> tuple[int, Tensor]:
        """As `Backbone.run_layer`: a block of the decoder, as if question and answer had all tokens each."""
        stacks, width = unwrapped(model), self.config.d_model
        hidden = torch.empty(records, tokens, width, dtype=dtype, device="meta", requires_grad=True)
        heads = self.config.num_heads
        bias = torch.empty(1, heads, tokens, tokens, dtype=dtype, device="meta")
        stacks.decoder.block[-1](
            hidden,
            position_bias=bias,
            encoder_hidden_states=hidden,
            encoder_decoder_position_bias=bias,
        )
        return len(stacks.encoder.block) + len(stacks.decoder.block), hidden
