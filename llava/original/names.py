"""The original LLaVA-1.5 layout: its names for the weights, its files, its tokenizer.

It keeps a Vicuna, a CLIP vision tower and the projector in three places, writes LoRA and projector into two pickles,
and stands a sentinel that is no token for the picture. Renaming loses nothing: no tensor is transposed.
"""

import json
import re
from pathlib import Path

import torch
from tokenizers import Tokenizer, normalizers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from llava.backbones.llava15 import PLACEHOLDER
from llava.files import check_tokenizer, read_object, read_tensors, weight_files
from llava.original.processor import starts_words_once

PEFT_PREFIX = "base_model.model."
# Original name, transformers name; both with the weight's own name behind. The language model stands last, because
# its rule takes whatever else begins with "model.".
RULES = (
    ("model.mm_projector.0.", "model.multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "model.multi_modal_projector.linear_2."),
    ("model.vision_tower.vision_tower.vision_model.", "model.vision_tower."),
    ("model.", "model.language_model."),
)
# Name in the first files of llava-hf, transformers 5 name; later versions put "model." in front, or drop a level.
HUB_NAMES = (
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
    ("vision_tower.vision_model.", "model.vision_tower."),
)
HUB_RULES = (
    (r"language_model\.model\.", "model.language_model."),
    (r"language_model\.lm_head\.", "lm_head."),
    (r"(model\.)?multi_modal_projector\.", "model.multi_modal_projector."),
    (r"(model\.)?vision_tower\.(vision_model\.)?", "model.vision_tower."),
)
State = dict[str, torch.Tensor]


def to_transformers(name: str) -> str:
    """Return the transformers 5 name of an original weight, of a base model or (with PEFT's prefix) of an adapter."""
    return _rename(name, RULES)


def to_original(name: str) -> str:
    """Return the original name of a transformers 5 weight, of a base model or (with PEFT's prefix) of an adapter."""
    return _rename(name, tuple((theirs, ours) for ours, theirs in RULES))


def is_projector(name: str) -> bool:
    """Tell whether a transformers 5 name, of a base model or an adapter, is of the projector."""
    return "multi_modal_projector." in name


def of_clip(name: str) -> str | None:
    """Return the transformers 5 name of a weight of a CLIP folder; None for its text half and its position buffer."""
    match = re.fullmatch(r"(?:vision_model\.)?((?:embeddings|pre_layrnorm|encoder|post_layernorm)\..*)", name)
    if match is None or name.endswith("position_ids"):
        return None
    return f"model.vision_tower.{match[1]}"


def of_hub(name: str) -> str:
    """Return the transformers 5 name of a weight in a saved Llava folder, of whatever version."""
    for pattern, runtime in HUB_RULES:
        if match := re.match(pattern, name):
            return runtime + name[match.end() :]
    return name


def to_hub(name: str) -> str:
    """Return the name that every version of transformers reads from a folder, for a transformers 5 name."""
    for hub, runtime in HUB_NAMES:
        if name.startswith(runtime):
            return hub + name.removeprefix(runtime)
    return name


def read_weights(path: str | Path) -> State:
    """Return the tensors of one file or of a folder's weights, sharded or not. Pickles may hold tensors only.

    Raises FileNotFoundError naming the folder if it holds no weights or misses a shard, ValueError naming the file if
    it is a pointer or cut off, or holds anything but finite tensors (nothing of it has been executed then).
    """
    path = Path(path)
    if path.is_dir():
        return {name: tensor for file in weight_files(path) for name, tensor in read_tensors(file).items()}
    return read_tensors(path)


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """Return a folder's sentencepiece tokenizer with `<image>` added behind its vocabulary, as the one added token,
    and `<unk>` as padding, as LLaVA pads.

    Legacy tokenizers put a space before every piece of text between special tokens, even before a space. The stock
    class does so unless there is one already; here the normaliser does it, and the class that saves and loads a
    tokenizer verbatim keeps it.
    Raises FileNotFoundError or ValueError naming the file.
    """
    folder = Path(folder)
    check_tokenizer(folder)
    stock = LlamaTokenizer.from_pretrained(folder)
    backend = _without_added_tokens(folder, stock.backend_tokenizer)
    if _is_legacy(folder):
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.pre_tokenizer = None
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=stock.bos_token,
        eos_token=stock.eos_token,
        unk_token=stock.unk_token,
        pad_token=stock.unk_token,
        additional_special_tokens=[PLACEHOLDER],
        model_max_length=stock.model_max_length,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def _rename(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    prefix = PEFT_PREFIX if name.startswith(PEFT_PREFIX) else ""
    rest = name.removeprefix(prefix)
    for source, target in rules:
        if rest.startswith(source):
            return prefix + target + rest.removeprefix(source)
    return name


def _without_added_tokens(folder: Path, backend: Tokenizer) -> Tokenizer:
    """Drop what llava-hf added behind the sentencepiece vocabulary; refuse to drop words."""
    content, size = json.loads(backend.to_str()), backend.get_vocab_size(with_added_tokens=False)
    added = [token for token in content["added_tokens"] if token["id"] >= size]
    if words := [token["content"] for token in added if token["content"] not in (PLACEHOLDER, "<pad>")]:
        raise ValueError(
            f"{folder}: the tokenizer has {words} behind its vocabulary, which no original LLaVA has; their rows of "
            "the model would be lost"
        )
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < size]
    return Tokenizer.from_str(json.dumps(content))


def _is_legacy(folder: Path) -> bool:
    """Tell whether a tokenizer folder asks for the legacy treatment, which is the default where it says nothing.

    A folder written for the class that takes tokenizer.json as it is says it there.
    """
    config, verbatim = folder / "tokenizer_config.json", folder / "tokenizer.json"
    settings = read_object(config) if config.is_file() else {}
    if "legacy" not in settings and verbatim.is_file():
        return starts_words_once(read_object(verbatim)) is None
    return settings.get("legacy", True)
