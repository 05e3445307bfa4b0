"""PGP, gradient projection for parameter-efficient tuning (Qiao et al., "Prompt Gradient Projection for Continual
Learning", ICLR 2024; for LoRA: arXiv 2405.13383): later tasks leave alone what a layer does to earlier tasks' inputs.

    G <- G (I - U U^T)                          before every optimizer step
    W <- W_start + (W - W_start)(I - U U^T)     after it

U holds orthonormal directions of the layer's inputs, so W x stays what it was for every x in their span. Each layer
that trains has its own: LoRA's A (inputs x), its B (inputs A x), the projector's linears; a bias, whose input is the
constant 1, rests. After a stage U is extended by the rule of GPM (Saha et al., arXiv 2103.09762): with X the inputs of
some of its records, as columns, by leading left singular vectors of (I - U U^T) X until U holds the share `energy` of
|X|^2. They are eigenvectors of the projected X X^T, a sum over the records; X itself is never stored.

The published code projects the gradient, but what Adam makes of a projected gradient leaves the subspace: here the
movement since the stage's start is projected, too. With SGD that changes nothing.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from llaca import ranks
from llaca.engines.shards import Layout, Shards, TensorSlice
from llaca.fields import setting
from llaca.methods.base import WHOLE_TENSORS, Method
from llaca.second_moments import exact_products, passes, second_moments, width


class PGP(Method):
    """LoRA that moves only where earlier tasks' inputs do not reach."""

    @dataclass
    class Settings:
        energy: float = setting(0.95, "share of |X|^2 that U holds", least=0, most=1)
        estimate_records: int = setting(200, "records whose inputs are X", least=1)

    engines = WHOLE_TENSORS
    edits_gradients = edits_weights = True
    basis: dict[str, Tensor]  # name -> U [inputs, directions]; empty before the first task

    @property
    def watches(self) -> bool:
        return any(basis.numel() for basis in self.basis.values())

    def recall(self, memory: dict) -> None:
        device = next(iter(self.stage.weights().values())).device
        self.basis = {name: basis.to(device) for name, basis in memory.get("basis", {}).items()}

    def before_task(self, shards: Shards, matched: bool, steps: int) -> None:
        self.start = [p.detach().clone() for p in shards.parameters] if self.watches else []
        self.cut, self.places = cut_rows(shards.layout) if self.watches else ([], 0)

    def after_backward(self, shards: Shards) -> None:
        """Takes what lies along U out of the gradients, in place."""
        self.take_out(shards, shards.gradients, shards.gradients)

    def after_step(self, shards: Shards) -> None:
        """Takes the movement along U out of the weights, in place."""
        moved = [weight - start for weight, start in zip(shards.parameters, self.start, strict=True)]
        self.take_out(shards, moved, shards.parameters)

    @torch.no_grad()
    def take_out(self, shards: Shards, values: list[Tensor], targets: list[Tensor]) -> None:
        """targets -= values U U^T, for tensors like the shards' parameters; the ranks share the sums over a row."""
        slices = shards.layout.slices
        bases = [self.basis[part.name] for part in slices]
        with exact_products():
            items = zip(slices, values, bases, strict=True)
            along = [rows_of(part, value.float()) @ basis for part, value, basis in items]
            if self.places:
                table = along[0].new_zeros(self.places, max(basis.shape[1] for basis in bases))
                for index, row, place in self.cut:
                    table[place, : bases[index].shape[1]] = along[index][row]
                table = shards.sum(table)
                for index, row, place in self.cut:
                    along[index][row] = table[place, : bases[index].shape[1]]
            for part, target, rows, basis in zip(slices, targets, along, bases, strict=True):
                first = part.start % width(part.shape)
                target.sub_((rows @ basis.T).flatten()[first : first + part.numel].view_as(target))

    def after_task(self, shards: Shards, folder: Path) -> tuple[None, dict]:
        for names in passes(self.stage.weights().items()):
            energies = second_moments(self.stage, names, self.settings.estimate_records)
            for name in names:
                self.basis[name] = extended(self.basis.get(name), energies.pop(name), self.settings.energy)
        inputs, directions = (sum(basis.shape[axis] for basis in self.basis.values()) for axis in (0, 1))
        return None, {"protected_share": directions / inputs}

    def memory(self) -> dict:
        return {"basis": {name: basis.cpu() for name, basis in self.basis.items()}}

    def state_dict(self) -> dict:
        return {"start": self.start}

    def load_state_dict(self, state: dict) -> None:
        self.start = [old.to(new.device) for old, new in zip(state["start"], self.start, strict=True)]


def rows_of(part: TensorSlice, values: Tensor) -> Tensor:
    """The rows [rows, inputs] of a tensor that a rank's part touches, zero where another rank has the elements."""
    before, inputs = part.start % width(part.shape), width(part.shape)
    return pad(values.flatten(), (before, -(before + part.numel) % inputs)).view(-1, inputs)


def cut_rows(layout: Layout) -> tuple[list[tuple[int, int, int]], int]:
    """The rows that lie on several ranks, each of which has a part of the sums over them: (number of the part, row of
    its `rows_of`, place in a table of all such rows) of those on this rank, and how many there are in all."""
    if not layout.sharded:
        return [], 0
    mine = {}
    for index, part in enumerate(layout.slices):
        for edge in (part.start, part.start + part.numel):
            row, column = divmod(edge, width(part.shape))
            if column:
                mine[part.name, row] = index, row - part.start // width(part.shape)
    places = sorted({row for rows in ranks.everyone(list(mine)) for row in rows})
    return [(*here, places.index(row)) for row, here in mine.items()], len(places)


def extended(basis: Tensor | None, energies: Tensor, energy: float) -> Tensor:
    """GPM's rule: the orthonormal columns of `basis` [inputs, k] and as many more, the leading ones of X X^T outside of
    their span, as it takes until all hold the share `energy` of its trace. Float32."""
    energies = energies.double()
    basis = energies.new_empty(len(energies), 0) if basis is None else basis.double()
    rest = energies - basis @ (basis.T @ energies)
    rest = rest - (rest @ basis) @ basis.T
    values, vectors = torch.linalg.eigh((rest + rest.T) / 2)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    total = energies.trace()
    held = (total - values.sum()).clamp(min=0) + values.cumsum(0) - values  # by the basis and the directions before
    count = int(((held < energy * total) & (values > 1e-7 * total)).sum())  # less is rounding
    return torch.cat([basis, vectors[:, :count]], dim=1).float()
