"""The hooks of a method. `Method` itself is plain sequential LoRA: every hook does nothing."""

from pathlib import Path

from torch import Tensor

from llaca.config import AVERAGE_FIELDS, MethodConfig
from llaca.engine import Shards
from llava.hooks import TrainHooks


class Method(TrainHooks):
    """A way to train a stream. One object serves a whole run.

    A stage calls before_task; then, for every micro-batch, loss (llava/hooks.py) and, for every optimizer step,
    after_step; then after_task. Shards are this rank's part of the trainable tensors (llaca/engine.py).
    """

    trains = True  # False: the base model is only evaluated
    joint = False  # True: one stage with all tasks
    averages = False  # True: the recipe's fields about averages apply

    def __init__(self, config: MethodConfig):
        """Raises ValueError for settings that the method cannot follow: before anything is trained."""
        self.config = config
        given = [name for name in AVERAGE_FIELDS if getattr(config, name) is not None]
        if given and not self.averages:
            raise ValueError(f"method {config.method} keeps no average; drop {', '.join(given)} or choose llaca")

    @property
    def watches(self) -> bool:
        """Whether this stage needs after_step."""
        return False

    def before_task(self, shards: Shards, matched: bool, steps: int) -> None:
        """A stage of `steps` optimizer steps begins at these weights; `matched`: it continues an existing group."""

    def after_step(self, shards: Shards) -> None:
        """The parameters have just moved by these gradients."""

    def after_task(self, shards: Shards, folder: Path) -> tuple[list[Tensor] | None, dict]:
        """The shards to hand on (None: as trained) and what stage.json tells. Every rank calls it; the first one alone
        writes into `folder`."""
        return None, {}

    def state_dict(self) -> dict:
        """All that this rank needs to go on inside a stage exactly."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Take over a `state_dict`, after before_task."""
