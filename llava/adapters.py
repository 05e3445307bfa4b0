"""What trains of a model: LoRA on its linear layers plus its whole connector, attached, saved and restored.

Both go into one PEFT folder. PEFT is imported where it is needed: it brings bitsandbytes along, which nothing else here
asks for.
"""

import copy
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from llava.backbone import Backbone
from llava.files import check_same, read_object, read_tensors

if TYPE_CHECKING:
    from peft import PeftConfig

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
ADAPTED = re.compile(r"\.(lora|oft)_")  # in the name of what an adapted layer has of its own


def attach_lora(
    model: nn.Module,
    backbone: Backbone | type[Backbone],
    r: int,
    alpha: float,
    dropout: float,
    layer: Callable[..., nn.Module] | None = None,
) -> nn.Module:
    """Return `model` with fresh LoRA adapters and a trainable copy of the connector; both train in float32.

    `layer` makes the adapted linear layers, from the arguments of `peft.tuners.lora.Linear`; None: that class.
    Draws from torch's global generator: seed it before. Raises ValueError if anything else would train.
    """
    from peft import LoraConfig

    config = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout)
    if layer is not None:
        config._register_custom_module({nn.Linear: layer})
    return attach(model, backbone, config)


def attach(model: nn.Module, backbone: Backbone | type[Backbone], config: "PeftConfig") -> nn.Module:
    """As `attach_lora`, for an adapter of PEFT's on the same layers: `LoraConfig` or `OFTConfig`."""
    from peft import get_peft_model

    config.target_modules, config.modules_to_save = backbone.lora_targets, list(backbone.connector) or None
    with warnings.catch_warnings():  # PEFT asks for a name that transformers 5 has replaced
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        model = get_peft_model(model, config)
    for parameter in trainable_parameters(model).values():
        parameter.data = parameter.data.float()
    _check_trainables(model, backbone)
    return model


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what trains, by name, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def reset_connector(model: nn.Module) -> None:
    """Draw the trainable connector anew, from torch's global generator, as torch does for new layers."""
    from peft.utils import ModulesToSaveWrapper

    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            for layer in module.modules_to_save["default"].modules():
                if hasattr(layer, "reset_parameters"):
                    layer.reset_parameters()
                elif (weight := getattr(layer, "weight", None)) is not None:  # a norm of transformers' own
                    torch.nn.init.ones_(weight)


def is_connector(name: str) -> bool:
    """Tell whether what trains under this name, in a model or an adapter file, belongs to the connector; else it is of
    an adapted layer."""
    return not ADAPTED.search(name)


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
    """Write LoRA and connector as one PEFT folder, then read it back. Raises ValueError if it holds no usable adapter.

    `weights` by parameter name take the place of the model's own, which an engine may have rounded or sharded. The same
    weights, attached to the same base path, give the same bytes.
    """
    from peft import get_peft_model_state_dict

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if weights is not None and weights.keys() != trainable_parameters(model).keys():
        raise ValueError(f"weights to save: {sorted(weights.keys() ^ trainable_parameters(model).keys())} do not fit")
    if weights is not None:  # what the adapter has beside them
        weights = {name: t for name, t in model.state_dict().items() if not is_connector(name)} | weights
    state = get_peft_model_state_dict(model, weights, save_embedding_layers=False)
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

    Raises FileNotFoundError or ValueError naming the file that is missing or cannot be read, ValueError if rank, alpha
    or block size differ, or listing the missing and unexpected keys and the differing shapes.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    folder, config = Path(folder), model.peft_config["default"]
    saved_config = read_object(folder / CONFIG)
    for key in ("r", "lora_alpha", "oft_block_size"):
        ours, theirs = getattr(config, key, None), saved_config.get(key)
        if ours != theirs:
            raise ValueError(f"{folder / CONFIG} has {key} {theirs}, the model {ours}; attach it with the same value")
    saved = read_tensors(folder / WEIGHTS)
    check_same(f"{folder / WEIGHTS}", get_peft_model_state_dict(model, save_embedding_layers=False), saved)
    set_peft_model_state_dict(model, saved)


def _check_trainables(model: nn.Module, backbone: Backbone | type[Backbone]) -> None:
    lora = re.compile(rf"base_model\.model\.(?:{backbone.lora_targets})\.(?:lora|oft)_\w+\.default\.weight")
    whole = re.compile(rf".*\.({'|'.join(backbone.connector)})\.modules_to_save\.default\.[\w.]+")
    names = list(trainable_parameters(model))
    kinds = {"the adapter": lora} | ({"the connector": whole} if backbone.connector else {})
    stray = [name for name in names if not any(kind.fullmatch(name) for kind in kinds.values())]
    missing = [what for what, kind in kinds.items() if not any(map(kind.fullmatch, names))]
    if stray or missing:
        raise ValueError(f"{' and '.join(kinds)} should train, and nothing else; missing: {missing}, stray: {stray}")
