"""The model that is trained: a base with a fresh adapter, and the pictures' features where a recipe reuses them."""

import random
from dataclasses import dataclass

import numpy as np
import torch

from data.benchmark import image_root
from llaca.config import Recipe
from llaca.engines.deepspeed import sharded_loading, whole
from llaca.engines.zero import shards_weights
from llaca.methods.base import Method
from llaca.records import TaskRecords
from llava.adapters import adapter_state
from llava.backbone import Backbone
from llava.backbones import load_base
from llava.features import FeatureCache


@dataclass
class AdaptedModel:
    """A base with its adapter attached. `fresh`: what trains, before any task, on the CPU; `features`: those in use."""

    model: torch.nn.Module
    backbone: Backbone
    fresh: dict[str, torch.Tensor]
    features: FeatureCache | None


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and torch's generators."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def load_adapted(
    recipe: Recipe, records: dict[str, TaskRecords], method: Method, features: FeatureCache | None = None
) -> AdaptedModel:
    """The base model with a fresh adapter, and the pictures' features, if the recipe reuses them and none are given.

    Raises ValueError for a base that the recipe does not fit.
    """
    config = recipe.model
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, config.dtype)
    settings = (config.base, dtype, config.attention, config.quantization)
    if shards_weights(recipe.engine.zero):
        load_base(*settings, "meta", config.options)  # raises on every rank what the loader of shards does not notice
    with sharded_loading(recipe.engine.zero, dtype):
        model, backbone = load_base(*settings, device, config.options)
    if config.legacy_projector_reset and not backbone.connector:
        raise ValueError("legacy_projector_reset: this base model has no projector; leave it out")
    if config.reuse_vision_features:
        if features is None:
            root = image_root(recipe.stream.data_root)
            lists = [[root / name for name in one.prepared.columns.pictures(one.rows)] for one in records.values()]
            with whole(backbone.vision(model)):
                features = backbone.vision_features(model, lists)
        backbone.use_features(model, features)
    seed_everything(recipe.run.seed)
    model = method.attach(model, backbone, config)
    return AdaptedModel(model, backbone, adapter_state(model, "cpu"), features)
