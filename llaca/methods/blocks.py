"""LoRA in blocks: every task trains rank/n of the rank, what earlier tasks trained rests, and all of them answer.

    y = W x + alpha/r (B_1 A_1 + ... + B_k A_k) x        task k trains A_k and B_k alone

`stacked_lora` is this and no more: a new LoRA beside those of before, the plain baseline. O-LoRA (Wang et al., arXiv
2310.14152) asks the new directions to be orthogonal to the old ones:

    L = CE + lambda sum_{i<k} sum |A_i A_k^T|

(the sum over all elements of the product; MCITlib's lambda is 0.05). InfLoRA (Liang and Li, arXiv 2404.00228) chooses
A_k and trains B_k alone: A_k's rows are the leading directions of the task's inputs outside of those of earlier tasks,

    A_k = top eigenvectors of (I - U U^T) X X^T (I - U U^T),      U as in llaca/methods/pgp.py, of what reaches A

so that what earlier tasks' inputs give is left alone. The whole is one LoRA of rank r, whose later blocks of B are
zero; stock PEFT reads it. A task beyond the n-th trains the last block on. The connector trains throughout.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from llaca.engines.shards import Shards
from llaca.fields import setting
from llaca.methods.base import WHOLE_TENSORS, Method
from llaca.methods.pgp import extended
from llaca.second_moments import passes, second_moments
from llaca.sections import ModelConfig


class StackedLoRA(Method):
    """A block of the rank for every task."""

    @dataclass
    class Settings:
        blocks: int = setting(8, "n, tasks that share lora_rank equally", least=1)

    engines = WHOLE_TENSORS
    edits_gradients = rests = True
    changes: ClassVar = {"new_group_start": "fresh"}
    trains_a = True  # else A's block is as `recall` left it
    tasks = 0  # before this one

    def check_model(self, config: ModelConfig) -> None:
        """Raises ValueError unless the tasks can share lora_rank equally."""
        blocks = self.settings.blocks
        if config.lora_rank % blocks:
            raise ValueError(f"blocks {blocks} does not divide lora_rank {config.lora_rank}: take another of the two")

    def recall(self, memory: dict) -> None:
        self.tasks = memory.get("tasks", 0)

    def own(self, name: str, weight: Tensor) -> Tensor:
        """The part of a LoRA tensor that this task trains: a view. All of the connector's."""
        if "lora_" not in name:
            return weight
        axis = 0 if "lora_A" in name else 1
        width = weight.shape[axis] // self.settings.blocks
        return weight.narrow(axis, min(self.tasks, self.settings.blocks - 1) * width, width)

    def earlier(self, weight: Tensor) -> Tensor:
        """The rows of a lora_A that earlier tasks trained: a view."""
        width = weight.shape[0] // self.settings.blocks
        return weight.narrow(0, 0, min(self.tasks, self.settings.blocks - 1) * width)

    def before_task(self, shards: Shards, matched: bool, steps: int) -> None:
        masks = {}
        for name, weight in self.stage.weights().items():
            masks[name] = torch.zeros(weight.shape, device=weight.device)
            if self.trains_a or "lora_A" not in name:
                self.own(name, masks[name]).fill_(1)
        self.masks = [
            mask.to(now.device) for mask, now in zip(shards.layout.cut(masks), shards.parameters, strict=True)
        ]

    def after_backward(self, shards: Shards) -> None:
        for gradient, mask in zip(shards.gradients, self.masks, strict=True):
            gradient.mul_(mask.to(gradient.dtype))

    def after_task(self, shards: Shards, folder: Path) -> tuple[None, dict]:
        return None, {"block": min(self.tasks, self.settings.blocks - 1)}

    def memory(self) -> dict:
        return {"tasks": self.tasks + 1}


class OLoRA(StackedLoRA):
    """Blocks whose inputs do not overlap with those of earlier tasks."""

    @dataclass
    class Settings(StackedLoRA.Settings):
        penalty: float = setting(0.05, "lambda, the weight of the overlap", least=0)

    def loss(self, model, inputs, outputs) -> Tensor | None:
        """lambda sum_{i<k} sum |A_i A_k^T|, None for the first task of these parameters."""
        if not self.tasks:
            return None
        overlaps = [
            (self.earlier(weight).detach().float() @ self.own(name, weight).float().T).abs().sum()
            for name, weight in self.stage.weights().items()
            if "lora_A" in name
        ]
        return self.settings.penalty * torch.stack(overlaps).sum()


class InfLoRA(StackedLoRA):
    """Blocks whose inputs are chosen, where earlier tasks have none, and rest."""

    @dataclass
    class Settings(StackedLoRA.Settings):
        energy: float = setting(0.95, "share of the inputs' |X|^2 that U holds", least=0, most=1)
        estimate_records: int = setting(200, "records whose inputs are X", least=1)

    trains_a = False
    estimate = staticmethod(second_moments)
    basis: dict[str, Tensor]  # name of a lora_A -> U [inputs, directions]

    def recall(self, memory: dict) -> None:
        super().recall(memory)
        weights = self.stage.weights()
        self.basis = {name: basis.to(weights[name].device) for name, basis in self.protected(memory).items()}
        if self.tasks >= self.settings.blocks:
            return  # the last block has its inputs
        with torch.no_grad():
            for name, energies in self.energies():
                block = self.own(name, weights[name])
                block.copy_(leading(energies.double(), self.basis.get(name), len(block)))

    def protected(self, memory: dict) -> dict[str, Tensor]:
        """U of each lora_A [inputs, directions] before this task; none without an earlier one."""
        return memory.get("basis", {})

    def energies(self) -> Iterator[tuple[str, Tensor]]:
        """What the directions of each lora_A are those of [inputs, inputs]: X X^T."""
        inputs = ((name, weight) for name, weight in self.stage.weights().items() if "lora_A" in name)
        for names in passes(inputs):
            yield from self.estimate(self.stage, names, self.settings.estimate_records).items()

    def after_task(self, shards: Shards, folder: Path) -> tuple[None, dict]:
        for name, energies in self.energies():
            self.basis[name] = extended(self.basis.get(name), energies, self.settings.energy)
        return super().after_task(shards, folder)

    def memory(self) -> dict:
        return {**super().memory(), "basis": {name: basis.cpu() for name, basis in self.basis.items()}}


def leading(energies: Tensor, basis: Tensor | None, count: int) -> Tensor:
    """The leading `count` eigenvectors, as rows, of X X^T [inputs, inputs] outside of the span of `basis`; float64. A
    row is zero where nothing is left outside."""
    if basis is None:
        basis = energies.new_empty(len(energies), 0)
    basis, total = basis.double(), energies.trace()
    rest = energies - basis @ (basis.T @ energies)
    rest = rest - (rest @ basis) @ basis.T
    values, vectors = torch.linalg.eigh((rest + rest.T) / 2)
    values, vectors = values.flip(0)[:count], vectors.flip(1)[:, :count]
    vectors = vectors - basis @ (basis.T @ vectors)
    return (vectors * (values > 1e-7 * total)).T  # less is rounding
