"""A prototype router: an adapter for every task, and every question finds its own.

    p_t = mean of phi(x) over some records of task t        phi(x): the base's state behind the question x
    question x is answered with the adapter of the task whose p_t is nearest to phi(x), of the tasks trained so far

It says what an oracle costs if nobody tells the task. phi is of the base without any adapter, so that prototypes never
move (llava/states.py). The field's routers look at CLIP's features (HiDe-LLaVA, arXiv 2503.12941) or are trained
(MR-LoRA, arXiv 2506.05453); this one is the plain baseline. A question costs one pass of the base more, and a test set
as many loaded adapters as it has tasks that answer it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llaca import ranks
from llaca.fields import setting
from llaca.methods.reference import LoraPerTask
from llava.states import question_of, question_states


class PrototypeRouter(LoraPerTask):
    """A fresh LoRA for every task, and every question is answered with that of the task it looks like."""

    @dataclass
    class Settings:
        estimate_records: int = setting(200, "records of a task that make its prototype", least=1)

    def recall(self, memory: dict) -> None:
        """Makes the prototype while the weights are fresh, which is to say the base's."""
        stage = self.stage
        drawn = stage.draw(self.settings.estimate_records)
        mine = drawn[ranks.rank() :: ranks.count()]
        total = torch.zeros(
            stage.model.get_output_embeddings().in_features, device=next(stage.model.parameters()).device
        )
        with stage.evaluating():
            total += question_states(stage.model, stage.backbone, (question_of(stage.dataset[n]) for n in mine)).sum(0)
        ranks.add_up([total])
        self.prototype = total / len(drawn)

    def memory(self) -> dict:
        return {"prototype": self.prototype.cpu()}

    @staticmethod
    def route(states: Tensor, memories: list[dict]) -> list[int]:
        """Whose prototype each state [questions, width] is nearest to: the number of its memory."""
        prototypes = torch.stack([memory["prototype"] for memory in memories])
        return torch.cdist(states.cpu(), prototypes).argmin(1).tolist()
