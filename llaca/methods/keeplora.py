"""KeepLoRA (Luo et al., arXiv 2601.19659): a task may change what neither the base nor an earlier task relies on.

    U_0 = leading right singular vectors of W that hold the share `base_energy` of |W|^2
    A_k = top right singular vectors of G (I - U U^T)          G = dL/dW on records of the task, before it is trained
    U  <- U and as many more of G' (I - U U^T) as hold the share `energy` of |G'|^2        G': the same, after it

A_k rests, B_k trains, both a block of the rank (llaca/methods/blocks.py). Shares and choice are those of the released
scripts, which take a fifth of the data and merge every task's LoRA into the weights before the next.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llaca import ranks
from llaca.fields import setting
from llaca.methods.blocks import InfLoRA
from llaca.methods.pgp import extended
from llaca.second_moments import exact_products
from llaca.sections import ModelConfig

if TYPE_CHECKING:
    from llaca.methods.base import StageView


def gradient_moments(stage: "StageView", names: Collection[str], records: int) -> dict[str, Tensor]:
    """G^T G [inputs, inputs], float32, of these lora_A: G is the gradient of the loss, summed over the answered tokens
    of so many records, by the weight that each stands beside.

    Without dropout. The stage's seed draws the records, and the ranks share them; all get the sum.
    """
    weights = [base_weight(stage.model, name) for name in names]
    sums = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    drawn = stage.draw(records)
    for weight in weights:
        weight.requires_grad_(True)
    try:
        with stage.evaluating(), torch.enable_grad():
            for batch in stage.batches(drawn[ranks.rank() :: ranks.count()]):
                loss = stage.backbone.answer_loss(stage.model, batch)
                for total, gradient in zip(sums, torch.autograd.grad(loss, weights), strict=True):
                    total.add_(gradient)
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    ranks.add_up(sums)
    with exact_products():
        return {name: total.T @ total for name, total in zip(names, sums, strict=True)}


def base_weight(model: torch.nn.Module, name: str) -> Tensor:
    """The weight [outputs, inputs] that a lora_A of this name stands beside."""
    return model.get_submodule(name.partition(".lora_A")[0]).base_layer.weight


class KeepLoRA(InfLoRA):
    """Blocks that read what the task's gradient reads and neither the base nor earlier tasks rely on."""

    @dataclass
    class Settings(InfLoRA.Settings):
        energy: float = setting(0.99, "share of |G|^2 that a task adds to U", least=0, most=1)
        base_energy: float = setting(0.6, "share of |W|^2 that U holds from the start", least=0, most=1)
        estimate_records: int = setting(200, "records that G is of", least=1)

    estimate = staticmethod(gradient_moments)

    def check_model(self, config: ModelConfig) -> None:
        """Raises ValueError as for blocks, and for a quantized base, whose weights have no directions."""
        super().check_model(config)
        if config.quantization != "none":
            raise ValueError(
                f"method keeplora takes directions of the base's own weights: take --quantization none, not "
                f"{config.quantization}"
            )

    def protected(self, memory: dict) -> dict[str, Tensor]:
        """U of each lora_A before this task: without an earlier one, U_0."""
        if memory:
            return memory["basis"]
        found = {}
        for name in (name for name in self.stage.weights() if "lora_A" in name):
            weight = base_weight(self.stage.model, name).detach().float()
            with exact_products():
                found[name] = extended(None, weight.T @ weight, self.settings.base_energy)
        return found
