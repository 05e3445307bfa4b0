"""Merging of task vectors: what every task has moved since the first one's start, made into one.

    v_t = theta_t - theta_0        theta_0: where these parameters began, theta_t: the weights after task t

    MagMax (Marczak et al., arXiv 2407.06322)   v = of v_1 ... v_k, element by element, the one of largest magnitude
    TIES (Yadav et al., arXiv 2306.01708)       each v_t keeps its largest share of elements; the sign with more mass
                                                wins; v = the mean of those elements that have it
    handed on: theta_0 + lambda v

Training goes on from the last task's own weights (MagMax trains in sequence) or from theta_0 (TIES merges models that
were tuned independently); test sets see the merged ones. LoRA's A and B are merged tensor by tensor, as the averages
average them: the published methods merge whole weights.
"""

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llaca.engines.shards import Shards
from llaca.fields import setting
from llaca.methods.base import Method
from llava.adapters import set_adapter_state

Vectors = dict[str, Tensor]  # by tensor name


class TaskVectors(Method):
    """LoRA whose stages are merged afterwards; the merged weights are for answering alone."""

    kept: dict

    def recall(self, memory: dict) -> None:
        self.kept = dict(memory)
        if memory:
            set_adapter_state(self.stage.model, self.begins_at(memory))

    @abstractmethod
    def begins_at(self, memory: dict) -> Vectors:
        """The weights that the next stage starts from."""

    @abstractmethod
    def merged(self, vector: Vectors, trained: Vectors, memory: dict) -> tuple[Vectors, dict]:
        """This stage's task vector, of the weights `trained`, with those of earlier ones: what they make, and what to
        remember of them."""

    def before_task(self, shards: Shards, matched: bool, steps: int) -> None:
        if not matched:
            self.kept = {"start": shards.layout.gather(shards.parameters)}

    def after_task(self, shards: Shards, folder: Path) -> tuple[list[Tensor] | None, dict]:
        start, trained = self.kept["start"], shards.layout.gather(shards.parameters)
        vector = {name: weight - start[name] for name, weight in trained.items()}
        total, kept = self.merged(vector, trained, self.kept)
        self.kept = {"start": start, **kept}
        scale = self.settings.scale
        handed = {name: start[name] + scale * moved for name, moved in total.items()}
        return [part.to(now.device) for part, now in zip(shards.layout.cut(handed), shards.parameters, strict=True)], {}

    def memory(self) -> dict:
        return self.kept

    def state_dict(self) -> dict:
        return {"memory": self.kept}

    def load_state_dict(self, state: dict) -> None:
        self.kept = state["memory"]


class MagMax(TaskVectors):
    """The largest change of any task wins, element by element."""

    @dataclass
    class Settings:
        scale: float = setting(1.0, "lambda, the share of the merged vector", above=0)

    def begins_at(self, memory: dict) -> Vectors:
        return memory["trained"]

    def merged(self, vector: Vectors, trained: Vectors, memory: dict) -> tuple[Vectors, dict]:
        largest = memory.get("largest", vector)
        largest = {
            name: torch.where(vector[name].abs() > old.abs(), vector[name], old) for name, old in largest.items()
        }
        return largest, {"largest": largest, "trained": trained}


class Ties(TaskVectors):
    """Trim, elect a sign, mean of those that agree."""

    @dataclass
    class Settings:
        scale: float = setting(1.0, "lambda, the share of the merged vector", above=0)
        density: float = setting(0.2, "share of a task vector's elements, the largest, that is kept", above=0, most=1)

    def begins_at(self, memory: dict) -> Vectors:
        return memory["start"]

    def merged(self, vector: Vectors, trained: Vectors, memory: dict) -> tuple[Vectors, dict]:
        trimmed = [*memory.get("trimmed", []), trim(vector, self.settings.density)]
        return {name: elect([own[name] for own in trimmed]) for name in vector}, {"trimmed": trimmed}


def trim(vector: Vectors, density: float) -> Vectors:
    """The vector with zeros in place of all but a share of its elements, the largest over all tensors together."""
    sizes = torch.cat([moved.abs().flatten() for moved in vector.values()])
    least = sizes.sort(descending=True).values[max(1, round(density * len(sizes))) - 1]
    return {name: moved * (moved.abs() >= least) for name, moved in vector.items()}


def elect(vectors: list[Tensor]) -> Tensor:
    """The mean of the elements whose sign is that of the sum; 0 where there is none."""
    stacked = torch.stack(vectors)
    agrees = (stacked.sign() == stacked.sum(0).sign()) & (stacked != 0)
    return (stacked * agrees).sum(0) / agrees.sum(0).clamp(min=1)
