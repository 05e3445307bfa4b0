"""SAFE (arXiv 2411.02175), in its style: a slow adapter stays near what the base sees, fast ones stay near the slow.

    first task of these parameters    L = CE + lambda_d sum_i (C_ii - 1)^2 + lambda_o sum_{i != j} C_ij^2
    later tasks                       L = CE + lambda_f mean(1 - cos(h, h_slow))

h is what goes into the head at an answered token, h_slow the same with the weights that the first task left. C is the
correlation, over a micro-batch's answered tokens, of each element of h with each of h at the weights that the first
task started from: the base's. In the source both adapters answer, weighed by how sure each is, at twice the cost; here
the fast one does. Its classifier of prototypes has no counterpart in a language model, and its lambda_d and lambda_o,
which go with 10,000 random projections of h, none here.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from llaca.engines.shards import Shards
from llaca.fields import setting
from llaca.methods.base import WHOLE_TENSORS
from llaca.methods.distilled import HeadInputs


class SAFE(HeadInputs):
    """A first task that keeps the base's features apart, later ones that keep the first's."""

    @dataclass
    class Settings:
        diagonal: float = setting(5e-4, "lambda_d, the weight of C's diagonal", least=0)
        redundant: float = setting(5e-5, "lambda_o, the weight of the rest of C", least=0)
        align: float = setting(0.5, "lambda_f, the weight of the cosine", least=0)

    engines = WHOLE_TENSORS
    copies = 1

    def recall(self, memory: dict) -> None:
        weights = self.stage.weights()
        self.first, kept = not memory, memory.get("slow", weights)
        self.teacher = {name: kept[name].detach().to(w.device, copy=True) for name, w in weights.items()}

    def before_task(self, shards: Shards, matched: bool, steps: int) -> None:
        self.watch_head()

    def loss(self, model, inputs, outputs) -> Tensor:
        """The terms of this task."""
        now = self.head_inputs(inputs)
        self.stage.logits_with(self.teacher, inputs)
        taught = self.head_inputs(inputs)
        if not self.first:
            return self.settings.align * (1 - cosine_similarity(now, taught, dim=-1)).mean()
        apart = correlation(now, taught) - torch.eye(now.shape[1], device=now.device)
        on = apart.diagonal().square().sum()
        return self.settings.diagonal * on + self.settings.redundant * (apart.square().sum() - on)

    def after_task(self, shards: Shards, folder) -> tuple[None, dict]:
        self.leave_head()
        if self.first:
            self.teacher = shards.layout.gather(shards.parameters)
        return None, {}

    def memory(self) -> dict:
        return {"slow": {name: weight.cpu() for name, weight in self.teacher.items()}}


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Of every column of a [n, d] with every one of b [n, d]: [d, d]; 0 for a column that does not vary."""
    a, b = (x - x.mean(0) for x in (a, b))
    a, b = (x / x.norm(dim=0).clamp(min=1e-6) for x in (a, b))
    return a.T @ b
