"""A-GEM (Chaudhry et al., arXiv 1812.00420): no gradient of a step points against that of a memory of earlier tasks.

    g <- g - (g.r / r.r) r   where g.r < 0; the inner products go over all trained tensors together

g is the gradient of the step, r (the paper's g_ref) that of a batch from the memory, which is replay's: n random
records of every earlier task. Every step draws its batch anew, by the stage's seed and its own number, and the ranks
share the batch. r is the gradient of the loss summed over the batch's supervised tokens, without dropout; their mean
would give a multiple of it, and every multiple the same projection.

As published it is the gradient that is projected: what Adam makes of it may still point against r.
"""

import random
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from llaca import ranks
from llaca.engines.shards import Shards
from llaca.methods.base import WHOLE_TENSORS, batches_of
from llaca.methods.replay import Replay
from llava.dataset import InstructionDataset

BATCH = 16  # records of the memory at a step
MICRO_BATCH = 4  # of them at a time on one device: activations are not recomputed


class AGEM(Replay):
    """LoRA whose gradients do not point against the memory's. It trains on the stage's records alone."""

    engines = WHOLE_TENSORS
    edits_gradients = True
    memorised: InstructionDataset  # the stage's records and the memory's behind them
    numbers = range(0)  # those of the memory in it

    @property
    def watches(self) -> bool:
        return len(self.numbers) > 0

    def extend(self, dataset: InstructionDataset, earlier: Mapping[str, InstructionDataset]) -> InstructionDataset:
        self.memorised = super().extend(dataset, earlier)
        self.numbers = range(len(dataset), len(self.memorised))
        return dataset

    def before_task(self, shards: Shards, matched: bool, steps: int) -> None:
        self.steps = 0
        self.projected = torch.zeros((), dtype=torch.long, device=shards.layout.device)

    def after_backward(self, shards: Shards) -> None:
        """Projects the step's gradients in place; no value of it is waited for."""
        pairs = list(zip(shards.gradients, shards.layout.cut(self.reference(self.steps)), strict=True))
        products = [torch.stack([inner(g, r), inner(r, r)]) for g, r in pairs]
        along, square = shards.sum(torch.stack(products)).sum(dim=0)
        coefficient = along.clamp(max=0) / square.clamp(min=torch.finfo(square.dtype).tiny)
        for gradient, reference in pairs:
            gradient.sub_(reference * coefficient)
        self.steps += 1
        self.projected += along < 0

    def reference(self, step: int) -> dict[str, Tensor]:
        """r for the step of this number, from 0: whole float32 tensors by name, the same on every rank."""
        stage, weights = self.stage, self.stage.weights()
        device, sizes = next(iter(weights.values())).device, [weight.numel() for weight in weights.values()]
        flat = torch.zeros(sum(sizes), device=device)  # one all-reduce
        parts = zip(weights.items(), flat.split(sizes), strict=True)
        total = {name: part.view_as(weight) for (name, weight), part in parts}
        drawn = random.Random(f"{stage.seed} {step}").sample(self.numbers, min(BATCH, len(self.numbers)))
        mine = drawn[ranks.rank() :: ranks.count()]
        with stage.evaluating(), torch.enable_grad():
            for batch in batches_of(self.memorised, mine, MICRO_BATCH, device):
                # Not backward(): it would add to the step's own gradients and set off the engine's reduction.
                loss = stage.backbone.answer_loss(stage.model, batch)
                gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
                for sum_, gradient in zip(total.values(), gradients, strict=True):
                    if gradient is not None:  # the projector's, where no record has a picture
                        sum_.add_(gradient)
        ranks.add_up([flat])
        return total

    def log(self) -> dict[str, float]:
        """The share of the stage's steps so far whose gradient was projected."""
        return {"projected_share": int(self.projected) / self.steps} if self.steps else {}

    def after_task(self, shards: Shards, folder: Path) -> tuple[None, dict]:
        super().after_task(shards, folder)
        return None, self.log()

    def state_dict(self) -> dict:
        return {"steps": self.steps, "projected": int(self.projected)}

    def load_state_dict(self, state: dict) -> None:
        self.steps = state["steps"]
        self.projected.fill_(state["projected"])


def inner(a: Tensor, b: Tensor) -> Tensor:
    """The inner product of two tensors of one shape, summed in float64."""
    return (a * b).sum(dtype=torch.float64)
