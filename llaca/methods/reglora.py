"""RegLoRA, the regulariser of SEFE (Chen et al., arXiv 2505.02486): where earlier tasks changed a weight most, the next
one changes it little.

    M = the union over finished tasks of the `share` of positions (i, j) of a layer with the largest |dW_ij|
    L = CE + lambda sum_layers mean_{(i,j) in M} |dW_ij|           dW = B A - (B A at the stage's start)

dW is what a task adds to a layer's weight, without LoRA's scale; it is computed anew in the backward pass, layer by
layer. The published method merges every task's LoRA and starts a new one, whose product is this difference. lambda 2500
and the share of 2 % are the release's.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from llaca.engines.shards import Shards
from llaca.fields import setting
from llaca.methods.base import WHOLE_TENSORS, Method


class RegLoRA(Method):
    """LoRA whose product is held where it matters to earlier tasks."""

    @dataclass
    class Settings:
        penalty: float = setting(2500.0, "lambda, the weight of the penalty", least=0)
        share: float = setting(0.02, "share of a layer's positions that a task holds", above=0, most=1)

    engines = WHOLE_TENSORS

    def __init__(self, settings: Settings | None = None):
        super().__init__(settings)
        self.held: dict[str, Tensor] = {}  # layer -> numbers of positions, row by row
        self.start: dict[str, Tensor] = {}  # of every LoRA tensor, before the stage

    def recall(self, memory: dict) -> None:
        device = next(iter(self.stage.weights().values())).device
        self.held = {layer: places.to(device) for layer, places in memory.get("held", {}).items()}

    def before_task(self, shards: Shards, matched: bool, steps: int) -> None:
        weights = self.stage.weights()
        self.start = {name: weight.detach().clone() for name, weight in weights.items() if "lora_" in name}

    def pairs(self) -> Iterator[tuple[str, Tensor, Tensor, Tensor, Tensor]]:
        """(layer, A, B, A at the start, B at the start) of every layer."""
        weights = self.stage.weights()
        for name, first in weights.items():
            if "lora_A" in name:
                other = name.replace("lora_A", "lora_B")
                yield name, first, weights[other], self.start[name], self.start[other]

    def loss(self, model, inputs, outputs) -> Tensor | None:
        """lambda sum_layers mean |dW| over the held positions, None in the first stage of these parameters."""
        if not self.held:
            return None
        terms = [
            checkpoint(moved_at, self.held[layer], a, b, a0, b0, use_reentrant=False)
            for layer, a, b, a0, b0 in self.pairs()
        ]
        return self.settings.penalty * torch.stack(terms).sum()

    def after_task(self, shards: Shards, folder: Path) -> tuple[None, dict]:
        for layer, a, b, a0, b0 in self.pairs():
            with torch.no_grad():
                moved = change(a, b, a0, b0).abs()
            places = moved.topk(max(1, round(self.settings.share * len(moved)))).indices.int()
            self.held[layer] = torch.unique(torch.cat([self.held.get(layer, places[:0]), places]))
        held = sum(len(places) for places in self.held.values())
        return None, {"held_share": held / sum(b.shape[0] * a.shape[1] for _, a, b, _, _ in self.pairs())}

    def memory(self) -> dict:
        return {"held": {layer: places.cpu() for layer, places in self.held.items()}}

    def state_dict(self) -> dict:
        return {"start": self.start}

    def load_state_dict(self, state: dict) -> None:
        self.start = {name: old.to(self.start[name].device) for name, old in state["start"].items()}


def change(a: Tensor, b: Tensor, a0: Tensor, b0: Tensor) -> Tensor:
    """B A - B_0 A_0 [out x in], row by row, in float32, whatever the training multiplies in."""
    with torch.autocast(a.device.type, enabled=False):
        return (b.float() @ a.float() - b0.float() @ a0.float()).flatten()


def moved_at(places: Tensor, a: Tensor, b: Tensor, a0: Tensor, b0: Tensor) -> Tensor:
    """The mean of |B A - B_0 A_0| over these positions."""
    return change(a, b, a0, b0)[places.long()].abs().mean()
