"""After EProj (He et al., "Continual Instruction Tuning for Large Multimodal Models", arXiv 2311.16206): the language
model rests, and what trains is the projector between pictures and language, one for each group of similar tasks.

    h = LLM( projector_k(vision(picture)), text ),    k the group of the task

A task that resembles none of the groups gets a projector of its own, which starts from the latest; a test set is
answered with the projector of the most similar group. Similarity is that of the paper's instruction grouping
(llaca/grouping.py). The regularisation by task similarity that EProj trains with is not here.

LoRA is attached as everywhere, so that adapters have one format, but rests at zero: the language model is the base's.
"""

from typing import ClassVar

from torch import nn

from llaca.methods.base import WHOLE_TENSORS, Method
from llaca.sections import ModelConfig
from llava.adapters import is_connector, trainable_parameters
from llava.backbone import Backbone


class EProj(Method):
    """A projector per group; a text without a picture trains nothing."""

    engines = WHOLE_TENSORS
    changes: ClassVar = {"grouping": True, "projector_learning_rate": 2e-4}

    def attach(self, model: nn.Module, backbone: Backbone, config: ModelConfig) -> nn.Module:
        """Raises ValueError for a backbone without a connector."""
        if not backbone.connector:
            raise ValueError("method eproj trains the projector alone, and this base model has none; take another")
        model = super().attach(model, backbone, config)
        for name, parameter in trainable_parameters(model).items():
            parameter.requires_grad_(is_connector(name))
        return model
