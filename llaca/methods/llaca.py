"""A moving average of the trained weights takes their place at the end of a stage: LLaCA, and the fixed EMA.

    theta*_t = beta_t theta*_{t-1} + (1 - beta_t) theta_t        (Eq. 1), beta by the recipe's rule (llaca/beta.py)

As in the paper's Algorithm 1 the average runs only in stages that continue an existing parameter set; a new group
trains as plain LoRA. Without grouping every stage but the first continues the same set.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from llaca import ranks
from llaca.ema import DynamicAverage, Trace
from llaca.engines.shards import Shards
from llaca.fields import setting
from llaca.methods.base import Method

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
# Rule -> what it becomes with a given mean of 1 - beta: a key of VARIANTS, its parameter, and that one's value.
HORIZONS: dict[str, Callable[[float], tuple[str, str, float]]] = {
    "fixed": lambda rate: ("fixed", "beta", 1 - rate),
    "lcia_release": lambda rate: ("lcia_horizon", "rate", rate),
    "secant": lambda rate: ("secant", "mu_rel", 1 / rate - 1),
}


class LLaCA(Method):
    """The paper's method: trains as LoRA does, averages beside it by Eq. 45, and hands on the average, inside groups of
    tasks with similar instructions."""

    @dataclass
    class Settings:
        average: str = setting("eq45", "rule of the balance weight beta, see llaca/beta.py")
        average_start: str | None = setting(
            None, "stage_start (the paper) or after_first_step (the release); unset: the rule's own"
        )
        fallback_beta: float | None = setting(
            None, "beta where the rule gives none in (0, 1); unset: the rule's own, mostly 0.99"
        )
        beta: float | None = setting(None, "beta of the rule 'fixed'")
        constant: float | None = setting(None, "constant of the rules of the released codes")
        horizon: float | None = setting(
            None,
            "memory in stages, above 0: 1 - beta is 1 / (horizon x steps) in place of a constant, for the rules fixed, "
            "lcia_release (on average) and secant (where the slope has gone)",
            above=0,
        )
        beta_trace: Literal["quantiles", "full"] = setting(
            "quantiles", "beta.csv: quantiles per step, or full: a row per step and tensor"
        )

    changes: ClassVar = {"grouping": True}
    belongs_to: ClassVar = {"average": ("average_start", "fallback_beta", "beta", "constant", "horizon")}

    def __init__(self, settings: Settings | None = None):
        super().__init__(settings)
        self.average: DynamicAverage | None = None
        self._traces: list[Trace] = []
        self._told = 0  # steps that the log has
        self._start(["trial"], [torch.zeros(1)], steps=1000)  # raises now for settings that would fail in stage 4

    def _start(self, names: list[str], tensors: list[Tensor], steps: int) -> DynamicAverage:
        settings, rule, fallback = self.settings, self.settings.average, self.settings.fallback_beta
        own = {"beta": settings.beta, "constant": settings.constant}
        if settings.horizon is not None:
            if rule not in HORIZONS:
                raise ValueError(f"horizon: the rule {rule} has none; those that do are {', '.join(HORIZONS)}")
            if settings.beta not in (None, type(settings).beta):
                raise ValueError("beta and horizon say the same thing twice: give one of the two")
            rate = 1 / max(settings.horizon * steps, 1 + 1e-3)
            rule, named, value = HORIZONS[rule](rate)
            own = {named: value}
            fallback = 1 - rate if fallback is None and named == "rate" else fallback
        own = {key: value for key, value in own.items() if value is not None}
        return DynamicAverage(names, tensors, rule, fallback, settings.average_start, **own)

    @property
    def watches(self) -> bool:
        return self.average is not None

    def before_task(self, shards: Shards, matched: bool, steps: int) -> None:
        self.average = self._start(shards.names, shards.parameters, steps) if matched else None
        self._traces, self._told = [], 0

    def after_step(self, shards: Shards) -> None:
        table = self.average.measure(shards.parameters, shards.gradients)
        self.average.update(shards.sum(table), shards.parameters)

    def log(self) -> dict[str, float]:
        """Over the steps since the last line: quantiles of beta and the share of tensor-steps that fell back."""
        if self.average is None:
            return {}
        trace = self._trace()
        beta, fallback = trace.beta[self._told :], trace.fallback[self._told :]
        self._told = len(trace.beta)
        low, middle, high = np.quantile(beta, [0.05, 0.5, 0.95]).tolist()
        share = float(fallback.mean())
        return {"beta_q05": low, "beta_median": middle, "beta_q95": high, "beta_fallback_share": share}

    def after_task(self, shards: Shards, folder: Path) -> tuple[list[Tensor] | None, dict]:
        if self.average is None:
            return None, {}
        trace = self._trace()
        if ranks.first():
            table = full_table(trace, shards.names) if self.settings.beta_trace == "full" else quantile_table(trace)
            table.to_csv(folder / "beta.csv", index=False, float_format="%.9g")
        return list(self.average.averages().values()), {
            "average": self.average.settings,
            "average_bytes": self.average.bytes(),
            "beta_fallback_share": float(trace.fallback.mean()),
            "beta_median": float(np.median(trace.beta)),
        }

    def state_dict(self) -> dict:
        if self.average is None:
            return {}
        trace = self._trace()
        rows = [torch.from_numpy(part) for part in trace[1:]]
        return {"average": self.average.state_dict(), "trace": rows, "told": self._told}

    def load_state_dict(self, state: dict) -> None:
        if self.average is not None:
            self.average.load_state_dict(state["average"])
            self._traces = [Trace(1, *(rows.numpy() for rows in state["trace"]))]
            self._told = state["told"]

    def _trace(self) -> Trace:
        # all of the stage so far
        self._traces.append(self.average.drain_trace())
        whole = Trace(1, *(np.concatenate(rows) for rows in list(zip(*self._traces, strict=True))[1:]))
        self._traces = [whole]
        return whole


class FixedEMA(LLaCA):
    """ "Stable EMA" of the paper's Table 6: a fixed balance weight, no grouping."""

    @dataclass
    class Settings(LLaCA.Settings):
        average: str = setting("fixed", "rule of the balance weight beta, see llaca/beta.py")
        beta: float | None = setting(0.99, "beta of the rule 'fixed'")

    changes: ClassVar = {}


def quantile_table(trace: Trace) -> pd.DataFrame:
    """A row per step: quantiles over tensors of the beta that was used, and the share of tensors that fell back."""
    quantiles = np.quantile(trace.beta, QUANTILES, axis=1).T
    table = pd.DataFrame(quantiles, columns=[f"beta_q{round(100 * q):02d}" for q in QUANTILES])
    table.insert(0, "step", np.arange(trace.first_step, trace.first_step + len(table)))
    return table.assign(fallback_share=trace.fallback.mean(axis=1))


def full_table(trace: Trace, names: list[str]) -> pd.DataFrame:
    """A row per step and tensor: the beta that was used, and whether it is the fallback."""
    steps = np.arange(trace.first_step, trace.first_step + len(trace.beta))
    return pd.DataFrame(
        {
            "step": np.repeat(steps, len(names)),
            "tensor": np.tile(names, len(steps)),
            "beta": trace.beta.ravel(),
            "fallback": trace.fallback.ravel().astype(int),
        }
    )
