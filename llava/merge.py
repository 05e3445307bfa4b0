"""An adapter added to the weights of its base, by PEFT's own merging, in float32.

A family writes what comes of it: most of them as transformers saves a model, with the base's other files beside it.
"""

import shutil
from pathlib import Path

import torch
from torch import Tensor, nn

from llava.adapters import CONFIG, WEIGHTS
from llava.backbones import family_of, load_base
from llava.files import check_finite, check_same, read_object, read_tensors

# What PEFT adds to the weights exactly; init_lora_weights only where it leaves the base's weights as they are.
MERGED = {
    *("peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "modules_to_save", "bias"),
    *("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "layers_to_transform"),
    *("layers_pattern", "init_lora_weights", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
    *("revision", "inference_mode", "megatron_core", "qalora_group_size", "runtime_config"),
}
# Files of weights, of any framework: those of the base are not the merged model's.
WEIGHTS_OF_OTHERS = {".safetensors", ".bin", ".h5", ".msgpack", ".ot", ".pt", ".pth", ".onnx", ".gguf"}
NEUTRAL_STARTS = (True, False, "gaussian", "eva", "orthogonal", None)


def merge_folder(base: str | Path, adapter: str | Path, out: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write the base with a PEFT folder's LoRA added to its weights, and its whole modules in place.

    Scaling and variants are those that PEFT's own configuration says. The dtype is `dtype`, by default the one that the
    base's configuration names. Raises ValueError naming what PEFT's merging cannot express, what does not fit, and
    tensors that are not finite.
    """
    base, adapter, out = Path(base), Path(adapter), Path(out)
    settings, given = mergeable_config(adapter / CONFIG), read_tensors(adapter / WEIGHTS)
    model, _ = load_base(base, "auto")
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    if tied and (heads := [name for name in given if "lm_head" in name or "embed_tokens" in name]):
        raise ValueError(f"{adapter} changes a head that {base} shares with its embedding: {heads}; PEFT adds it twice")
    kept = dtype or model.dtype
    merged = merged_weights(model, settings, given, adapter, dtype)
    merged = {name: tensor.to(kept) if tensor.is_floating_point() else tensor for name, tensor in merged.items()}
    check_finite(f"the sum of {base} and {adapter} in {kept}", merged)
    with torch.device("meta"):
        whole = family_of(base).model_class(model.config)
    whole.load_state_dict(merged, assign=True)
    if tied:  # whatever the configuration says: that of T5 v1.1 would tie its head
        whole.tie_weights()
    whole.to(kept).save_pretrained(out)
    for file in base.iterdir():
        kind = file.suffix in WEIGHTS_OF_OTHERS or file.name.endswith(".index.json")
        if file.is_file() and not kind and file.name != "config.json":
            shutil.copyfile(file, out / file.name)


def merged_weights(
    model: nn.Module, settings, given: dict[str, Tensor], adapter: Path, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """Return the weights of `model` with the adapter `given` in or on them, in the names of the model.

    Each sum is made in float32 and rounded once, to `dtype` or to the weight's own. Raises ValueError naming what does
    not fit.
    """
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper

    settings.base_model_name_or_path = None  # the base is the one given, and no reason for a warning
    try:
        model = get_peft_model(model, settings)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{adapter / CONFIG} does not fit the model ({' '.join(str(error).split())})") from error
    check_same(f"{adapter / WEIGHTS}", get_peft_model_state_dict(model, save_embedding_layers=False), given)
    for module in list(model.modules()):
        if isinstance(module, ModulesToSaveWrapper):
            module.modules_to_save.float()  # copies of the base's, into which the adapter's values go
    set_peft_model_state_dict(model, given)
    for layer in list(model.modules()):
        if isinstance(layer, LoraLayer):
            own = layer.get_base_layer().weight.dtype
            layer.to(torch.promote_types(own, torch.float32)).merge()
            layer.get_base_layer().to(dtype or own)
    return model.unload().state_dict()


def mergeable_config(file: Path):
    """Return PEFT's configuration of an adapter. Raises ValueError naming what its merging leaves out, or makes another
    model of."""
    from peft import LoraConfig

    content, plain = lora_config(file), LoraConfig()
    if content.get("peft_type") != "LORA":
        raise ValueError(f"{file} is not of LoRA: its peft_type is {content.get('peft_type')!r}")
    fields = {key: getattr(plain, key, None) for key in content.keys() - MERGED}
    strange = {key: content[key] for key in sorted(fields) if content[key] and content[key] != fields[key]}
    if content.get("init_lora_weights", True) not in NEUTRAL_STARTS:
        strange["init_lora_weights"] = content["init_lora_weights"]
    if strange:
        raise ValueError(f"{file} asks for what merging cannot express: {strange}; load base and adapter with PEFT")
    try:
        return LoraConfig.from_pretrained(file.parent)
    except Exception as error:
        raise ValueError(f"{file} is not what PEFT's LoraConfig takes ({' '.join(str(error).split())})") from error


def lora_config(file: Path) -> dict:
    """Return the object in an adapter_config.json. Raises ValueError unless it has a rank and a scale."""
    content = read_object(file)
    for key in ("r", "lora_alpha"):
        if not isinstance(content.get(key), int | float) or content[key] <= 0:
            raise ValueError(f"{file}: {key} should be a positive number, it is {content.get(key)!r}")
    return content
