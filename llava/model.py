"""A LLaVA model and its processor: loaded from a folder, given LoRA adapters, saved and restored.

What trains is LoRA on every linear layer of the language model's blocks plus the whole projector, in one PEFT folder.
PEFT is imported where it is needed: it brings bitsandbytes along, which nothing else here asks for.
"""

import copy
import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils import logging

from llava.conversation import END, IMAGE
from llava.files import check_file, check_tokenizer, make_config, read_json, read_tensors, weight_files

QUANTIZATIONS = ("none", "8bit", "nf4", "nf4-double")
NF4_BLOCK = 64  # weights that share a scale
LORA_TARGETS = r"(.*\.)?language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
PROJECTOR = ("linear_1", "linear_2")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def load_base(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "sdpa",
    quantization: str = "none",
    device: torch.device | str = "cpu",
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Return model and processor of a `save_pretrained` folder; pictures are padded to squares, as LLaVA-1.5's are.

    `quantization` (QLoRA, arXiv 2305.14314): the weights of the language model's blocks in `8bit`, or in 4 bits as
    `nf4`, whose scales `nf4-double` quantises once more; the rest keeps `dtype`, in which they are multiplied.
    The weights go tensor by tensor from the file to `device`, so the host never holds a copy of a model for a GPU. On
    `meta` nothing is read but the files' headers: names and shapes are checked. Where transformers is told of ZeRO 3
    (llaca/engines/) every rank keeps 1/N of each tensor.
    Raises FileNotFoundError or ValueError naming the folder if it is not such a folder or does not fit together.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path} has no config.json; give the folder of a Llava model saved by transformers")
    if not any(path.glob("*.safetensors")) and not any(path.glob("*.bin")):
        raise FileNotFoundError(f"{path} holds no weights; checkpoints/README.md says how to make them")
    content = read_json(path / "config.json")
    if "mm_projector_type" in content:
        raise ValueError(
            f"{path} has the original LLaVA layout; convert it with `python -m llava.checkpoint assemble --llm {path}`"
        )
    make_config(LlavaConfig, content, path / "config.json")
    for file in weight_files(path):
        check_file(file)
    settings = {"dtype": dtype, "attn_implementation": attn_implementation}
    if quantization != "none":
        settings["quantization_config"] = _quantization(path, quantization, dtype, content)
    # Quantized weights cannot be moved later. On a CPU the pages of the file are the weights, and ranks share them.
    if quantization != "none" or (torch.device(device).type != "cpu" and not is_deepspeed_zero3_enabled()):
        settings["device_map"] = {"": device}
    model = load_weights(str(path), path, **settings).to(device)
    return model, load_processor(path, model.config)


def open_processor(path: str | Path) -> tuple[LlavaConfig, LlavaProcessor]:
    """Return configuration and processor of a base model's folder, without its weights. Raises as `load_base` does."""
    file = Path(path) / "config.json"
    config = make_config(LlavaConfig, read_json(file), file)
    return config, load_processor(path, config)


def load_processor(path: str | Path, config: LlavaConfig) -> LlavaProcessor:
    """Return the processor of a folder; pictures are padded to squares.

    Raises FileNotFoundError or ValueError naming the file that is missing or broken, or unless it fits `config`.
    """
    path = Path(path)
    check_tokenizer(path)
    if not (path / "processor_config.json").is_file():
        check_file(path / "preprocessor_config.json")  # of an older version, alone
    try:
        processor = LlavaProcessor.from_pretrained(path, backend="pil")
    except Exception as error:  # of many classes, none of which names the folder
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: LlavaProcessor cannot read the processor and tokenizer there ({reason})") from error
    processor.image_processor.do_pad = True
    _check_processor(path, config, processor)
    return processor


def _quantization(path: Path, kind: str, dtype: torch.dtype, content: dict):
    from transformers import BitsAndBytesConfig

    if kind not in QUANTIZATIONS:
        raise ValueError(f"quantization is {kind!r}; it must be one of {QUANTIZATIONS}")
    kept = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    text = content["text_config"]
    widths = [text[key] for key in ("hidden_size", "intermediate_size") if key in text]
    if any(width % NF4_BLOCK for width in widths):
        raise ValueError(f"{path}: nf4 takes widths in multiples of {NF4_BLOCK}, this model has {widths}; take 8bit")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=kind == "nf4-double",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=kept,
    )


def load_weights(name: str, path: Path | None, **settings) -> LlavaForConditionalGeneration:
    """Call `from_pretrained` without its progress bar. Raises ValueError, naming `name`, unless every weight fits."""
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, report = LlavaForConditionalGeneration.from_pretrained(path, output_loading_info=True, **settings)
    finally:
        if bars:
            logging.enable_progress_bar()
    faults = {kind: sorted(map(str, names)) for kind, names in report.items() if names}
    if faults:
        raise ValueError(f"the weights of {name} and its configuration do not fit: {faults}")
    return model


def image_tokens(config) -> int:
    """Return how many tokens one picture takes in the language model's sequence."""
    vision = config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    return patches + (config.vision_feature_select_strategy == "full")


def attach_lora(
    model: LlavaForConditionalGeneration,
    r: int,
    alpha: float,
    dropout: float,
    layer: Callable[..., nn.Module] | None = None,
) -> nn.Module:
    """Return `model` with fresh LoRA adapters and a trainable copy of the projector; both train in float32.

    `layer` makes the adapted linear layers, from the arguments of `peft.tuners.lora.Linear`; None: that class.
    Draws from torch's global generator: seed it before. Raises ValueError if anything else would train.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=LORA_TARGETS, modules_to_save=list(PROJECTOR)
    )
    if layer is not None:
        config._register_custom_module({nn.Linear: layer})
    model = get_peft_model(model, config)
    for parameter in trainable_parameters(model).values():
        parameter.data = parameter.data.float()
    _check_trainables(model)
    return model


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what trains, by name, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def reset_projector(model: nn.Module) -> None:
    """Draw the trainable projector anew, from torch's global generator, as torch does for a new layer."""
    for name, module in model.named_modules():
        if name.endswith(tuple(f"multi_modal_projector.{linear}.modules_to_save.default" for linear in PROJECTOR)):
            module.reset_parameters()


def is_projector(name: str) -> bool:
    """Tell whether a parameter name, of the runtime or of an adapter file, belongs to the projector."""
    return "multi_modal_projector." in name


def adapter_state(model: nn.Module, device: torch.device | str | None = None) -> dict[str, torch.Tensor]:
    """Return a copy of what trains, by parameter name, on `device` or where it is."""
    found = trainable_parameters(model)
    return {name: parameter.detach().to(device or parameter.device, copy=True) for name, parameter in found.items()}


def set_adapter_state(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Put a state of `adapter_state` back, in place. Raises ValueError listing names or shapes that do not match."""
    parameters = trainable_parameters(model)
    check_same("the adapter state", parameters, state)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])


def save_adapter(model: nn.Module, folder: str | Path, weights: dict[str, torch.Tensor] | None = None) -> None:
    """Write LoRA and projector as one PEFT folder, then read it back. Raises ValueError if it holds no usable adapter.

    `weights` by parameter name take the place of the model's own, which an engine may have rounded or sharded. The same
    weights, attached to the same base path, give the same bytes.
    """
    from peft import get_peft_model_state_dict

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if weights is not None and weights.keys() != trainable_parameters(model).keys():
        raise ValueError(f"weights to save: {sorted(weights.keys() ^ trainable_parameters(model).keys())} do not fit")
    rests = {name: p for name, p in model.named_parameters() if "lora_" in name and not p.requires_grad}
    state = get_peft_model_state_dict(model, weights and {**rests, **weights}, save_embedding_layers=False)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    config = copy.copy(model.peft_config["default"])
    config.inference_mode = True
    config.save_pretrained(folder)

    saved = load_file(folder / WEIGHTS)
    check_same(f"{folder / WEIGHTS}", state, saved)
    broken = [name for name, tensor in saved.items() if not tensor.numel() or not torch.isfinite(tensor).all()]
    if broken:
        raise ValueError(f"{folder / WEIGHTS} holds empty or non-finite tensors: {broken}")


def load_adapter(model: nn.Module, folder: str | Path) -> None:
    """Load a folder of `save_adapter` into an attached model.

    Raises FileNotFoundError or ValueError naming the file that is missing or cannot be read, ValueError if rank or
    alpha differ, or listing the missing and unexpected keys and the differing shapes.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    folder, config = Path(folder), model.peft_config["default"]
    saved_config = read_json(folder / CONFIG)
    for key in ("r", "lora_alpha"):
        ours, theirs = getattr(config, key), saved_config.get(key)
        if ours != theirs:
            raise ValueError(f"{folder / CONFIG} has {key} {theirs}, the model {ours}; attach LoRA with the same value")
    saved = read_tensors(folder / WEIGHTS)
    check_same(f"{folder / WEIGHTS}", get_peft_model_state_dict(model, save_embedding_layers=False), saved)
    set_peft_model_state_dict(model, saved)


def check_same(source: str, wanted: dict[str, torch.Tensor], given: dict[str, torch.Tensor]) -> None:
    """Raise ValueError listing missing, unexpected and misshapen tensors of `given`, which comes from `source`."""
    faults = {
        "missing": sorted(wanted.keys() - given.keys()),
        "unexpected": sorted(given.keys() - wanted.keys()),
        "shape": sorted(name for name in wanted.keys() & given.keys() if wanted[name].shape != given[name].shape),
    }
    if any(faults.values()):
        raise ValueError(
            f"{source} does not fit the model: { {kind: names for kind, names in faults.items() if names} }"
        )


def _check_processor(path: Path, config, processor: LlavaProcessor) -> None:
    tokenizer, rows = processor.tokenizer, config.text_config.vocab_size
    if tokenizer.convert_tokens_to_ids(IMAGE) != config.image_token_id:
        raise ValueError(
            f"{path}: {IMAGE} is not the tokenizer's token {config.image_token_id}, which config.json names"
        )
    if rows != len(tokenizer):
        raise ValueError(
            f"{path}: the model has {rows} words, the tokenizer {len(tokenizer)}; the rest would take part in every "
            f"loss. `python -m llava.checkpoint assemble --llm {path} --out DIR` takes it away"
        )
    if tokenizer.eos_token != END:
        raise ValueError(f"{path}: turns end in {END} but the tokenizer's end of text is {tokenizer.eos_token!r}")
    if tokenizer.pad_token_id in (None, config.image_token_id):
        raise ValueError(f"{path}: the tokenizer needs a pad token of its own; set pad_token in its config")
    size, crop = config.vision_config.image_size, processor.image_processor.crop_size
    if (crop["height"], crop["width"]) != (size, size):
        raise ValueError(f"{path}: the image processor makes {crop}, the vision tower takes {size} x {size} pixels")


def _check_trainables(model: nn.Module) -> None:
    lora = re.compile(r".*\.language_model\..*\.lora_\w+\.default\.weight")
    projector = re.compile(r".*\.multi_modal_projector\.(linear_1|linear_2)\.modules_to_save\.default\.(weight|bias)")
    names = list(trainable_parameters(model))
    stray = [name for name in names if not lora.fullmatch(name) and not projector.fullmatch(name)]
    if stray or not any(map(lora.fullmatch, names)) or not any(map(projector.fullmatch, names)):
        raise ValueError(f"LoRA on the language model and the projector should train, and nothing else; stray: {stray}")
