"""A base model from the original LLaVA-1.5 files, from a whole checkpoint or from an export of llava-hf, and back."""

import json
import re
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import save_torch_state_dict
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from llava.backbones import load_weights
from llava.backbones.llava15 import PLACEHOLDER, Llava15, padding_processor
from llava.files import check_same, make_config, read_object
from llava.original.names import (
    State,
    is_projector,
    load_tokenizer,
    of_clip,
    of_hub,
    read_weights,
    to_hub,
    to_original,
    to_transformers,
)
from llava.original.processor import write_processor

VISION_SELECT_LAYER = -2
# Of an original config.json: what is not the language model's.
FOREIGN = re.compile(
    r"(use_|tune_|freeze_)?mm_.*|image_.*|tokenizer_.*|model_type|architectures|_name_or_path|auto_map"
)


class Base(NamedTuple):
    """A base model in parts: `state` has transformers 5's names."""

    config: LlavaConfig
    state: State
    processor: LlavaProcessor


def read_base(llm: str | Path, vision: str | Path | None = None, projector: str | Path | None = None) -> Base:
    """Read a base model from its parts; every tensor keeps its bits.

    `llm`: a Vicuna folder, with `vision` (a CLIP folder) and `projector` (mm_projector.bin); a whole LLaVA checkpoint,
    with `vision`; or an export of llava-hf alone. Which of them it is, its config.json says: the original schema by
    `mm_projector_type`, whatever its model_type, llava-hf's by `vision_config`.

    The picture's placeholder becomes one more token behind the vocabulary, with a zero row in the embedding and in the
    head: the forward pass overwrites the former, `LlavaTrainer` and generation leave the latter out. Rows that
    llava-hf adds behind the vocabulary go.
    Raises ValueError or FileNotFoundError naming the file for parts that are missing, broken, or do not fit.
    """
    llm, content = Path(llm), read_object(Path(llm) / "config.json")
    if "vision_config" in content:
        _refuse(f"{llm} is a whole model of transformers", vision=vision, projector=projector)
        old = config_of(llm)
        text, tower, layer, select = (
            old.text_config,
            old.vision_config,
            old.vision_feature_layer,
            old.vision_feature_select_strategy,
        )
        state, preprocessor = _renamed(read_weights(llm), of_hub), _preprocessor(llm)
    else:
        if vision is None:
            raise ValueError(f"{llm} has no vision tower's configuration: give the CLIP folder as --vision")
        text, tower = _text_config(llm, content), _vision_config(Path(vision))
        preprocessor, (layer, select) = _preprocessor(Path(vision)), _selection(llm, content)
        language = read_weights(llm)
        state = {to_transformers(name): tensor for name, tensor in language.items() if "rotary_emb" not in name}
        if not any(name.startswith("model.vision_tower.") for name in state):
            state |= _renamed(read_weights(vision), of_clip)
        if any(map(is_projector, state)):
            _refuse(f"{llm} holds a projector of its own", projector=projector)
        elif projector is None:
            raise ValueError(f"{llm} holds no projector: give mm_projector.bin as --projector")
        else:
            state |= _renamed(read_weights(projector), to_transformers)
    tokenizer = load_tokenizer(llm)
    image_id = tokenizer.convert_tokens_to_ids(PLACEHOLDER)
    if text.vocab_size < image_id or ("vision_config" not in content and text.vocab_size != image_id):
        raise ValueError(
            f"{llm}: the tokenizer has {image_id} tokens, the model {text.vocab_size}; are both whole and of one model?"
        )
    text.vocab_size = image_id + 1
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        if name in state:
            state[name] = torch.nn.functional.pad(state[name][:image_id], (0, 0, 0, 1))
    config = LlavaConfig(
        text_config=text,
        vision_config=tower,
        image_token_index=image_id,
        image_seq_length=(tower.image_size // tower.patch_size) ** 2,
        vision_feature_layer=layer,
        vision_feature_select_strategy=select,
        tie_word_embeddings=False,
        dtype=state["lm_head.weight"].dtype if "lm_head.weight" in state else None,
    )
    processor = LlavaProcessor(
        image_processor=padding_processor(preprocessor),
        tokenizer=tokenizer,
        patch_size=tower.patch_size,
        vision_feature_select_strategy=select,
        num_additional_image_tokens=1,
    )
    source = f"{llm}, {vision} and {projector or llm}" if vision else str(llm)
    _check_projector(projector or llm, state, config)
    check_same(source, shapes_of(config), state)
    return Base(config, state, processor)


def assemble(
    llm: str | Path, vision: str | Path | None, projector: str | Path | None, dtype: torch.dtype = torch.float32
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Return model and processor of `read_base`, in memory. Raises what it raises."""
    config, state, processor = read_base(llm, vision, projector)
    model = load_weights(Llava15, str(llm), None, config=config, state_dict=state, dtype=dtype)
    model.generation_config = _generation_config(processor)
    return model, processor


def write_base(base: Base, out: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write the folder that `from_pretrained` opens, in shards of 5 GB, under the names that every version reads.

    The processor is that of `llava.original.processor`, under which the stock classes see the tokens of training.
    """
    config, state, processor = base
    if dtype is not None:
        state = {name: tensor.to(dtype) for name, tensor in state.items()}
        config.dtype = dtype
    Path(out).mkdir(parents=True, exist_ok=True)
    config.architectures = ["LlavaForConditionalGeneration"]
    config.save_pretrained(out)
    _name_rope_twice(Path(out) / "config.json")
    _generation_config(processor).save_pretrained(out)
    write_processor(processor, config, Path(out))
    save_torch_state_dict({to_hub(name): tensor.contiguous() for name, tensor in state.items()}, out)


def split_base(state: State) -> tuple[State, State, State]:
    """Return the original language model, vision tower and projector of a base model's state in transformers 5's names.

    The placeholder's row goes.
    """
    language, vision, projector = {}, {}, {}
    for name, tensor in state.items():
        if is_projector(name):
            projector[to_original(name)] = tensor
        elif name.startswith("model.vision_tower."):
            vision[name.replace("model.vision_tower.", "vision_model.")] = tensor
        else:
            rows = tensor[:-1].clone() if "embed_tokens" in name or "lm_head" in name else tensor
            language[to_original(name)] = rows
    return language, vision, projector


def disassemble(folder: str | Path, out: str | Path) -> None:
    """Write a base folder's parts as llm/, vision/ and mm_projector.bin. The tokenizer's own file is that of the Vicuna
    it came from, and is not among them."""
    config, state, processor = read_base(folder)
    language, vision, projector = split_base(state)
    out, text = Path(out), config.text_config
    text.vocab_size -= 1
    for part, tensors, own in (("llm", language, text), ("vision", vision, config.vision_config)):
        (out / part).mkdir(parents=True, exist_ok=True)
        own.save_pretrained(out / part)
        save_torch_state_dict({name: tensor.contiguous() for name, tensor in tensors.items()}, out / part)
    processor.image_processor.save_pretrained(out / "vision")
    torch.save({name: tensor.clone() for name, tensor in projector.items()}, out / "mm_projector.bin")


def config_of(folder: Path) -> LlavaConfig:
    """The model's configuration, from a config.json in transformers' or the original schema.

    Raises FileNotFoundError or ValueError naming the file.
    """
    file = folder / "config.json"
    content = read_object(file)
    if "vision_config" in content:
        return make_config(LlavaConfig, content, file)
    if "mm_hidden_size" not in content:
        raise ValueError(f"{file} is of no LLaVA model")
    vision = make_config(CLIPVisionConfig, {"hidden_size": content["mm_hidden_size"]}, file)
    return LlavaConfig(text_config=_text_config(folder, content), vision_config=vision)


def shapes_of(config: LlavaConfig) -> State:
    """The model's tensors by name, on the meta device: shapes without memory."""
    with torch.device("meta"):
        return LlavaForConditionalGeneration(config).state_dict()


def _renamed(state: State, rename) -> State:
    return {new: tensor for name, tensor in state.items() if (new := rename(name)) is not None}


def _refuse(reason: str, **given) -> None:
    if extra := [f"--{name}" for name, value in given.items() if value is not None]:
        raise ValueError(f"{reason}: leave out {' and '.join(extra)}")


def _preprocessor(folder: Path) -> dict:
    """The image processor's settings, from the file of either age."""
    if (folder / "processor_config.json").is_file():
        content = read_object(folder / "processor_config.json")
        if isinstance(content.get("image_processor"), dict):
            return content["image_processor"]
    return read_object(folder / "preprocessor_config.json")


def _selection(folder: Path, content: dict) -> tuple[int, str]:
    """The vision tower's layer and which of its tokens are shown; refuses a LLaVA other than 1.5."""
    known = {
        "mm_projector_type": ("mlp2x_gelu",),
        "mm_use_im_start_end": (False,),
        "mm_use_im_patch_token": (False,),
        "mm_vision_select_feature": ("patch", "cls_patch"),
    }
    for key, values in known.items():
        if content.get(key, values[0]) not in values:
            raise ValueError(f"{folder / 'config.json'}: {key} is {content[key]!r}, LLaVA-1.5 has {values[0]!r}")
    select = "default" if content.get("mm_vision_select_feature", "patch") == "patch" else "full"
    return content.get("mm_vision_select_layer", VISION_SELECT_LAYER), select


def _check_projector(source: str | Path, state: State, config: LlavaConfig) -> None:
    first = state.get("model.multi_modal_projector.linear_1.weight")
    last = state.get("model.multi_modal_projector.linear_2.weight")
    if first is None or last is None:
        return  # among the missing ones, which are listed with the rest
    found, wanted = (first.shape[1], last.shape[0]), (config.vision_config.hidden_size, config.text_config.hidden_size)
    if found != wanted:
        raise ValueError(
            f"{source}: the projector leads from {found[0]} to {found[1]}, vision tower and language model have the "
            f"widths {wanted[0]} and {wanted[1]}; take the projector of this size of LLaVA"
        )


def _text_config(folder: Path, content: dict) -> LlamaConfig:
    own = {key: value for key, value in content.items() if not FOREIGN.fullmatch(key)}
    return make_config(LlamaConfig, own, folder / "config.json")


def _vision_config(folder: Path) -> CLIPVisionConfig:
    """The vision half of a CLIP folder's configuration, or the whole of it."""
    content = read_object(folder / "config.json")
    return make_config(CLIPVisionConfig, content.get("vision_config", content), folder / "config.json")


def _name_rope_twice(file: Path) -> None:
    """Write the rotary embedding's settings under transformers 4's names too: it reads no others, and has defaults."""
    content = read_object(file)
    text = content["text_config"]
    rope = dict(text["rope_parameters"])
    text["rope_theta"] = rope.pop("rope_theta")
    text["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _generation_config(processor: LlavaProcessor) -> GenerationConfig:
    tokenizer = processor.tokenizer
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
