"""What a method may add to training, without knowing who trains."""

import torch
from torch import nn


class TrainHooks:
    """Every hook does nothing unless overridden."""

    def loss(self, model: nn.Module, inputs: dict[str, torch.Tensor], outputs) -> torch.Tensor | None:
        """Return a term to add to the loss of one micro-batch.

        `inputs` is the batch as the collator made it; `outputs.logits` is `[supervised tokens, vocabulary]`, the rows
        in the order of the supervised labels.
        """
        return None

    def log(self) -> dict[str, float]:
        """Return what to add to a line of the training log."""
        return {}
