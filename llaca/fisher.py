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
    weights, drawn = stage.weights(), stage.draw(records)
    fisher = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
    with stage.evaluating():
        for batch in stage.batches(drawn[ranks.rank() :: ranks.count()]):
            loss = stage.backbone.answer_loss(stage.model, batch)
            gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            for total, gradient in zip(fisher.values(), gradients, strict=True):
                if gradient is not None:  # the projector's, where a record has no picture
                    total.addcmul_(gradient.float(), gradient.float(), value=1 / len(drawn))
    ranks.add_up(list(fisher.values()))
    return fisher
