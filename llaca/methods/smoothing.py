"""Uncertainty-aware learning, in the style of arXiv 2406.04854: labels are smoothed where the model was unsure.

    L = mean over tokens of (1 - e_i) CE + e_i mean_v(-log p_v)        e_i = e_max (u_i - min u) / (max u - min u)

u_i is the uncertainty of record i. The source has a stronger language model say it; here it is the mean entropy of the
answer's tokens under the weights at the stage's start, over the records of a micro-batch. It is no method against
forgetting, and stands here as the loss alone.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from llaca.engines.shards import Shards
from llaca.fields import setting
from llaca.methods.lwf import LwF, spoken
from llava.conversation import IGNORE


class Smoothing(LwF):
    """LoRA with smoothed labels, in every stage."""

    compares = True

    @dataclass
    class Settings:
        smoothing: float = setting(0.1, "e_max, the smoothing of the least certain record", least=0, below=1)

    def before_task(self, shards: Shards, matched: bool, steps: int) -> None:
        super().before_task(shards, True, steps)

    def loss(self, model, inputs, outputs) -> Tensor:
        """What makes mean CE the smoothed loss."""
        answered = inputs["labels"] != IGNORE
        record, targets = answered.nonzero()[:, 0], inputs["labels"][answered]
        words = spoken(self.stage.backbone, outputs.logits)
        before = log_softmax(self.taught(inputs)[:, words].float(), dim=-1)
        entropy = -(before.exp() * before).sum(-1)
        counts = answered.sum(1).clamp(min=1)
        unsure = torch.zeros(len(answered), device=entropy.device).index_add_(0, record, entropy) / counts
        low, high = unsure.min(), unsure.max()
        share = self.settings.smoothing * (unsure - low) / (high - low).clamp(min=torch.finfo(unsure.dtype).tiny)
        said = log_softmax(outputs.logits.float().masked_fill(~words, -torch.inf), dim=-1)
        spread = -said[:, words].mean(-1)
        return (share[record] * (spread + said.gather(1, targets[:, None])[:, 0])).mean()
