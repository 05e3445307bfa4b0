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
from llaca.methods.base import Method
from llaca.methods.lwf import LwF, spoken
from llava.conversation import IGNORE


class HeadInputs(Method):
    """A method that looks at what goes into the head."""

    seen: Tensor | None = None  # what went in last

    def watch_head(self) -> None:
        """Keeps it from here on."""

        def look(head, inputs):
            self.seen = inputs[0]

        self.hook = self.stage.model.get_output_embeddings().register_forward_pre_hook(look)

    def leave_head(self) -> None:
        """Keeps it no longer."""
        self.hook.remove()
        self.seen = None

    def head_inputs(self, inputs) -> Tensor:
        """What went in last, of the answered tokens: float32 [tokens, width]."""
        if self.seen.dim() == 2:
            return self.seen.float()
        counts = (inputs["labels"] != IGNORE).sum(1, keepdim=True)
        # An encoder-decoder's head gets whole rows, padding behind the answers.
        return self.seen.float()[torch.arange(self.seen.shape[1], device=self.seen.device) < counts]


class Recyclable(HeadInputs, LwF):
    """LwF that also keeps what goes into the head."""

    @dataclass
    class Settings(LwF.Settings):
        hidden: float = setting(10.0, "mu, the weight of the hidden states", least=0)

    def before_task(self, shards: Shards, matched: bool, steps: int) -> None:
        super().before_task(shards, matched, steps)
        if matched:
            self.watch_head()

    def loss(self, model, inputs, outputs) -> Tensor | None:
        """Both terms, None in the first stage of these parameters."""
        if self.teacher is None:
            return None
        now = self.head_inputs(inputs)
        taught = self.taught(inputs)
        apart = (now - self.head_inputs(inputs)).square().mean()
        taught = (
            self.settings.penalty * self.settings.temperature**2 * self.divergence(outputs.logits, taught, "batchmean")
        )
        return taught + self.settings.hidden / 2 * apart

    def after_task(self, shards: Shards, folder) -> tuple[None, dict]:
        if self.teacher is not None:
            self.leave_head()
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
