"""A moving average of the trained weights takes their place at the end of a stage: LLaCA, and the fixed EMA.

    theta*_t = beta_t theta*_{t-1} + (1 - beta_t) theta_t        (Eq. 1), beta by the recipe's rule (llaca/ema.py)

As in the paper's Algorithm 1 the average runs only in stages that continue an existing parameter set; a new group
trains as plain LoRA. Without grouping every stage but the first continues the same set.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from llaca.config import MethodConfig
from llaca.ema import DynamicAverage
from llaca.methods.base import Method

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class MovingAverage(Method):
    """Trains as LoRA does, averages beside it, and hands on the average."""

    def __init__(self, config: MethodConfig):
        super().__init__(config)
        self.average: DynamicAverage | None = None

    def before_task(self, matched: bool, parameters: dict[str, nn.Parameter], steps: int) -> None:
        self.average = None
        if matched:
            own = {"beta": self.config.beta, "constant": self.config.constant}
            if self.config.horizon is not None:
                own["mu_rel"] = self.config.horizon * steps - 1
            self.average = DynamicAverage(
                list(parameters),
                list(parameters.values()),
                self.config.average,
                self.config.fallback_beta,
                self.config.average_start,
                **{key: value for key, value in own.items() if value is not None},
            )

    def after_step(self, parameters: dict[str, nn.Parameter]) -> None:
        if self.average is not None:
            tensors = list(parameters.values())
            self.average.step(tensors, [p.grad for p in tensors])

    def after_task(self, parameters: dict[str, nn.Parameter], folder: Path) -> dict:
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
