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
from llava.features import FeatureCache, stored_features, use_features
from llava.model import adapter_state, load_base


@dataclass
class Student:
    """The model in training: its adapter attached, `fresh` its trainable state before any task, on the CPU."""

    model: torch.nn.Module
    processor: object
    fresh: dict[str, torch.Tensor]
    features: FeatureCache | None


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and torch's generators."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def load_student(
    recipe: Recipe, records: dict[str, TaskRecords], method: Method, features: FeatureCache | None = None
) -> Student:
    """The base model with a fresh adapter, and the pictures' features, if the recipe reuses them and none are given."""
    config = recipe.model
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, config.dtype)
    settings = (config.base, dtype, config.attention, config.quantization)
    if shards_weights(recipe.run.zero):
        load_base(*settings, "meta")  # raises on every rank what the loader of shards does not notice
    with sharded_loading(recipe.run.zero, dtype):
        model, processor = load_base(*settings, device)
    if config.reuse_vision_features:
        if features is None:
            root = image_root(recipe.stream.data_root)
            lists = [[root / name for name in one.prepared.columns.pictures(one.rows)] for one in records.values()]
            with whole(model.model.vision_tower):
                features = stored_features(model, processor.image_processor, lists)
        use_features(model)
    seed_everything(recipe.run.seed)
    model = method.attach(model, config)
    return Student(model, processor, adapter_state(model, "cpu"), features)
