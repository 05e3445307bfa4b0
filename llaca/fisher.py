"""The diagonal Fisher information of what trains, estimated on a task's own records."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llaca import ranks

if TYPE_CHECKING:  # the methods import this file
    from llaca.methods.base import StageView


def diagonal_fisher(stage: "StageView", records: int) -> dict[str, Tensor]:
    """F_i = 1/n sum_r (d log p(y_r | x_r) / d theta_i)^2 over n records, float32, whole tensors by name.

    The empirical Fisher: y_r is the record's own answer, log p the sum over its tokens. The records are drawn by the
    stage's seed, and the ranks share them; all of them get the sum.
    """
    return squared_gradients(stage, records)[0]


def squared_gradients(stage: "StageView", records: int) -> tuple[dict[str, Tensor], dict[int, float]]:
    """`diagonal_fisher`, and of every drawn record, by its number, the squared length of its gradient."""
    weights, drawn = stage.weights(), stage.draw(records)
    fisher = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
    sizes = torch.zeros(len(drawn), device=next(iter(weights.values())).device)
    mine = range(ranks.rank(), len(drawn), ranks.count())
    with stage.evaluating():
        for place, batch in zip(mine, stage.batches([drawn[place] for place in mine]), strict=True):
            loss = stage.backbone.answer_loss(stage.model, batch)
            gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            for total, gradient in zip(fisher.values(), gradients, strict=True):
                if gradient is not None:  # the projector's, where a record has no picture
                    total.addcmul_(gradient.float(), gradient.float(), value=1 / len(drawn))
                    sizes[place] += gradient.float().square().sum()
    ranks.add_up([*fisher.values(), sizes])
    return fisher, dict(zip(drawn, sizes.tolist(), strict=True))
