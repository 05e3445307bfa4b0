"""The frozen vision tower's output, computed once per picture and used in every epoch, stage and evaluation after that.

`cache_features` runs the tower over a list of pictures; `use_features` puts a `CachedVisionTower` in its place, which
takes the cached tensors where the stock model expects pixels. Projector, language model, `forward` and `generate` are
the stock ones and see the same numbers.

`stored_features` keeps them on the disk, <cache>/features/<checksum>.safetensors for each list of pictures, so that
runs, seeds and evaluation share them: mapped into memory, computed by whoever comes first.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm
from transformers.modeling_outputs import BaseModelOutputWithPooling

from data.cache import cache_folder, make_once
from data.pictures import load_image
from llava.image import to_pixels

VERSION = 1  # of the files' content


class FeatureCache:
    """Hidden states by picture path: `cache(path)` is `[layers, tokens, width]`, in the order of the configuration."""

    def __init__(self, paths: Sequence[Path], features: torch.Tensor):
        self._rows = {path: (features, row) for row, path in enumerate(paths)}

    def __or__(self, other: "FeatureCache") -> "FeatureCache":
        """The pictures of both."""
        whole = FeatureCache((), torch.empty(0))
        whole._rows = self._rows | other._rows
        return whole

    def __call__(self, path: Path) -> torch.Tensor:
        """Raises KeyError naming a picture that was not among the cached ones."""
        if path not in self._rows:
            raise KeyError(f"{path} is not among the {len(self._rows)} cached pictures; cache it before using it")
        features, row = self._rows[path]
        return features[row]


class CachedVisionTower(nn.Module):
    """Stands where the vision tower stood: hands cached hidden states `[pictures, layers, tokens, width]` through."""

    def __init__(self, layers: Sequence[int]):
        super().__init__()
        self.layers = list(layers)

    def forward(self, pixel_values: torch.Tensor, **_) -> BaseModelOutputWithPooling:
        """Return an output whose `hidden_states` holds the configured layers, under the configuration's own indices."""
        if pixel_values.ndim != 4 or pixel_values.shape[1] != len(self.layers):
            shape = list(pixel_values.shape)
            raise ValueError(f"cached features [pictures, {len(self.layers)}, tokens, width] expected, got {shape}")
        return BaseModelOutputWithPooling(hidden_states=dict(zip(self.layers, pixel_values.unbind(1), strict=True)))


@torch.no_grad()
def cache_features(model, image_processor, paths: Sequence[Path], batch_size: int = 64) -> FeatureCache:
    """Run the vision tower of `model` (a Llava model, with or without PEFT) over the pictures, each path once."""
    owner, paths = _owner(model), list(dict.fromkeys(paths))
    return FeatureCache(paths, _compute(owner, image_processor, paths, batch_size))


def stored_features(model, image_processor, lists: Sequence[Sequence[Path]]) -> FeatureCache:
    """`cache_features` for lists of pictures, each list a file of the cache. Processes that need the same lists at the
    same time share the work: what another one computes is waited for last."""
    owner, found = _owner(model), FeatureCache((), torch.empty(0))
    tower, waiting = _digest(owner, image_processor), {}
    for paths in lists:
        distinct = list(dict.fromkeys(paths))
        if distinct:
            waiting[cache_folder() / "features" / f"{_name(tower, distinct)}.safetensors"] = distinct

    def make(file: Path, partial: Path) -> None:
        save_file({"features": _compute(owner, image_processor, waiting[file], 64)}, partial)

    make_once(list(waiting), make, _is_whole)
    for file, paths in waiting.items():
        found = found | FeatureCache(paths, _load(file))
    return found


def _load(file: Path) -> torch.Tensor:
    with safe_open(file, framework="pt") as content:
        return content.get_tensor("features")


def _is_whole(file: Path) -> bool:
    try:
        _load(file)
    except (FileNotFoundError, SafetensorError):
        return False
    return True


@torch.no_grad()
def _compute(owner, image_processor, paths: Sequence[Path], batch_size: int) -> torch.Tensor:
    if isinstance(owner.vision_tower, CachedVisionTower):
        raise ValueError("the vision tower was already replaced; cache all pictures before calling use_features")
    parameter, rows = next(owner.vision_tower.parameters()), []
    for start in tqdm(range(0, len(paths), batch_size), desc="vision features", leave=False, delay=3):
        images = [load_image(path) for path in paths[start : start + batch_size]]
        pixels = to_pixels(image_processor, images).to(parameter.device, parameter.dtype)
        states = owner.vision_tower(pixels, output_hidden_states=True).hidden_states
        rows.append(torch.stack([states[layer] for layer in _layers(owner)], dim=1).cpu())
    return torch.cat(rows) if rows else torch.empty(0)


def _digest(owner, image_processor) -> str:
    """What tells vision towers apart: weights, settings, and what may round otherwise."""
    digest = hashlib.sha256()
    for name, tensor in sorted(owner.vision_tower.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    parameter = next(owner.vision_tower.parameters())
    device = torch.cuda.get_device_name() if parameter.is_cuda else torch.backends.cpu.get_cpu_capability()
    vision = owner.config.vision_config  # whose JSON says nothing of the attention
    settings = (vision.to_json_string(), vision._attn_implementation, image_processor.to_json_string(), _layers(owner))
    digest.update(repr((VERSION, settings, device, torch.__version__, transformers.__version__)).encode())
    return digest.hexdigest()


def _name(tower: str, paths: Sequence[Path]) -> str:
    """The name of the file with these pictures' features: it changes with a picture's size or time of change."""
    digest = hashlib.sha256(tower.encode())
    for path in paths:
        stat = path.stat()
        digest.update(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def use_features(model) -> None:
    """Replace the vision tower of `model`, in place, by one that takes cached features as its `pixel_values`."""
    owner = _owner(model)
    owner.vision_tower = CachedVisionTower(_layers(owner))


def blank_pixels(owner: nn.Module) -> torch.Tensor:
    """Return one picture of zeros as the LlavaModel `owner` takes it: pixels, or cached features."""
    vision, weight = owner.config.vision_config, next(owner.multi_modal_projector.parameters())
    if isinstance(owner.vision_tower, CachedVisionTower):
        size = (1, len(owner.vision_tower.layers), 2, vision.hidden_size)  # the class token and one patch
    else:
        size = (1, 3, vision.image_size, vision.image_size)
    return torch.zeros(size, device=weight.device, dtype=owner.dtype)


def _owner(model) -> nn.Module:
    """Return the stock LlavaModel that holds the tower, below PEFT's wrapping if there is one."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.model


def _layers(owner) -> list[int]:
    layer = owner.config.vision_feature_layer
    return [layer] if isinstance(layer, int) else list(layer)
