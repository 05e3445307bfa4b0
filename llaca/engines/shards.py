"""This rank's part of the trainable tensors, whatever engine holds them.

Layout   which elements of which tensor this rank steps on
Shards   those elements and their gradients, as a method sees them
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class TensorSlice(NamedTuple):
    """Elements [start, start + numel) of the tensor `name`, which lie at `offset` of what the optimizer steps on."""

    name: str
    shape: torch.Size
    flat: Tensor | None  # None: this rank steps on no element of it
    offset: int
    start: int
    numel: int

    def of(self, tensor: Tensor) -> Tensor:
        """Its view of `flat`, or of a tensor like `flat`: in the full shape where nothing is sharded, else [numel]."""
        tensor = tensor.detach()
        if tensor.dim() == len(self.shape) and self.numel == tensor.numel():
            return tensor
        return tensor[self.offset : self.offset + self.numel]


@dataclass
class Shards:
    """This rank's part of the trainable tensors: `names`, `parameters` and, directly after a step, its `gradients`.

    Where nothing is sharded every rank has all of them, in their own shapes; else slices of any length, also empty,
    float32. The parameters are live views.
    """

    layout: "Layout"
    parameters: list[Tensor]
    gradients: list[Tensor]

    @property
    def names(self) -> list[str]:
        return self.layout.names

    def sum(self, table: Tensor) -> Tensor:
        """The sum of the ranks' tables, where the ranks hold different elements: one small all-reduce."""
        if not self.layout.sharded:
            return table
        device = self.layout.device
        total = table.to(device, copy=True)
        dist.all_reduce(total)
        return total.to(table.device)


def add_at_own_length(shards: Shards, directions: list[Tensor]) -> None:
    """Add to the gradients, in place, tensors like the parameters, scaled to the gradients' length over all tensors
    together; nothing where they are zero."""
    pairs = zip(shards.gradients, directions, strict=True)
    squares = torch.stack([torch.stack([one.double().square().sum() for one in pair]) for pair in pairs])
    own, other = shards.sum(squares).sum(0).sqrt()
    scale = torch.where(other > 0, own / other, 0).float()
    for gradient, direction in zip(shards.gradients, directions, strict=True):
        gradient.add_((scale * direction).to(gradient.dtype))


class Layout:
    """The slices of this rank, in the model's order, and all tensors that its optimizer steps on."""

    def __init__(
        self, engine: str, slices: list[TensorSlice], flats: list[Tensor], sharded: bool, device: torch.device
    ):
        self.engine, self.slices, self.flats, self.sharded, self.device = engine, slices, flats, sharded, device
        self.names = [part.name for part in slices]
        self.nothing = flats[0].new_empty(0, dtype=torch.float32)

    def shards(self, gradients: dict[int, Tensor] | None = None) -> Shards:
        """The live parameters; `gradients` maps the id of each `flat` to its gradient."""
        parameters = [self.nothing if p.flat is None else p.of(p.flat) for p in self.slices]
        if gradients is None:
            return Shards(self, parameters, [])
        grads = [self.nothing if p.flat is None else p.of(gradients[id(p.flat)]) for p in self.slices]
        return Shards(self, parameters, grads)

    def cut(self, full: dict[str, Tensor]) -> list[Tensor]:
        """This rank's slices of full tensors: the inverse of `gather`, views shaped like `shards().parameters`."""
        found = []
        for part in self.slices:
            flat = full[part.name].reshape(-1)[part.start : part.start + part.numel]
            whole = part.flat is not None and part.of(part.flat).shape == part.shape
            found.append(flat.view(part.shape) if whole else flat)
        return found

    def gather(self, tensors: Iterable[Tensor]) -> dict[str, Tensor]:
        """name -> the full tensor, float32 on the CPU, of shards like `shards().parameters`; call it on every rank."""
        full = {}
        for part, tensor in zip(self.slices, tensors, strict=True):
            if self.sharded:
                whole = torch.zeros(part.shape.numel(), device=self.device)
                whole[part.start : part.start + part.numel] = tensor.to(self.device)
                dist.all_reduce(whole)  # the other ranks hold zeros there: exact
                tensor = whole
            # ZeRO's are flat with one rank, too
            full[part.name] = tensor.detach().to("cpu", torch.float32, copy=True).view(part.shape)
        return full

    @torch.no_grad()
    def write(self, full: dict[str, Tensor]) -> None:
        """Put full tensors into what the optimizer steps on. Float32 masters of a bfloat16 model need it to start from
        what was saved, not from its rounding."""
        for part, values in zip(self.slices, self.cut(full), strict=True):
            if part.flat is not None:
                part.of(part.flat).copy_(values)
