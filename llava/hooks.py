"""How a training method takes part in training, without knowing who trains."""

import torch
from torch import nn

Parameters = dict[str, nn.Parameter]


class StepHooks:
    """What a method may do during training; every hook does nothing unless overridden.

    `parameters` maps the name of every trainable tensor to the tensor, in the model's order.
    """

    def loss(self, model: nn.Module, inputs: dict[str, torch.Tensor], outputs) -> torch.Tensor | None:
        """Return a term to add to the loss of one micro-batch.

        `inputs` is the batch as the collator made it; `outputs.logits` is `[supervised tokens, vocabulary]`, the rows
        in the order of the supervised labels.
        """
        return None

    def before_step(self, parameters: Parameters) -> None:
        """Called once per optimizer step, with final gradients (accumulated, clipped if configured), before it."""

    def after_step(self, parameters: Parameters) -> None:
        """Called directly after the optimizer step, with the same gradients still in place."""
