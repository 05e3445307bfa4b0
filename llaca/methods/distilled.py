"""Two ways to be taught by the weights at the stage's start (llaca/methods/lwf.py), with what their sources add.

    recyclable   L = CE + lambda T^2 KL + mu/2 MSE(h, h_old)     h: what goes into the head, of answered tokens
    corrective   L = mean_i w_i (CE_i + lambda T^2 KL_i)         w_i ~ exp(eta [student and teacher disagree on i])

Recyclable tuning (Qin et al., arXiv 2305.08702) carries a task over to a new base by logits and hidden states; here the
new base is the next stage. Its loss weighs CE by 1 - a and KL by a, which is lambda = a / (1 - a). Dynamic corrective
self-distillation (arXiv 2312.07028) gives records on which the student departs from its teacher more weight, as
boosting does; its exact rule is not published, so this is in its style: they disagree where an answer's most likely
token differs, and the weights of a micro-batch have mean 1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from llaca.engines.shards import Shards
from llaca.fields import setting
from llaca.methods.lwf import LwF, spoken
from llava.conversation import IGNORE


class Recyclable(LwF):
    """LwF that also keeps what goes into the head."""

    @dataclass
    class Settings(LwF.Settings):
        hidden: float = setting(10.0, "mu, the weight of the hidden states", least=0)

    seen: Tensor | None = None  # what went into the head last

    def before_task(self, shards: Shards, matched: bool, steps: int) -> None:
        super().before_task(shards, matched, steps)

        def look(head, inputs):
            self.seen = inputs[0]

        if matched:
            self.hook = self.stage.model.get_output_embeddings().register_forward_pre_hook(look)

    def loss(self, model, inputs, outputs) -> Tensor | None:
        """Both terms, None in the first stage of these parameters."""
        if self.teacher is None:
            return None
        now = self.seen
        taught = self.taught(inputs)
        apart = (now.float() - self.seen.float()).square()
        if apart.dim() == 3:  # an encoder-decoder's head gets whole rows, padding behind the answers
            counts = (inputs["labels"] != IGNORE).sum(1, keepdim=True)
            apart = apart[torch.arange(apart.shape[1], device=apart.device) < counts]
        apart = apart.mean()
        taught = (
            self.settings.penalty * self.settings.temperature**2 * self.divergence(outputs.logits, taught, "batchmean")
        )
        return taught + self.settings.hidden / 2 * apart

    def after_task(self, shards: Shards, folder) -> tuple[None, dict]:
        if self.teacher is not None:
            self.hook.remove()
            self.seen = None
        return None, {}


class Corrective(LwF):
    """LwF that minds the records on which it has departed from its teacher."""

    compares = True

    @dataclass
    class Settings(LwF.Settings):
        boost: float = setting(1.0, "eta, how much more such a record weighs", least=0)

    def loss(self, model, inputs, outputs) -> Tensor | None:
        """What makes mean CE the weighted loss, None in the first stage of these parameters."""
        if self.teacher is None:
            return None
        answered = inputs["labels"] != IGNORE
        record, targets = answered.nonzero()[:, 0], inputs["labels"][answered]
        taught, words = self.taught(inputs), spoken(self.stage.backbone, outputs.logits)
        logits = outputs.logits.float().masked_fill(~words, -torch.inf)
        departs = logits.argmax(-1) != taught.float().masked_fill(~words, -torch.inf).argmax(-1)
        disagrees = torch.zeros(len(answered), device=logits.device)
        disagrees.scatter_reduce_(0, record, departs.float(), "amax")
        weights = torch.exp(self.settings.boost * disagrees)
        weights = (weights / weights.mean())[record]
        terms = cross_entropy(logits, targets, reduction="none")
        apart = self.settings.temperature**2 * self.divergence(outputs.logits, taught, "none").sum(-1)
        return ((weights - 1) * terms + self.settings.penalty * weights * apart).mean()
