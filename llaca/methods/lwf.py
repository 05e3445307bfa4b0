"""Learning without forgetting (Li and Hoiem, arXiv 1606.09282): the weights at the stage's start teach on the new data.

    L = CE + lambda T^2 KL( softmax(z_old / T) || softmax(z / T) ),    mean over the supervised tokens

z are the logits of the model in training, z_old those of the weights that the stage began with, without dropout; the
picture's placeholder is in neither, as in the loss. The mean is over a micro-batch, whatever the loss normalisation.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from llaca.engines.shards import Shards
from llaca.fields import setting
from llaca.methods.base import WHOLE_TENSORS, Method
from llava.backbone import Backbone


def spoken(backbone: Backbone, logits: Tensor) -> Tensor:
    """Which columns of logits [tokens, words] are words: bool [words]."""
    words = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device)
    words[backbone.silent] = False
    return words


class LwF(Method):
    """LoRA that keeps the answers of the weights it started from."""

    @dataclass
    class Settings:
        penalty: float = setting(1.0, "lambda, the weight of the term", least=0)
        temperature: float = setting(2.0, "T of both softmaxes", above=0)

    engines = WHOLE_TENSORS
    teacher: dict[str, Tensor] | None = None

    def before_task(self, shards: Shards, matched: bool, steps: int) -> None:
        weights = self.stage.weights()
        self.teacher = {name: weight.detach().clone() for name, weight in weights.items()} if matched else None

    def loss(self, model, inputs, outputs) -> Tensor | None:
        """The distillation term, None in the first stage of these parameters."""
        if self.teacher is None:
            return None
        divergence = self.divergence(outputs.logits, self.taught(inputs), "batchmean")
        return self.settings.penalty * self.settings.temperature**2 * divergence

    def taught(self, inputs) -> Tensor:
        """z_old [tokens, words], without dropout."""
        return self.stage.logits_with(self.teacher, inputs)

    def divergence(self, logits: Tensor, taught: Tensor, reduction: str) -> Tensor:
        """KL of both softmaxes: "batchmean" over the tokens, or "none", of each token and word."""
        temperature, words = self.settings.temperature, spoken(self.stage.backbone, logits)
        said, wanted = (log_softmax(z[:, words].float() / temperature, dim=-1) for z in (logits, taught))
        return kl_div(said, wanted, log_target=True, reduction=reduction)

    def state_dict(self) -> dict:
        return {} if self.teacher is None else {"teacher": self.teacher}

    def load_state_dict(self, state: dict) -> None:
        if self.teacher is not None:
            self.teacher = {name: state["teacher"][name].to(t.device) for name, t in self.teacher.items()}
