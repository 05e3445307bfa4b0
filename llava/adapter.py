"""LoRA adapters in the layout of the original LLaVA code, both ways, and merged into their base."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaConfig

from llava.base import Base, config_of, shapes_of, write_base
from llava.model import (
    CONFIG,
    LORA_TARGETS,
    PROJECTOR,
    WEIGHTS,
    attach_lora,
    check_same,
    is_projector,
    load_adapter,
    load_base,
)
from llava.original import PEFT_PREFIX, State, read_json, read_weights, to_original, to_transformers

LINEARS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
ORIGINAL_LORA, ORIGINAL_REST = "adapter_model.bin", "non_lora_trainables.bin"
PLAIN_LORA = {"peft_type": "LORA", "bias": "none", "fan_in_fan_out": False, "modules_to_save": None}


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


def import_adapter_folder(source: str | Path, out: str | Path, base: str | Path | None = None) -> None:
    """Write an original LLaVA (LCIA, CoIN) LoRA folder as one PEFT folder for the transformers model.

    `base`: the folder of that model, to check the shapes against and to name in the adapter; by default the
    folder's own config.json is checked against.
    Raises ValueError for any other kind of adapter, and listing missing, unexpected and misshapen tensors.
    """
    from peft import LoraConfig

    source, out = Path(source), Path(out)
    config = read_json(source / CONFIG)
    strange = {key: config.get(key, plain) for key, plain in PLAIN_LORA.items() if config.get(key, plain) != plain}
    strange |= {key: config[key] for key in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "expert_num")
                if config.get(key)}  # fmt: skip
    if strange:
        raise ValueError(f"{source / CONFIG} is not of the plain LoRA that LLaVA trains: {strange}")
    lora = source / (WEIGHTS if (source / WEIGHTS).is_file() else ORIGINAL_LORA)
    state = import_adapter(lora, source / ORIGINAL_REST)
    model = config_of(Path(base or source))
    check_same(f"the adapter in {source}", _adapter_shapes(model, config["r"]), state)
    named = str(base) if base else config["base_model_name_or_path"]
    out.mkdir(parents=True, exist_ok=True)
    LoraConfig(
        r=config["r"],
        lora_alpha=config["lora_alpha"],
        lora_dropout=config["lora_dropout"],
        target_modules=LORA_TARGETS,
        modules_to_save=list(PROJECTOR),
        base_model_name_or_path=named,
        inference_mode=True,
    ).save_pretrained(out)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, out / WEIGHTS, metadata={"format": "pt"})


def export_adapter_folder(
    source: str | Path,
    out: str | Path,
    base: str | Path | None = None,
    vision: str = "openai/clip-vit-large-patch14-336",
) -> None:
    """Write an adapter folder as the original code writes it: two pickles, adapter_config.json and config.json.

    `base`: the folder of the model it was trained on; by default what the adapter names. `vision`: the name under which
    the original finds its vision tower.
    """
    source, out = Path(source), Path(out)
    config, state = read_json(source / CONFIG), load_file(source / WEIGHTS)
    base = Path(base or config["base_model_name_or_path"])
    model = config_of(base)
    check_same(f"the adapter in {source}", _adapter_shapes(model, config["r"]), state)
    out.mkdir(parents=True, exist_ok=True)
    for name, tensors in zip((ORIGINAL_LORA, ORIGINAL_REST), export_adapter(state), strict=True):
        torch.save(tensors, out / name)
    kept = ("base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "inference_mode", "init_lora_weights")
    lora = PLAIN_LORA | {key: config[key] for key in kept}
    lora |= {"target_modules": LINEARS, "task_type": "CAUSAL_LM"}
    _write_json(out / CONFIG, lora)
    _write_json(out / "config.json", _original_config(model, vision))


def merge(base: str | Path, adapter: str | Path, out: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write the base with the adapter's LoRA added to its weights and the adapter's projector in its place.

    The sum is made in `dtype`, by default the base's own. Raises ValueError if the adapter does not fit.
    """
    own = config_of(Path(base)).dtype or torch.float32
    config = read_json(Path(adapter) / CONFIG)
    model, processor = load_base(base, dtype or own)
    model = attach_lora(model, config["r"], config["lora_alpha"], 0.0)
    load_adapter(model, adapter)
    merged = model.merge_and_unload(safe_merge=True).to(dtype or own)
    write_base(Base(merged.config, merged.state_dict(), processor), out)


def _adapter_shapes(config: LlavaConfig, r: int) -> State:
    """An adapter of this rank for this model, by name and shape."""
    wanted = {}
    for name, tensor in shapes_of(config).items():
        if name.startswith("model.language_model.layers.") and name.endswith("_proj.weight"):
            stem, (given, taken) = PEFT_PREFIX + name.removesuffix("weight"), tensor.shape
            wanted[stem + "lora_A.weight"] = torch.empty(r, taken, device="meta")
            wanted[stem + "lora_B.weight"] = torch.empty(given, r, device="meta")
        elif is_projector(name):
            wanted[PEFT_PREFIX + name] = tensor
    return wanted


def _original_config(config: LlavaConfig, vision: str) -> dict:
    """The original LLaVA's config.json for a model of transformers."""
    text = config.text_config.to_diff_dict() | {"vocab_size": config.text_config.vocab_size - 1}
    select = "patch" if config.vision_feature_select_strategy == "default" else "cls_patch"
    return text | {
        "model_type": "llava_llama",
        "architectures": ["LlavaLlamaForCausalLM"],
        "mm_vision_tower": vision,
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_select_feature": select,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "image_aspect_ratio": "pad",
    }


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
