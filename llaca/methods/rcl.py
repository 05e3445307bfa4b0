"""RCL's core (arXiv 2405.17054), in its style: projected steps towards weights around which the loss is flat.

    e = rho g / |g|,    g = dCE/dtheta over a micro-batch;    the step's gradient is dCE/dtheta at theta + e

That is sharpness-aware minimisation (SAM: Foret et al., arXiv 2010.01412), whose e every device takes of its own
records, without dropout; the norm goes over all trained tensors together. What comes of it is projected as PGP does
(llaca/methods/pgp.py), in the source with directions of 125 records that hold 0.94 of the inputs. Its contrastive loss
between pictures and mixtures of them is left out: an answer of words has none. A micro-batch costs two passes more.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llaca.fields import setting
from llaca.methods.pgp import PGP


class RCL(PGP):
    """PGP with sharpness-aware steps."""

    @dataclass
    class Settings(PGP.Settings):
        energy: float = setting(0.94, "share of |X|^2 that U holds", least=0, most=1)
        estimate_records: int = setting(125, "records whose inputs are X", least=1)
        rho: float = setting(0.05, "length of e", least=0)

    takes_local = True

    def loss(self, model, inputs, outputs) -> Tensor | None:
        """A term of value 0 that turns the gradient of CE at theta into that at theta + e."""
        if not self.settings.rho:
            return None
        weights = list(self.stage.weights().values())
        here = self.gradients(inputs, weights)
        length = torch.stack([gradient.float().square().sum() for gradient in here]).sum().sqrt()
        scale = self.settings.rho / length.clamp(min=torch.finfo(length.dtype).tiny)
        kept = [weight.detach().clone() for weight in weights]
        # Through .data, which autograd does not see: what the step's own backward pass needs is put back below.
        for weight, gradient in zip(weights, here, strict=True):
            weight.data.add_(scale * gradient)
        try:
            there = self.gradients(inputs, weights)
        finally:
            for weight, old in zip(weights, kept, strict=True):
                weight.data.copy_(old)
        pairs = zip(weights, here, there, strict=True)
        return torch.stack([((weight - weight.detach()) * (b - a)).sum() for weight, a, b in pairs]).sum()

    def gradients(self, inputs, weights: list[Tensor]) -> list[Tensor]:
        """Those of CE, without dropout; 0 for a tensor that it does not reach. Not through an engine, which would take
        them for the step's own."""
        stage = self.stage
        with stage.evaluating():
            outputs, targets = stage.backbone.answer_logits(stage.model, inputs)
            loss = stage.backbone.token_loss(outputs.logits, targets) / len(targets)
            found = torch.autograd.grad(loss, weights, allow_unused=True)
        return [torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True)]
