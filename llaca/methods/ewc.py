"""Elastic weight consolidation (Kirkpatrick et al., arXiv 1612.00796; online: Schwarz et al., arXiv 1805.06370).

    L = CE + lambda/2 sum_i F_i (theta_i - theta*_i)^2

F is the diagonal Fisher information of earlier tasks (llaca/fisher.py), theta* the weights after them. `online`: F is
the sum over the tasks (gamma 1) and theta* the last weights. `per_task`: a penalty a task, and their sum, which is, but
for a constant, of the same form with the Fisher-weighted mean of the tasks' weights as theta*.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from llaca.engines.shards import Shards
from llaca.fields import setting
from llaca.fisher import diagonal_fisher
from llaca.methods.base import WHOLE_TENSORS, Method


class EWC(Method):
    """LoRA with a quadratic penalty around the weights that earlier tasks needed."""

    @dataclass
    class Settings:
        penalty: float = setting(1000.0, "lambda, the weight of the penalty", least=0)
        consolidation: Literal["online", "per_task"] = setting("online", "one anchor, the last weights, or one a task")
        estimate_records: int = setting(200, "records that the Fisher information is estimated from", least=1)

    engines = WHOLE_TENSORS

    def __init__(self, settings: Settings | None = None):
        super().__init__(settings)
        self.fisher: dict[str, Tensor] = {}
        self.anchor: dict[str, Tensor] = {}

    def recall(self, memory: dict) -> None:
        weights = self.stage.weights()
        self.fisher = {name: fisher.to(weights[name].device) for name, fisher in memory.get("fisher", {}).items()}
        self.anchor = {name: anchor.to(weights[name].device) for name, anchor in memory.get("anchor", {}).items()}

    def loss(self, model, inputs, outputs) -> Tensor | None:
        """lambda/2 sum_i F_i (theta_i - theta*_i)^2, None in the first stage of these parameters."""
        return self.penalty(self.stage.weights()) if self.fisher else None

    def penalty(self, weights: dict[str, Tensor]) -> Tensor:
        """The term at these weights (whole tensors by name)."""
        # Weights that an engine holds in bfloat16 are compared with what bfloat16 makes of the anchor.
        moved = {name: w.float() - self.anchor[name].to(w.dtype).float() for name, w in weights.items()}
        terms = [(self.fisher[name] * difference.square()).sum() for name, difference in moved.items()]
        return self.settings.penalty / 2 * torch.stack(terms).sum()

    def after_task(self, shards: Shards, folder: Path) -> tuple[None, dict]:
        new = diagonal_fisher(self.stage, self.settings.estimate_records)
        for name, weight in shards.layout.gather(shards.parameters).items():
            weight, before = weight.to(new[name].device), self.fisher.get(name, torch.zeros_like(new[name]))
            total = before + new[name]
            if self.settings.consolidation == "per_task" and name in self.anchor:
                mean = (before * self.anchor[name] + new[name] * weight) / total
                weight = torch.where(total > 0, mean, weight)
            self.fisher[name], self.anchor[name] = total, weight
        return None, {"fisher_mean": float(torch.cat([f.flatten() for f in new.values()]).mean())}

    def memory(self) -> dict:
        return {key: {n: t.cpu() for n, t in getattr(self, key).items()} for key in ("fisher", "anchor")}
