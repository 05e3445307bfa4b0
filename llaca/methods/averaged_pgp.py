"""PGP whose steps are averaged, in groups: no record and no label of a task is kept.

    theta* <- beta theta* + (1 - beta) theta        theta: PGP's weights; 1 - beta = 1 / (horizon x steps of the stage)

PGP's steps stay in the subspace that earlier tasks' inputs do not reach (llaca/methods/pgp.py), and so does an average
of them, which starts where they start. The average takes away what PGP still changes for the sake of the last batches;
groups keep apart tasks that are asked for in other words. As with the averages of llaca/beta.py, only stages that
continue a group average, and the average is handed on.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from llaca.engines.shards import Shards
from llaca.fields import setting
from llaca.methods.llaca import FixedEMA
from llaca.methods.pgp import PGP
from llava.adapters import adapter_state, set_adapter_state


class AveragedPGP(PGP):
    """Ours: the average of steps where earlier tasks' inputs do not reach, inside groups of similar instructions."""

    @dataclass
    class Settings(PGP.Settings):
        horizon: float = setting(0.5, "memory of the average, in stages", above=0)

    changes: ClassVar = {"grouping": True}
    copies = 1

    def __init__(self, settings: Settings | None = None):
        super().__init__(settings)
        self.average = FixedEMA(FixedEMA.Settings(horizon=self.settings.horizon))

    @property
    def watches(self) -> bool:
        return self.average.watches or super().watches

    def before_task(self, shards: Shards, matched: bool, steps: int) -> None:
        self.average.before_task(shards, matched, steps)
        super().before_task(shards, matched, steps)

    def after_backward(self, shards: Shards) -> None:
        if super().watches:
            super().after_backward(shards)

    def after_step(self, shards: Shards) -> None:
        if super().watches:
            super().after_step(shards)
        if self.average.watches:
            self.average.after_step(shards)

    def after_task(self, shards: Shards, folder: Path) -> tuple[list[Tensor] | None, dict]:
        averaged, more = self.average.after_task(shards, folder)
        model, plain = self.stage.model, None
        if averaged is not None:  # the inputs to protect are those that the weights handed on make
            plain = adapter_state(model)
            set_adapter_state(model, shards.layout.gather(averaged))
        _, told = super().after_task(shards, folder)
        if plain is not None:
            set_adapter_state(model, plain)
        return averaged, {**told, **more}

    def state_dict(self) -> dict:
        return {"projection": super().state_dict(), "average": self.average.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state["projection"])
        self.average.load_state_dict(state["average"])
