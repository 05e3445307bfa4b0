"""BEMA, an average of the weights that makes good for its lag (Block and Zhang, arXiv 2508.00180), inside a stage.

    EMA_t = (1 - b_t) EMA_{t-1} + b_t theta_t     b_t = (rho + t)^-kappa     EMA_0 = theta_0, the stage's start
    handed on: EMA_t + a_t (theta_t - theta_0)    a_t = (rho + t)^-eta

The defaults are those of TRL's callback, which averages every 400 steps; here every step counts. As with the averages
of llaca/beta.py, only stages that continue earlier parameters average.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llaca.engines.shards import Shards
from llaca.fields import setting
from llaca.methods.base import Method


class BEMA(Method):
    """LoRA that hands on a bias-corrected average."""

    @dataclass
    class Settings:
        ema_power: float = setting(0.5, "kappa: how fast the average grows older", least=0)
        bias_power: float = setting(0.2, "eta: how fast the correction towards the last weights fades", least=0)
        lag: float = setting(10.0, "rho, steps that are taken as made before the first", above=0)

    copies = 2
    steps = 0
    start: list[Tensor] | None = None
    average: list[Tensor]

    @property
    def watches(self) -> bool:
        return self.start is not None

    def before_task(self, shards: Shards, matched: bool, steps: int) -> None:
        self.steps = 0
        self.start = [p.detach().float().clone() for p in shards.parameters] if matched else None
        self.average = [start.clone() for start in self.start or ()]

    def after_step(self, shards: Shards) -> None:
        self.steps += 1
        weight = min(1.0, (self.settings.lag + self.steps) ** -self.settings.ema_power)
        torch._foreach_lerp_(self.average, [p.detach().float() for p in shards.parameters], weight)

    def after_task(self, shards: Shards, folder: Path) -> tuple[list[Tensor] | None, dict]:
        if self.start is None:
            return None, {}
        share = (self.settings.lag + self.steps) ** -self.settings.bias_power
        parts = zip(self.average, self.start, shards.parameters, strict=True)
        return [average + share * (now.detach().float() - start) for average, start, now in parts], {}

    def state_dict(self) -> dict:
        return {} if self.start is None else {"steps": self.steps, "start": self.start, "average": self.average}

    def load_state_dict(self, state: dict) -> None:
        if self.start is not None:
            device, self.steps = [p.device for p in self.start], state["steps"]
            for name in ("start", "average"):
                setattr(self, name, [p.to(d) for p, d in zip(state[name], device, strict=True)])
