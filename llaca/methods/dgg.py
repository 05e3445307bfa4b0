"""Dynamic gradient guidance, in the style of Li et al. (arXiv 2511.15164): the gradient that earlier tasks no longer
give is replaced by the way back to where they were learnt.

    g <- g + |g| (theta - theta*) / |theta - theta*|        at a step that a Bernoulli draw of probability p chooses

theta* are the weights that the stage started from, the norms go over all trained tensors together. A step against the
added part leads from theta to theta*. What we could read of the source leaves its scale open; here it has the length of
the step's own gradient. The draw is a function of the stage's seed and the step. With `memory_records` the buffer of
replay is trained on, too, as the source does.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from llaca.engines.shards import Shards, add_at_own_length
from llaca.fields import setting
from llaca.methods.base import WHOLE_TENSORS
from llaca.methods.replay import Replay
from llava.dataset import InstructionDataset


class DGG(Replay):
    """LoRA that is guided back at some of its steps."""

    @dataclass
    class Settings:
        probability: float = setting(0.1, "p, the share of guided steps; 0.05 to 0.2 in the source", least=0, most=1)
        memory_records: int = setting(0, "records of each earlier task that are kept and trained on", least=0)

    engines = WHOLE_TENSORS
    edits_gradients = True
    start: list[Tensor] | None = None
    steps = 0

    @property
    def watches(self) -> bool:
        return self.start is not None

    def extend(self, dataset: InstructionDataset, earlier: Mapping[str, InstructionDataset]) -> InstructionDataset:
        return super().extend(dataset, earlier) if self.settings.memory_records else dataset

    def before_task(self, shards: Shards, matched: bool, steps: int) -> None:
        self.steps = 0
        self.start = [p.detach().clone() for p in shards.parameters] if matched else None

    def after_backward(self, shards: Shards) -> None:
        self.steps += 1
        if random.Random(f"{self.stage.seed} {self.steps}").random() >= self.settings.probability:
            return
        away = [p.detach().float() - old.float() for p, old in zip(shards.parameters, self.start, strict=True)]
        add_at_own_length(shards, away)

    def state_dict(self) -> dict:
        return {} if self.start is None else {"start": self.start, "steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        if self.start is not None:
            self.start = [old.to(new.device) for old, new in zip(state["start"], self.start, strict=True)]
            self.steps = state["steps"]
