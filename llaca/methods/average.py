"""A moving average of the trained weights takes their place at the end of a stage: LLaCA, and the fixed EMA.

    theta*_t = beta_t theta*_{t-1} + (1 - beta_t) theta_t        (Eq. 1), beta by the recipe's rule (llaca/ema.py)

As in the paper's Algorithm 1 the average runs only in stages that continue an existing parameter set; a new group
trains as plain LoRA. Without grouping every stage but the first continues the same set.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import torch

from llaca.config import MethodConfig
from llaca.ema import DynamicAverage
from llaca.methods.base import Method
from llava.hooks import Parameters

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class MovingAverage(Method):
    """Trains as LoRA does, averages beside it, and hands on the average."""

    averages = True

    def __init__(self, config: MethodConfig):
        super().__init__(config)
        if config.average is None:
            raise ValueError(f"method {config.method} needs a rule for beta: set average, e.g. --average eq45")
        self.average: DynamicAverage | None = None
        self._start(["trial"], [torch.zeros(1)], steps=1000)  # raises now for settings that would fail in stage 4

    def _start(self, names: list[str], tensors: list[torch.Tensor], steps: int) -> DynamicAverage:
        own = {"beta": self.config.beta, "constant": self.config.constant}
        if self.config.horizon is not None:
            own["mu_rel"] = max(self.config.horizon * steps - 1, 1e-3)
        own = {key: value for key, value in own.items() if value is not None}
        config = self.config
        return DynamicAverage(names, tensors, config.average, config.fallback_beta, config.average_start, **own)

    def before_task(self, matched: bool, parameters: Parameters, steps: int) -> None:
        self.average = self._start(list(parameters), list(parameters.values()), steps) if matched else None

    def after_step(self, parameters: Parameters) -> None:
        if self.average is not None:
            tensors = list(parameters.values())
            self.average.step(tensors, [p.grad for p in tensors])

    def after_task(self, parameters: Parameters, folder: Path) -> dict:
        if self.average is None:
            return {"averaged": False}
        trace = self.average.drain_trace()
        beta_table(trace).to_csv(folder / "beta.csv", index=False, float_format="%.6g")
        averages = self.average.averages()
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(averages[name])
        return {
            "averaged": True,
            "average": self.average.settings,
            "beta_fallback_share": float(trace.fallback.mean()),
            "beta_median": float(np.median(trace.beta)),
        }


def beta_table(trace) -> pd.DataFrame:
    """A row per step: quantiles over tensors of the beta that was used, and the share of tensors that fell back."""
    quantiles = np.quantile(trace.beta, QUANTILES, axis=1).T
    table = pd.DataFrame(quantiles, columns=[f"beta_q{round(100 * q):02d}" for q in QUANTILES])
    table.insert(0, "step", np.arange(trace.first_step, trace.first_step + len(table)))
    return table.assign(fallback_share=trace.fallback.mean(axis=1))
