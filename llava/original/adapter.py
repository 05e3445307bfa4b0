"""LoRA adapters in the layout of the original LLaVA code, both ways, and merged into their base."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlavaConfig, LlavaForConditionalGeneration

from llava.adapters import CONFIG, WEIGHTS
from llava.backbones.llava15 import Llava15
from llava.files import check_finite, check_same, read_object
from llava.merge import NEUTRAL_STARTS, lora_config, mergeable_config, merged_weights
from llava.original.base import Base, config_of, shapes_of, write_base
from llava.original.names import PEFT_PREFIX, State, is_projector, of_hub, read_weights, to_original, to_transformers

LINEARS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
ORIGINAL_LORA, ORIGINAL_REST = "adapter_model.bin", "non_lora_trainables.bin"
# What LLaVA's own LoRA is, which the original layout can express, by PEFT's names.
PLAIN_LORA = {"peft_type": "LORA", "bias": "none", "fan_in_fan_out": False, "modules_to_save": None}
# What else changes the forward pass; a folder that asks for it is no plain LoRA.
VARIANTS = (
    *("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "lora_bias", "layers_to_transform", "layers_pattern"),
    *(
        "exclude_modules",
        "trainable_token_indices",
        "target_parameters",
        "layer_replication",
        "use_qalora",
        "use_bdlora",
    ),
    *("alora_invocation_tokens", "arrow_config", "kasa_config", "velora_config", "monteclora_config", "expert_num"),
)


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
    config = _plain_config(source / CONFIG)
    lora = source / (WEIGHTS if (source / WEIGHTS).is_file() else ORIGINAL_LORA)
    state = import_adapter(lora, source / ORIGINAL_REST)
    model = config_of(Path(base or source))
    check_same(f"the adapter in {source}", _adapter_shapes(model, config["r"]), state)
    named = str(base) if base else config.get("base_model_name_or_path")
    out.mkdir(parents=True, exist_ok=True)
    LoraConfig(
        r=config["r"],
        lora_alpha=config["lora_alpha"],
        lora_dropout=config.get("lora_dropout", 0.0),
        target_modules=Llava15.lora_targets,
        modules_to_save=list(Llava15.connector),
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
    the original finds its vision tower. Raises what `import_adapter_folder` raises.
    """
    source, out = Path(source), Path(out)
    config, state = _plain_config(source / CONFIG, Llava15.connector), read_weights(source / WEIGHTS)
    if not (base or config.get("base_model_name_or_path")):
        raise ValueError(f"{source / CONFIG} names no base; give its folder as --base")
    base = Path(base or config["base_model_name_or_path"])
    model = config_of(base)
    check_same(f"the adapter in {source}", _adapter_shapes(model, config["r"]), state)
    out.mkdir(parents=True, exist_ok=True)
    for name, tensors in zip((ORIGINAL_LORA, ORIGINAL_REST), export_adapter(state), strict=True):
        torch.save(tensors, out / name)
    kept = ("base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "inference_mode", "init_lora_weights")
    lora = PLAIN_LORA | {key: config[key] for key in kept if key in config}
    lora |= {"target_modules": LINEARS, "task_type": "CAUSAL_LM"}
    _write_json(out / CONFIG, lora)
    _write_json(out / "config.json", _original_config(model, vision))


def merge(base: str | Path, adapter: str | Path, out: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write the base with a PEFT folder's LoRA added to its weights, and its whole modules (the projector) in place.

    Scaling and variants are those that PEFT's own configuration says. Each sum is made in float32, whatever base and
    adapter are stored in, and rounded once to `dtype`, by default the weight's own in the base. Other tensors keep
    their bits unless `dtype` says otherwise.
    Raises ValueError naming what PEFT's merging cannot express, what does not fit, and tensors that are not finite.
    """
    base, adapter = Path(base), Path(adapter)
    settings = mergeable_config(adapter / CONFIG)
    if "mm_projector_type" in read_object(base / "config.json"):
        raise ValueError(f"{base} has the original LLaVA layout; assemble a base of it first")
    config = config_of(base)
    processor = Llava15.read_processor(base, config)
    given, weights = read_weights(adapter / WEIGHTS), read_weights(base)
    state = {of_hub(name): tensor for name, tensor in weights.items()}
    if config.tie_word_embeddings:
        state.setdefault("lm_head.weight", state.get("model.language_model.embed_tokens.weight"))
    check_same(str(base), shapes_of(config), state)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    model.load_state_dict(state, assign=True)
    merged = merged_weights(model, settings, given, adapter, dtype)
    merged = {name: tensor.to(dtype or state[name].dtype) for name, tensor in merged.items()}
    check_finite(f"the sum of {base} and {adapter} in {dtype or 'the dtype of the base'}", merged)
    write_base(Base(config, merged, processor), out, dtype)


def _plain_config(file: Path, modules_to_save: tuple[str, ...] | None = None) -> dict:
    """The configuration of plain LoRA with these whole modules; refuses any other by name."""
    config = lora_config(file)
    found = {key: config.get(key, plain) for key, plain in PLAIN_LORA.items()}
    found["modules_to_save"] = found["modules_to_save"] and tuple(sorted(found["modules_to_save"]))
    wanted = PLAIN_LORA | {"modules_to_save": modules_to_save}
    strange = {key: value for key, value in found.items() if value != wanted[key]}
    strange |= {key: config[key] for key in VARIANTS if config.get(key)}
    if config.get("init_lora_weights", True) not in NEUTRAL_STARTS:
        strange["init_lora_weights"] = config["init_lora_weights"]
    if strange:
        raise ValueError(f"{file} is not of the plain LoRA that LLaVA trains: {strange}")
    return config


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
