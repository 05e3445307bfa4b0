"""The original LLaVA-1.5 layout: its names for the weights, its files, its tokenizer.

It keeps a Vicuna, a CLIP vision tower and the projector in three places, writes LoRA and projector into two pickles,
and stands a sentinel that is no token for the picture. Renaming loses nothing: no tensor is transposed.
"""

import json
import pickle
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer, normalizers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from llava.conversation import IMAGE

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
INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
State = dict[str, torch.Tensor]


def to_transformers(name: str) -> str:
    """Return the transformers 5 name of an original weight, of a base model or (with PEFT's prefix) of an adapter."""
    return _rename(name, RULES)


def to_original(name: str) -> str:
    """Return the original name of a transformers 5 weight, of a base model or (with PEFT's prefix) of an adapter."""
    return _rename(name, tuple((theirs, ours) for ours, theirs in RULES))


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


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises FileNotFoundError or ValueError naming the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; is {path.parent} complete?")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); download it again") from error


def read_weights(path: str | Path) -> State:
    """Return the tensors of one file or of a folder's weights, sharded or not. Pickles may hold tensors only.

    Raises FileNotFoundError naming the folder if it holds no weights or misses a shard, ValueError naming the file if
    it is cut off, or holds anything but tensors (nothing of it has been executed then).
    """
    path = Path(path)
    if path.is_dir():
        return {name: tensor for file in _weight_files(path) for name, tensor in read_weights(file).items()}
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds something else than tensors, or is no file of weights; it was not opened any further. "
            f"Save the tensors alone, with torch.save or as safetensors ({str(error).splitlines()[0]})"
        ) from error
    except (RuntimeError, EOFError, OSError, SafetensorError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} cannot be read: cut off, perhaps; download it again ({reason})") from error
    strange = not isinstance(state, dict) or [k for k, v in state.items() if not isinstance(v, torch.Tensor)]
    if strange:
        raise ValueError(
            f"{path} should hold tensors by name; it has {strange if strange is not True else type(state)}"
        )
    return state


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """Return a folder's sentencepiece tokenizer with `<image>` added behind its vocabulary, as the one added token,
    and `<unk>` as padding, as LLaVA pads.

    Legacy tokenizers put a space before every piece of text between special tokens, even before a space. The stock
    class does so unless there is one already; here the normaliser does it, and the class that saves and loads a
    tokenizer verbatim keeps it.
    """
    stock = LlamaTokenizer.from_pretrained(folder)
    backend = _without_added_tokens(stock.backend_tokenizer)
    if _is_legacy(folder):
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.pre_tokenizer = None
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=stock.bos_token,
        eos_token=stock.eos_token,
        unk_token=stock.unk_token,
        pad_token=stock.unk_token,
        additional_special_tokens=[IMAGE],
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


def _weight_files(folder: Path) -> list[Path]:
    for index in INDICES:
        if (folder / index).is_file():
            files = [folder / name for name in sorted(set(read_json(folder / index)["weight_map"].values()))]
            if missing := [file.name for file in files if not file.is_file()]:
                raise FileNotFoundError(f"{folder / index} names {missing}, which are not there; download them")
            return files
    for pattern in ("model*.safetensors", "pytorch_model*.bin"):
        if files := sorted(folder.glob(pattern)):
            return files
    raise FileNotFoundError(f"{folder} holds neither model*.safetensors nor pytorch_model*.bin")


def _without_added_tokens(backend: Tokenizer) -> Tokenizer:
    """Drop what was added behind the sentencepiece vocabulary, as llava-hf's <image> and <pad>."""
    content, size = json.loads(backend.to_str()), backend.get_vocab_size(with_added_tokens=False)
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < size]
    return Tokenizer.from_str(json.dumps(content))


def _is_legacy(folder: str | Path) -> bool:
    """Tell whether a tokenizer folder asks for the legacy treatment, which is the default where it says nothing."""
    config = Path(folder) / "tokenizer_config.json"
    return json.loads(config.read_text()).get("legacy", True) if config.is_file() else True
