"""L2 regularisation towards the weights after the last task: what EWC weighs by Fisher information, all alike.

    L = CE + lambda sum_i (theta_i - theta*_i)^2

As in CITB (arXiv 2310.14510, the row L2 of the paper's Table 8), whose scripts have lambda 0.01 for all weights of a
T5-small at a learning rate of 1e-5.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llaca.engines.shards import Shards
from llaca.fields import setting
from llaca.methods.base import WHOLE_TENSORS, Method


class L2(Method):
    """LoRA with a quadratic penalty around the last task's weights."""

    @dataclass
    class Settings:
        penalty: float = setting(0.01, "lambda, the weight of the penalty", least=0)

    engines = WHOLE_TENSORS

    def __init__(self, settings: Settings | None = None):
        super().__init__(settings)
        self.anchor: dict[str, Tensor] = {}

    def recall(self, memory: dict) -> None:
        weights = self.stage.weights()
        self.anchor = {name: anchor.to(weights[name].device) for name, anchor in memory.get("anchor", {}).items()}

    def loss(self, model, inputs, outputs) -> Tensor | None:
        """lambda sum_i (theta_i - theta*_i)^2, None in the first stage of these parameters."""
        if not self.anchor:
            return None
        # Weights that an engine holds in bfloat16 are compared with what bfloat16 makes of the anchor.
        pairs = [(w, self.anchor[name].to(w.dtype)) for name, w in self.stage.weights().items()]
        return self.settings.penalty * torch.stack([(w.float() - a.float()).square().sum() for w, a in pairs]).sum()

    def after_task(self, shards: Shards, folder: Path) -> tuple[None, dict]:
        self.anchor = shards.layout.gather(shards.parameters)
        return None, {}

    def memory(self) -> dict:
        return {"anchor": {name: anchor.cpu() for name, anchor in self.anchor.items()}}
