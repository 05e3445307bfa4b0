"""The original LLaVA-1.5 layout and the transformers one: renamed in both directions, assembled from its parts.

The original keeps a Vicuna, a CLIP vision tower and the projector in three places, writes LoRA and projector into two
pickles, and stands a sentinel that is no token for the picture. Renaming loses nothing: no tensor is transposed.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import normalizers
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from llava.conversation import IMAGE
from llava.image import padding_processor
from llava.model import is_projector, load_weights

PEFT_PREFIX = "base_model.model."
# Original name, transformers name; both with the weight's own name behind. The language model stands last, because
# its rule takes whatever else begins with "model.".
RULES = (
    ("model.mm_projector.0.", "model.multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "model.multi_modal_projector.linear_2."),
    ("model.vision_tower.vision_tower.vision_model.", "model.vision_tower."),
    ("model.", "model.language_model."),
)
VISION_SELECT_LAYER = -2
State = dict[str, torch.Tensor]


def to_transformers(name: str) -> str:
    """Return the transformers 5 name of an original weight, of a base model or (with PEFT's prefix) of an adapter."""
    return _rename(name, RULES)


def to_original(name: str) -> str:
    """Return the original name of a transformers 5 weight, of a base model or (with PEFT's prefix) of an adapter."""
    return _rename(name, tuple((theirs, ours) for ours, theirs in RULES))


def import_adapter(*files: str | Path) -> State:
    """Return one adapter, under the names of an adapter folder, from `adapter_model.bin` and `non_lora_trainables.bin`.

    Raises ValueError if two files give one tensor.
    """
    state: State = {}
    for file in files:
        for name, tensor in read_weights(file).items():
            renamed = to_transformers(name if name.startswith(PEFT_PREFIX) else PEFT_PREFIX + name)
            if renamed in state:
                raise ValueError(f"{file}: {name} was already given by another of {[str(given) for given in files]}")
            state[renamed] = tensor
    return state


def export_adapter(state: State) -> tuple[State, State]:
    """Return the contents of `adapter_model.bin` and `non_lora_trainables.bin` for an adapter folder's tensors."""
    lora = {to_original(name): tensor for name, tensor in state.items() if not is_projector(name)}
    projector = {to_original(name): tensor for name, tensor in state.items() if is_projector(name)}
    return lora, projector


def assemble(
    llm_dir: str | Path, vision_dir: str | Path, projector_file: str | Path, dtype: torch.dtype = torch.float32
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Build model and processor from a Vicuna folder, a CLIP folder and `mm_projector.bin`.

    The picture's placeholder becomes one more token behind the vocabulary, with a zero row in the embedding and in the
    head: the forward pass overwrites the former, `LlavaTrainer` and generation leave the latter out.
    Raises ValueError listing missing or unexpected weights.
    """
    text, vision = LlamaConfig.from_pretrained(llm_dir), CLIPVisionConfig.from_pretrained(vision_dir)
    image_id = text.vocab_size
    text.vocab_size = image_id + 1
    config = LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=image_id,
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        vision_feature_layer=VISION_SELECT_LAYER,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        dtype=dtype,
    )
    language = {name: tensor for name, tensor in read_weights(llm_dir).items() if "rotary_emb" not in name}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        language[name] = torch.nn.functional.pad(language[name], (0, 0, 0, 1))
    state = _renamed(language, to_transformers) | _renamed(read_weights(projector_file), to_transformers)
    state |= _renamed(read_weights(vision_dir), _vision_name)
    sources = f"{llm_dir}, {vision_dir} and {projector_file}"
    model = load_weights(sources, None, config=config, state_dict=state, dtype=dtype)
    tokenizer = load_tokenizer(llm_dir)
    if tokenizer.convert_tokens_to_ids(IMAGE) != image_id:
        raise ValueError(f"{llm_dir}: the tokenizer has {len(tokenizer) - 1} tokens, the model {image_id}")
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    preprocessor = json.loads((Path(vision_dir) / "preprocessor_config.json").read_text())
    processor = LlavaProcessor(
        image_processor=padding_processor(preprocessor),
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return model, processor


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """Return a Vicuna folder's sentencepiece tokenizer with `<image>` added and `<unk>` as padding, as LLaVA pads.

    Legacy tokenizers put a space before every piece of text between special tokens, even before a space. The stock
    class does so unless there is one already; here the normaliser does it, and the class that saves and loads a
    tokenizer verbatim keeps it.
    """
    stock = LlamaTokenizer.from_pretrained(folder)
    backend = stock.backend_tokenizer
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


def read_weights(path: str | Path) -> State:
    """Return the tensors of one file or of a folder's weights, sharded or not. Pickles may hold tensors only.

    Raises FileNotFoundError naming the folder if it holds no weights.
    """
    path = Path(path)
    if path.is_dir():
        for pattern in ("model*.safetensors", "pytorch_model*.bin"):
            if files := sorted(path.glob(pattern)):
                return {name: tensor for file in files for name, tensor in read_weights(file).items()}
        raise FileNotFoundError(f"{path} holds neither model*.safetensors nor pytorch_model*.bin")
    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _rename(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    prefix = PEFT_PREFIX if name.startswith(PEFT_PREFIX) else ""
    rest = name.removeprefix(prefix)
    for source, target in rules:
        if rest.startswith(source):
            return prefix + target + rest.removeprefix(source)
    return name


def _renamed(state: State, rename: Callable[[str], str | None]) -> State:
    return {new: tensor for name, tensor in state.items() if (new := rename(name)) is not None}


def _vision_name(name: str) -> str | None:
    """Return the transformers name of a weight of a CLIP folder; None for its text half and its position buffer."""
    match = re.fullmatch(r"(?:vision_model\.)?((?:embeddings|pre_layrnorm|encoder|post_layernorm)\..*)", name)
    if match is None or name.endswith("position_ids"):
        return None
    return f"model.vision_tower.{match[1]}"


def _is_legacy(folder: str | Path) -> bool:
    """Tell whether a tokenizer folder asks for the legacy treatment, which is the default where it says nothing."""
    config = Path(folder) / "tokenizer_config.json"
    return json.loads(config.read_text()).get("legacy", True) if config.is_file() else True
