"""The hooks of a method. `Method` itself is plain sequential LoRA: every hook does nothing."""

from pathlib import Path

import torch
from torch import nn

from llaca.config import MethodConfig


class Method:
    """A way to train a stream. One object serves a whole run; hooks are called in the order below.

    `parameters` maps the name of every trainable tensor to the tensor, in a fixed order.
    """

    trains = True  # False: the base model is only evaluated
    joint = False  # True: one stage with all tasks

    def __init__(self, config: MethodConfig):
        self.config = config

    def before_task(self, matched: bool, parameters: dict[str, nn.Parameter], steps: int) -> None:
        """Before a stage of `steps` optimizer steps; `matched`: it continues a parameter set of the pool."""

    def loss(self, model: nn.Module, inputs: dict, outputs) -> torch.Tensor | None:
        """A term added to the loss of a micro-batch, or None."""
        return None

    def before_step(self, parameters: dict[str, nn.Parameter]) -> None:
        """Gradients are final (reduced, unscaled, clipped if the recipe clips), parameters have not moved."""

    def after_step(self, parameters: dict[str, nn.Parameter]) -> None:
        """Parameters have moved; `.grad` still holds the gradient that moved them."""

    def after_task(self, parameters: dict[str, nn.Parameter], folder: Path) -> dict:
        """After a stage: may change the parameters in place and write into `folder`; returns facts for stage.json.

        The key `averaged` says whether the parameters were changed, so that the trained ones are kept beside them.
        """
        return {"averaged": False}
