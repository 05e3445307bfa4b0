"""The hooks of a method. `Method` itself is plain sequential LoRA: every hook does nothing."""

from pathlib import Path

from llaca.config import MethodConfig
from llava.hooks import Parameters, StepHooks

AVERAGE_FIELDS = ("average", "average_start", "fallback_beta", "beta", "constant", "horizon")


class Method(StepHooks):
    """A way to train a stream. One object serves a whole run.

    A stage calls before_task; then, for every micro-batch, loss and, for every optimizer step, before_step and
    after_step (see llava/hooks.py); then after_task.
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

    def before_task(self, matched: bool, parameters: Parameters, steps: int) -> None:
        """Before a stage of `steps` optimizer steps; `matched`: it continues a parameter set of the pool."""

    def after_task(self, parameters: Parameters, folder: Path) -> dict:
        """After a stage: may change the parameters in place and write into `folder`; returns facts for stage.json.

        The key `averaged` says whether the parameters were changed, so that the trained ones are kept beside them.
        """
        return {"averaged": False}
