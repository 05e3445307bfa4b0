"""The frozen vision tower's output, computed once per picture and used in every epoch, stage and evaluation after that.

`cache_features` runs the tower over a list of pictures; `use_features` puts a `CachedVisionTower` in its place, which
takes the cached tensors where the stock model expects pixels. Projector, language model, `forward` and `generate` are
the stock ones and see the same numbers.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm
from transformers.modeling_outputs import BaseModelOutputWithPooling

from llava.image import load_image, to_pixels


class FeatureCache:
    """Hidden states by picture path: `cache(path)` is `[layers, tokens, width]`, in the order of the configuration."""

    def __init__(self, paths: Sequence[Path], features: torch.Tensor):
        self._features, self._row = features, {path: row for row, path in enumerate(paths)}

    def __call__(self, path: Path) -> torch.Tensor:
        """Raises KeyError naming a picture that was not among the cached ones."""
        if path not in self._row:
            raise KeyError(f"{path} is not among the {len(self._row)} cached pictures; cache it before using it")
        return self._features[self._row[path]]


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
    if isinstance(owner.vision_tower, CachedVisionTower):
        raise ValueError("the vision tower was already replaced; cache all pictures before calling use_features")
    parameter, rows = next(owner.vision_tower.parameters()), []
    for start in tqdm(range(0, len(paths), batch_size), desc="vision features", leave=False, delay=3):
        images = [load_image(path) for path in paths[start : start + batch_size]]
        pixels = to_pixels(image_processor, images).to(parameter.device, parameter.dtype)
        states = owner.vision_tower(pixels, output_hidden_states=True).hidden_states
        rows.append(torch.stack([states[layer] for layer in _layers(owner)], dim=1).cpu())
    return FeatureCache(paths, torch.cat(rows) if rows else torch.empty(0))


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
