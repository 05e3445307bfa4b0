"""What reaches the layers that train: sums of x x^T over some of a stage's own records."""

from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llaca import ranks

if TYPE_CHECKING:  # the methods import this file
    from llaca.methods.base import StageView

PASS_BYTES = 4 * 2**30  # LLaVA-7B at rank 128 has 28 GB of them in all


def width(shape: torch.Size) -> int:
    """Inputs of the layer that a tensor of this shape is the weight [outputs, inputs] or the bias [outputs] of."""
    return shape[1] if len(shape) == 2 else 1


def passes(weights: Iterable[tuple[str, Tensor]]) -> Iterator[list[str]]:
    """The names of weights and biases, in groups whose x x^T take at most PASS_BYTES, or of one."""
    group, size = [], 0
    for name, weight in weights:
        need = 4 * width(weight.shape) ** 2
        if group and size + need > PASS_BYTES:
            yield group
            group, size = [], 0
        group, size = [*group, name], size + need
    yield group


def second_moments(stage: "StageView", names: Collection[str], records: int) -> dict[str, Tensor]:
    """X X^T [inputs, inputs], float32, of the layers of these weights and biases: x x^T summed up over all tokens (or
    patches) of so many records; a bias has the one input 1.

    One pass without dropout. The stage's seed draws the records, and the ranks share them; all get the sum.
    """
    weights = {name: weight for name, weight in stage.weights().items() if name in names}
    energies = {name: weight.new_zeros([width(weight.shape)] * 2).float() for name, weight in weights.items()}
    drawn = stage.draw(records)

    def add(name, layer, inputs):
        x = inputs[0].flatten(0, -2).float()
        x = x if weights[name].dim() == 2 else x.new_ones(len(x), 1)
        energies[name].addmm_(x.T, x)

    with ExitStack() as hooks, stage.evaluating(), torch.no_grad(), exact_products():
        for name in weights:
            layer = stage.model.get_submodule(name.rpartition(".")[0])
            hooks.callback(layer.register_forward_pre_hook(partial(add, name)).remove)
        for batch in stage.batches(drawn[ranks.rank() :: ranks.count()]):
            stage.backbone.answer_loss(stage.model, batch)
    ranks.add_up(list(energies.values()))
    return energies


@contextmanager
def exact_products() -> Iterator[None]:
    """Float32 products of float32 factors meanwhile, where the recipe lets the GPU round them (TF32)."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
