"""Routers: an adapter for every task, and every question finds its own, which no oracle tells.

    prototype       argmin_t |phi(x) - m_t|
    discriminant    argmax_t phi(x) S^-1 m_t - m_t S^-1 m_t / 2         (ours)

x is a question, phi(x) the base's state behind it, of width d, without any adapter, so that nothing here ever moves
(llava/states.py); t runs over the tasks trained so far. m_t is the mean of phi over some records of task t, C_t their
covariance, S = (1 - a) C + a tr(C)/d I with C the mean of all C_t: Fisher's linear discriminant with the shrinkage a.
What a task leaves are its adapter, m_t and C_t: no record, and no question is told its task.

The field's routers look at CLIP's features (HiDe-LLaVA, arXiv 2503.12941) or are trained (MR-LoRA, arXiv 2506.05453);
classifiers of frozen features by class means and a shared covariance are known from continual image classification
(SLDA, arXiv 1909.01520). A question costs one pass of the base more, and a test set as many loaded adapters as it has
tasks that answer it; adapters grow with the tasks.
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
        """Takes mean and covariance while the weights are fresh, which is to say the base's."""
        stage = self.stage
        drawn = stage.draw(self.settings.estimate_records)
        items = (question_of(stage.dataset[number]) for number in drawn[ranks.rank() :: ranks.count()])
        width = stage.model.get_output_embeddings().in_features
        # Around the first record's state, the same on every rank: squares of what is far from 0 would lose digits.
        with stage.evaluating():
            [around] = question_states(stage.model, stage.backbone, [question_of(stage.dataset[drawn[0]])])
            apart = question_states(stage.model, stage.backbone, items).view(-1, width) - around
        total, squares = apart.sum(0), apart.T @ apart
        ranks.add_up([total, squares])
        mean = total / len(drawn)
        self.mean, self.covariance = around + mean, squares / len(drawn) - mean.outer(mean)

    def memory(self) -> dict:
        return {"mean": self.mean.cpu()}

    def route(self, states: Tensor, memories: list[dict]) -> list[int]:
        """Whose mean each state [questions, width] is nearest to: the number of its memory."""
        means = torch.stack([memory["mean"] for memory in memories])
        return torch.cdist(states.cpu(), means).argmin(1).tolist()


class DiscriminantRouter(PrototypeRouter):
    """Ours: a fresh LoRA for every task, and every question is answered with that of the task most likely its own."""

    @dataclass
    class Settings(PrototypeRouter.Settings):
        shrinkage: float = setting(0.01, "a, of the covariance towards a multiple of I", above=0, most=1)

    def memory(self) -> dict:
        return {"mean": self.mean.cpu(), "covariance": self.covariance.cpu()}

    def route(self, states: Tensor, memories: list[dict]) -> list[int]:
        """Of which task each state [questions, width] is most likely: the number of its memory."""
        means = torch.stack([memory["mean"] for memory in memories]).double()
        shared = torch.stack([memory["covariance"] for memory in memories]).double().mean(0)
        size = self.settings.shrinkage * shared.trace() / len(shared)
        shared = (1 - self.settings.shrinkage) * shared + size * torch.eye(len(shared), dtype=torch.float64)
        weights = torch.linalg.solve(shared, means.T)  # [width, tasks]
        likely = states.cpu().double() @ weights - (means * weights.T).sum(1) / 2
        return likely.argmax(1).tolist()
