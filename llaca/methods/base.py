"""The hooks of a method. `Method` itself is plain sequential LoRA: every hook does nothing."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from llaca.engines.shards import Shards
from llaca.sections import ModelConfig
from llava.adapters import attach_lora, trainable_parameters
from llava.backbone import Backbone
from llava.dataset import Collator, InstructionDataset
from llava.hooks import TrainHooks

EVERY_ENGINE = ("none", "0", "1", "2", "3", "3-offload")
WHOLE_TENSORS = ("none", "0", "1", "2")  # engines under which every rank has whole weights to compute with


@dataclass
class StageView:
    """The stage that is trained, as a method sees it. `model` has its adapter attached and no engine around it;
    `dataset` holds the stage's own records, without what a method adds; `task` names it."""

    task: str
    model: nn.Module
    dataset: InstructionDataset
    seed: int

    @property
    def backbone(self) -> Backbone:
        """That of the model."""
        return self.dataset.backbone

    def draw(self, count: int) -> list[int]:
        """Numbers of `count` different records (all, if there are fewer), a function of the stage's seed."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randperm(len(self.dataset), generator=generator)[:count].tolist()

    def batches(self, records: Sequence[int], size: int = 1) -> Iterator[dict[str, Tensor]]:
        """Batches of these records of `dataset`, on the model's device."""
        yield from batches_of(self.dataset, records, size, next(self.model.parameters()).device)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """The model without dropout meanwhile."""
        training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(training)

    def logits_with(self, weights: dict[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        """Logits [tokens, words] of a batch's answered tokens with these weights in place of the model's own, without
        gradient and dropout."""

        def model(**given):
            return functional_call(self.model, weights, (), given)

        with torch.no_grad(), self.evaluating():
            return self.backbone.answer_logits(model, batch)[0].logits

    def weights(self) -> dict[str, nn.Parameter]:
        """What trains, by name: whole tensors, unless the engine is ZeRO 3."""
        return trainable_parameters(self.model)


def batches_of(
    dataset: InstructionDataset, records: Sequence[int], size: int, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """Batches of at most `size` of these records, on `device`."""
    collate = Collator(dataset.backbone)
    for start in range(0, len(records), size):
        batch = collate([dataset[record] for record in records[start : start + size]])
        yield {key: value.to(device) for key, value in batch.items()}


class Method(TrainHooks):
    """A way to train a stream. One object serves a whole run.

    A stage calls recall, extend and before_task; then, for every micro-batch, loss (llava/hooks.py) and, for every
    optimizer step, after_backward and after_step; then after_task and memory. Shards are this rank's part of the
    trainable tensors (llaca/engines/). `stage` is the StageView of the stage that is under way.
    """

    trains = True  # False: the base model is only evaluated
    joint = False  # True: one stage with all tasks
    oracle = False  # True: every task has parameters of its own, and a test set is told which task it is of
    # Which stage's parameters answer each question, by its number, of what the base makes of the questions
    # [questions, width] (llava/states.py) and of the stages' memories; None: the pool chooses for a whole test set.
    route: Callable[[Tensor, list[dict]], list[int]] | None = None
    mergeable = True  # False: the adapter stays beside the weights when it answers
    edits_gradients = False  # True: after_backward changes them
    edits_weights = False  # True: after_step changes them
    engines: tuple[str, ...] = EVERY_ENGINE  # values of the recipe's `zero` under which it works
    rests = False  # True: some of what has a gradient must not move; without weight decay, and no group from another's
    compares = False  # True: it compares the records of a micro-batch
    takes_local = False  # True: it changes the gradient of a micro-batch's mean loss, and no other normalisation's
    copies = 0  # float32 copies of what trains that it keeps through a stage, beside those of an `average` setting
    changes: ClassVar[dict[str, Any]] = {}  # fields of a recipe that have another default with this method
    belongs_to: ClassVar[dict[str, tuple[str, ...]]] = {}  # setting -> those that are meant for one value of it alone
    stage: StageView

    @dataclass
    class Settings:
        """The method's own settings: fields of a recipe, and of the command line (llaca.fields.setting)."""

    def __init__(self, settings: Any = None):
        """Raises ValueError for settings that do not go together: before anything is trained."""
        self.settings = self.Settings() if settings is None else settings

    @property
    def watches(self) -> bool:
        """Whether this stage needs after_backward and after_step."""
        return self.edits_gradients or self.edits_weights

    @property
    def hands_on(self) -> bool:
        """Whether the method has a `memory`."""
        return type(self).memory is not Method.memory

    def check_model(self, config: ModelConfig) -> None:
        """Raises ValueError if the method cannot adapt such a model: before anything is trained."""

    def attach(self, model: nn.Module, backbone: Backbone, config: ModelConfig) -> nn.Module:
        """The model with what is trained attached, in training and in evaluation. Raises ValueError for a backbone that
        the method cannot train."""
        return attach_lora(model, backbone, config.lora_rank, config.lora_alpha, config.lora_dropout)

    def extend(self, dataset: InstructionDataset, earlier: Mapping[str, InstructionDataset]) -> InstructionDataset:
        """The records to train on, from the stage's own and those of earlier tasks by name."""
        return dataset

    def before_task(self, shards: Shards, matched: bool, steps: int) -> None:
        """A stage of `steps` optimizer steps begins at these weights; `matched`: it continues an existing group."""

    def after_backward(self, shards: Shards) -> None:
        """The step's gradients are reduced and about to be used; they may be changed in place."""

    def after_step(self, shards: Shards) -> None:
        """The parameters have just moved by these gradients."""

    def after_task(self, shards: Shards, folder: Path) -> tuple[list[Tensor] | None, dict]:
        """The shards to hand on (None: as trained) and what stage.json tells. Every rank calls it; the first one alone
        writes into `folder`."""
        return None, {}

    def memory(self) -> dict:
        """What the next stage that continues these parameters has to know, the same on every rank: tensors and plain
        containers. It is saved with the stage."""
        return {}

    def recall(self, memory: dict) -> None:
        """Take over the `memory` of the stage whose parameters this one continues; empty where it continues none. The
        weights that the stage starts from may be set here, in `stage.model`."""

    def state_dict(self) -> dict:
        """All that this rank needs to go on inside a stage exactly."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Take over a `state_dict`, after before_task."""
