"""SD-LoRA (Wu et al., arXiv 2501.13198), in its style: what earlier tasks trained keeps its direction, not its size.

    y = W x + alpha/r (m_1 B_1 A_1 + ... + m_{k-1} B_{k-1} A_{k-1} + B_k A_k) x        task k trains m, A_k and B_k

Every weight matrix has its own m_i. They stand in the blocks of B (llaca/methods/blocks.py): a step moves B_i, i < k,
along its own direction alone, and so does its gradient before the optimizer sees it. The source has numbers m_i of
their own in the optimizer, and divides A_i and B_i by their lengths; here m_i starts at 1, and Adam's step of it is
that of its elements, projected.
"""

import torch
from torch import Tensor

from llaca.engines.shards import Shards
from llaca.methods.blocks import StackedLoRA


class SDLoRA(StackedLoRA):
    """Blocks of which earlier ones may grow and shrink."""

    edits_weights = True

    def before_task(self, shards: Shards, matched: bool, steps: int) -> None:
        super().before_task(shards, matched, steps)
        self.earlier_blocks, places = min(self.tasks, self.settings.blocks - 1), {}
        for name, weight in self.stage.weights().items():
            columns = torch.arange(weight.shape[-1], device=weight.device)
            block = columns * self.settings.blocks // len(columns)
            places[name] = block.where(torch.tensor("lora_B" in name), self.settings.blocks).expand(weight.shape)
        self.places = [p.to(w.device) for p, w in zip(shards.layout.cut(places), shards.parameters, strict=True)]
        self.start = [weight.detach().float().clone() for weight in shards.parameters]

    @torch.no_grad()
    def inner(self, shards: Shards, values: list[Tensor]) -> Tensor:
        """Inner products of tensors like the parameters with the start: [tensors, earlier blocks]."""
        table = self.start[0].new_zeros(len(values), self.earlier_blocks)
        for row, value, start, place in zip(table, values, self.start, self.places, strict=True):
            product = value.float() * start
            for block in range(self.earlier_blocks):
                row[block] = product.where(place == block, 0).sum()
        return shards.sum(table)

    def along(self, shards: Shards, values: list[Tensor]) -> list[Tensor]:
        """The part of tensors like the parameters that lies along each earlier block's start."""
        squares = self.inner(shards, self.start).clamp(min=torch.finfo(torch.float32).tiny)
        sizes = self.inner(shards, values) / squares
        sizes = torch.nn.functional.pad(sizes, (0, self.settings.blocks + 1 - self.earlier_blocks))
        items = zip(self.start, self.places, sizes, strict=True)
        return [start * size[place] for start, place, size in items]

    def after_backward(self, shards: Shards) -> None:
        along = self.along(shards, shards.gradients)
        super().after_backward(shards)
        for gradient, part in zip(shards.gradients, along, strict=True):
            gradient.add_(part.to(gradient.dtype))

    @torch.no_grad()
    def after_step(self, shards: Shards) -> None:
        moved = [weight - start for weight, start in zip(shards.parameters, self.start, strict=True)]
        items = zip(shards.parameters, self.start, self.places, self.along(shards, moved), strict=True)
        for weight, start, place, part in items:
            weight.copy_(torch.where(place < self.earlier_blocks, start + part, weight))

    def state_dict(self) -> dict:
        return {"start": self.start}

    def load_state_dict(self, state: dict) -> None:
        self.start = [old.to(new.device) for old, new in zip(state["start"], self.start, strict=True)]
