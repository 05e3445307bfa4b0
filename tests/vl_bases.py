"""Small random models of the families with pictures of any size, with the processor that transformers has for them."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.decoders import ByteLevel
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

QWEN = ("qwen2_5_vl", "qwen3_vl")
KINDS = (*QWEN, "internvl")
PADDING = 9  # rows of the head beyond the tokenizer's words
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
SPECIAL += ["<|video_pad|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"]
INTERN_WORDS = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
                "video_token": "<video>"}  # fmt: skip
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2,
          "out_hidden_size": 32, "initializer_range": 0.2}  # fmt: skip
OWN_VISION = {
    "qwen2_5_vl": {"depth": 2, "window_size": 16, "fullatt_block_indexes": [1]},
    "qwen3_vl": {"depth": 3, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, a few merges and the families' special tokens."""
    draft = Tokenizer(models.BPE())
    draft.pre_tokenizer, draft.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    draft.train_from_iterator(["What is the animal in the picture? Answer with a word: dog, cat, bird."], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=draft, eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=INTERN_WORDS
    )


def make_vl(folder: Path, kind: str, tied: bool = False, width: int = 32) -> Path:
    """Save a random model of three layers; pictures take 1 to 36 tokens, InternVL's 4 to 28."""
    tokenizer = make_tokenizer()
    names = {"image": "<|image_pad|>", "video": "<|video_pad|>", "vision_start": "<|vision_start|>",
             "vision_end": "<|vision_end|>"}  # fmt: skip
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(word) for name, word in names.items()}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    text = {"vocab_size": len(tokenizer) + PADDING, "hidden_size": width, "intermediate_size": 2 * width,
            "num_hidden_layers": 3, "num_attention_heads": width // 16, "num_key_value_heads": 1, 
            "rope_parameters": rope,
            "initializer_range": 0.2, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id, "tie_word_embeddings": tied}  # fmt: skip
    if kind == "internvl":
        return make_internvl(folder, tokenizer, text, tied)
    vision = VISION | OWN_VISION[kind] | {"out_hidden_size": width}
    torch.manual_seed(0)
    if kind == "qwen2_5_vl":
        config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied, **ids)
        model = Qwen2_5_VLForConditionalGeneration(config)
    else:
        text |= {"head_dim": 16, "rope_parameters": rope | {"mrope_interleaved": True}}
        config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied, **ids)
        model = Qwen3VLForConditionalGeneration(config)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"shortest_edge": 8 * 8, "longest_edge": 48 * 48}
    Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, temporal_patch_size=2, size=size).save_pretrained(folder)
    return folder


def make_internvl(folder: Path, tokenizer: PreTrainedTokenizerFast, text: dict, tied: bool) -> Path:
    """Save a random model whose tiles take four tokens; a picture has at most six, and one more of the whole."""
    text = {key: value for key, value in text.items() if key != "rope_parameters"} | {"model_type": "qwen2"}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": [16, 16], "patch_size": [4, 4], "initializer_range": 0.2}  # fmt: skip
    config = InternVLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    model = InternVLForConditionalGeneration(config)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    GotOcr2ImageProcessorPil(size={"height": 16, "width": 16}, max_patches=6).save_pretrained(folder)
    return folder


class Stock25(Qwen2_5_VLProcessor):
    """The stock processor without the one for videos, which needs torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        super().__init__(image_processor, tokenizer, None, chat_template)


class Stock3(Qwen3VLProcessor):
    """As Stock25."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        super().__init__(image_processor, tokenizer, None, chat_template)


class StockIntern(InternVLProcessor):
    """As Stock25."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        super().__init__(image_processor, tokenizer, None, image_seq_length=4, chat_template=chat_template)


def stock_processor(folder: Path, kind: str):
    """The stock processor of a folder."""
    made = {"qwen2_5_vl": Stock25, "qwen3_vl": Stock3, "internvl": StockIntern}[kind]
    pictures = GotOcr2ImageProcessorPil if kind == "internvl" else Qwen2VLImageProcessorPil
    return made(pictures.from_pretrained(folder), PreTrainedTokenizerFast.from_pretrained(folder))
