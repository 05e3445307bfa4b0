"""After a stage its weights are merged with those it started from: CoMA and CoFiMA (Marouf et al., arXiv 2312.08977),
and a weight that falls with the number of tasks.

    CoMA      theta = (1 - a) theta_{t-1} + a theta_t
    CoFiMA    theta = ((1 - a) F_{t-1} theta_{t-1} + a F_t theta_t) / ((1 - a) F_{t-1} + a F_t), element by element

    by tasks  a = 1/k, the mean over the k tasks so far, or 1/sqrt(k), as SLAO (arXiv 2512.23017) merges LoRA's B

F_t is the diagonal Fisher information of task t (llaca/fisher.py), at most 1e-4; where both are 0, CoMA's weights hold.
LoRA's A and B are merged one by one, as LLaCA averages them: not what merging their products would give.
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

FISHER_LIMIT = 1e-4


class CoMA(Method):
    """One average per stage, of its start and its end."""

    @dataclass
    class Settings:
        merge_weight: float = setting(0.4, "a, the weight of the new weights", least=0, most=1)

    start: list[Tensor] | None = None

    @property
    def weight(self) -> float:
        """a"""
        return self.settings.merge_weight

    def before_task(self, shards: Shards, matched: bool, steps: int) -> None:
        self.start = [p.detach().clone() for p in shards.parameters] if matched else None

    def after_task(self, shards: Shards, folder: Path) -> tuple[list[Tensor] | None, dict]:
        if self.start is None:
            return None, {}
        pairs = zip(self.start, shards.parameters, strict=True)
        return [torch.lerp(old, new, self.weight) for old, new in pairs], {}

    def state_dict(self) -> dict:
        return {} if self.start is None else {"start": self.start}

    def load_state_dict(self, state: dict) -> None:
        if self.start is not None:
            self.start = [old.to(new.device) for old, new in zip(state["start"], self.start, strict=True)]


class TaskMerge(CoMA):
    """CoMA whose weight is not chosen: it falls with the number of tasks that have trained these parameters."""

    @dataclass
    class Settings:
        law: Literal["mean", "sqrt"] = setting("mean", "a is 1/k (mean) or 1/sqrt(k) of k tasks")

    tasks = 0  # before this one

    def recall(self, memory: dict) -> None:
        self.tasks = memory.get("tasks", 0)

    @property
    def weight(self) -> float:
        count = self.tasks + 1
        return 1 / count if self.settings.law == "mean" else count**-0.5

    def memory(self) -> dict:
        return {"tasks": self.tasks + 1}


class CoFiMA(CoMA):
    """CoMA weighted by how much each task's answers depend on each weight."""

    @dataclass
    class Settings:
        merge_weight: float = setting(0.4, "a, the weight of the new weights", least=0, most=1)
        estimate_records: int = setting(200, "records that the Fisher information is estimated from", least=1)

    engines = WHOLE_TENSORS
    fisher: dict[str, Tensor]

    def recall(self, memory: dict) -> None:
        self.fisher = memory.get("fisher", {})

    def after_task(self, shards: Shards, folder: Path) -> tuple[list[Tensor] | None, dict]:
        fisher = diagonal_fisher(self.stage, self.settings.estimate_records)
        fisher = {name: f.clamp(max=FISHER_LIMIT).cpu() for name, f in fisher.items()}
        merged = None
        if self.start is not None:
            old_parts, new_parts = shards.layout.cut(self.fisher), shards.layout.cut(fisher)
            parts = zip(self.start, shards.parameters, old_parts, new_parts, strict=True)
            merged = [merge(old, new, f.to(old), g.to(old), self.settings.merge_weight) for old, new, f, g in parts]
        self.fisher = fisher
        return merged, {}

    def memory(self) -> dict:
        return {"fisher": self.fisher}


def merge(old: Tensor, new: Tensor, old_fisher: Tensor, new_fisher: Tensor, a: float) -> Tensor:
    """CoFiMA's formula for tensors of one shape."""
    weight = a * new_fisher / ((1 - a) * old_fisher + a * new_fisher)
    return torch.lerp(old, new, torch.where(weight.isfinite(), weight, a))
