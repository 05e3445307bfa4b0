"""Small random language models without pictures: T5, T5 v1.1, Qwen2 and Qwen3."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    T5TokenizerFast,
)
from vl_bases import make_tokenizer

KINDS = ("t5", "t5_v1_1", "qwen2", "qwen3")
WORDS = ["What", "does", "the", "person", "say", "next", "in", "dialogue", "yes", "no", "maybe", "thank", "you", "dog",
         "cat", "bird", "red", "picture", "of", "a"]  # fmt: skip
CAUSAL = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}


def make_t5_tokenizer() -> T5TokenizerFast:
    """A unigram tokenizer of words and letters, with T5's first three pieces."""
    words = [(f"▁{word}", -2.0) for word in WORDS]
    letters = [(letter, -5.0) for letter in "▁abcdefghijklmnopqrstuvwxyzABCW?!.,0123456789"]
    return T5TokenizerFast(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *words, *letters], extra_ids=4)


def make_text(folder: Path, kind: str, width: int = 32) -> Path:
    """Save a random model of two layers (T5: two and two) with more rows than words."""
    torch.manual_seed(0)
    tokenizer: PreTrainedTokenizerBase
    if kind.startswith("t5"):
        tokenizer = make_t5_tokenizer()
        newer = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False} if kind == "t5_v1_1" else {}
        model = T5ForConditionalGeneration(
            T5Config(
                vocab_size=len(tokenizer) + 5,
                d_model=width,
                d_kv=16,
                d_ff=2 * width,
                num_layers=2,
                num_heads=2,
                dropout_rate=0.0,
                initializer_factor=1.0,
                decoder_start_token_id=0,
                **newer,
            )
        )
    else:
        tokenizer = make_tokenizer()
        config, model_class = CAUSAL[kind]
        model = model_class(
            config(
                vocab_size=len(tokenizer) + 5,
                hidden_size=width,
                intermediate_size=2 * width,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                initializer_range=0.2,
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    if kind == "t5_v1_1":
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    if kind == "t5_v1_1":  # as its weights are published: a head of its own, which transformers' configuration denies
        weights = {name: w.detach().clone() for name, w in model.state_dict().items() if "embed_tokens" not in name}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
        config.pop("scale_decoder_outputs", None)
        (folder / "config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(folder)
    return folder
