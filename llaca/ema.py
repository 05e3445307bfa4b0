"""The moving average of the weights and what its balance weight is computed from: tensor math, no engine, no files.

    theta*_t = beta_t theta*_{t-1} + (1 - beta_t) theta_t              (Eq. 1; beta weights the OLD average)

Each trainable tensor ("module layer") has its own beta, a function of sums over its elements. One step:

    measure   sums of all tensors -> table [n_tensors, n_statistics], float64, additive over shards
    update    table -> beta [n_tensors] -> range rule -> Eq. 1

An engine that shards the tensors adds up the tables of its ranks in between. No number goes to the host
tensor by tensor; the one host synchronisation of a step is the check that the table is finite.

The rules and the notation of the statistics are in llaca/beta.py.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from llaca.beta import VARIANTS, Statistics, settings_of


def _sums(tensors: Sequence[Tensor]) -> Tensor:
    # Not torch._foreach_norm: on CPU it adds into one float32, 6e-4 off at 16M elements and stuck at 2^24.
    return torch.stack([t.sum() for t in tensors]).double()


def _l1(tensors: Sequence[Tensor]) -> Tensor:
    return _sums(torch._foreach_abs(tensors))


def _float32(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach().float() for t in tensors]


class _Chunk:
    """Some of the tensors in float32, and the differences the statistics share; `lag_norm` [tensors]."""

    def __init__(self, theta, star, g, lag_norm, old_theta=(), old_g=(), gbar=()):
        self.theta, self.star, self.g, self.lag_norm = theta, star, g, lag_norm
        self.old_theta, self.old_g, self.gbar = old_theta, old_g, gbar

    gap = cached_property(lambda c: torch._foreach_sub(c.theta, c.star))
    lag = cached_property(lambda c: torch._foreach_sub(c.old_theta, c.star))
    move = cached_property(lambda c: torch._foreach_sub(c.theta, c.old_theta))
    change = cached_property(lambda c: torch._foreach_sub(c.g, c.old_g))
    g_ones = cached_property(lambda c: torch._foreach_add(c.g, 1.0))


def _quotient(chunk: _Chunk, factor: Sequence[Tensor]) -> Tensor:
    left, right = torch._foreach_div(factor, chunk.gap), torch._foreach_div(chunk.g_ones, chunk.change)
    return _l1(torch._foreach_mul(left, right))


# Name -> what it keeps of the past (each as large as the parameters) and its sums over a chunk's tensors.
STATISTICS: dict[str, tuple[set[str], Callable[[_Chunk], Tensor]]] = {
    "gradient": (set(), lambda c: _l1(c.g)),
    "gradient_ones": (set(), lambda c: _l1(c.g_ones)),
    "gap": (set(), lambda c: _l1(c.gap)),
    "lag": (set(), lambda c: c.lag_norm),
    "move": ({"old_theta"}, lambda c: _l1(c.move)),
    "change": ({"old_g"}, lambda c: _l1(c.change)),
    "quotient14": ({"old_theta", "old_g"}, lambda c: _quotient(c, c.move)),
    "quotient45": ({"old_theta", "old_g"}, lambda c: _quotient(c, c.lag)),
    "slope": ({"old_theta"}, lambda c: _sums(torch._foreach_mul(c.g, c.lag))),
    "mean_slope": ({"old_theta", "gbar"}, lambda c: _sums(torch._foreach_mul(c.gbar, c.lag))),
}


def _chunks(tensors: Sequence[Tensor]) -> list[slice]:
    # Temporaries are bounded by a chunk: about a cache on a CPU, enough work for a fused launch on a GPU.
    limit = 1 << 20 if tensors[0].device.type == "cpu" else 1 << 26
    bounds, size = [0], 0
    for i, t in enumerate(tensors):
        if i > bounds[-1] and size + t.numel() > limit:
            bounds.append(i)
            size = 0
        size += t.numel()
    return [slice(a, b) for a, b in zip(bounds, [*bounds[1:], len(tensors)], strict=True)]


class Trace(NamedTuple):
    """Beta since the last drain, numpy [steps, n_tensors]; the first row is step `first_step` (from 1).

    raw: before the range rule (nan or infinite where the formula is); beta: the weight used; fallback: bool.
    """

    first_step: int
    raw: np.ndarray
    beta: np.ndarray
    fallback: np.ndarray


class DynamicAverage:
    """theta* of n tensors (or of this rank's shards of them), float32, moved once per optimizer step.

    names, parameters: distinct names, and the tensors at the stage's start, float32, bfloat16 or float16.
    variant: a key of VARIANTS, or eq14, eq45. Its own parameters follow by keyword: `beta` (fixed),
        `constant` (lcia_release, next_release), `mu_rel` and `smoothing` (secant).
    fallback: the beta of the range rule: one outside (0, 1) or not finite is replaced and counted, as is that
        of a first step that lacks g_{t-1}. None: the variant's own, 0.99 (next_release 0.999).
    start: stage_start, theta*_0 = theta_0 as in the paper, or after_first_step, theta*_1 = theta_1 as in the
        release (beta_1 = 0, counted as fallback). None: the variant's own.

    Raises ValueError for an unknown or impossible setting.
    """

    def __init__(
        self,
        names: Sequence[str],
        parameters: Sequence[Tensor],
        variant: str,
        fallback: float | None = None,
        start: str | None = None,
        **variant_parameters: float,
    ):
        self.settings = settings_of(variant, {"fallback": fallback, "start": start, **variant_parameters})
        self._variant = VARIANTS[self.settings["variant"]]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"names must be distinct and at least one, got {list(names)}")
        self.names, self.steps = list(names), 0
        self._shapes, self._dtypes = [tuple(p.shape) for p in parameters], [p.dtype for p in parameters]
        self._check("parameter", parameters)

        self._star = [p.detach().to(torch.float32, copy=True) for p in parameters]
        self._columns = ("gradient", "gap", *self._variant.statistics)
        keeps = sorted(set().union(*(STATISTICS[c][0] for c in self._columns)))
        self._past: dict[str, list[Tensor]] = {key: [] for key in keeps}
        if "old_theta" in keeps:
            self._past["old_theta"] = [p.detach().clone() for p in parameters]
        zeros = torch.zeros(len(names), dtype=torch.float64, device=parameters[0].device)
        self._lag, self._beta, self._fallbacks = zeros.clone(), zeros.clone(), zeros.clone()
        self._memory = zeros[:, None].repeat(1, self._variant.memory)
        self._trace: list[Tensor] = []

    def step(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        """Eq. 1 for every tensor, once per optimizer step, after the parameters moved.

        gradients: those the optimizer step used. Raises as `measure` and `update` do.
        """
        self.update(self.measure(parameters, gradients), parameters)

    @torch.no_grad()
    def measure(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> Tensor:
        """The step's statistics [n_tensors, n_statistics], float64, additive over shards; call once per step.

        Raises ValueError, naming the tensor, for a missing gradient and a wrong shape or dtype (that of a
        gradient is its parameter's or float32).
        """
        self._check("parameter", parameters)
        self._check("gradient", gradients)
        for key, copy in (("old_g", torch.clone), ("gbar", lambda g: g.to(torch.float32, copy=True))):
            if self._past.get(key) == []:  # first step: no change of g yet, no curvature, so the range rule
                self._past[key] = [copy(g.detach()) for g in gradients]
        rows, alphas = [], self._alphas()
        for chunk in _chunks(self._star):
            past = {key: tensors[chunk] for key, tensors in self._past.items()}
            theta, g = _float32(parameters[chunk]), _float32(gradients[chunk])
            if "gbar" in past:  # theta*_{t-1} has just taken in theta_{t-1}, which is where g_t was taken
                torch._foreach_lerp_(past["gbar"], g, alphas[chunk])
            floats = {key: _float32(tensors) for key, tensors in past.items()}
            view = _Chunk(theta, self._star[chunk], g, self._lag[chunk], **floats)
            rows.append(torch.stack([STATISTICS[c][1](view) for c in self._columns], dim=1))
            for key, now in (("old_theta", parameters), ("old_g", gradients)):
                if key in past:
                    torch._foreach_copy_(past[key], [t.detach() for t in now[chunk]])
        return torch.cat(rows)

    @torch.no_grad()
    def update(self, table: Tensor, parameters: Sequence[Tensor]) -> None:
        """Beta from `measure`'s table (summed over shards, if any), the range rule, Eq. 1.

        Raises FloatingPointError, naming the tensors, if a gradient or a parameter is not finite; nothing has
        been averaged then.
        """
        statistics = dict(zip(self._columns, table.unbind(dim=1), strict=True))
        self._check_finite(statistics)
        options = {key: self.settings[key] for key in self._variant.parameters}
        if self._variant.memory:
            options["memory"] = self._memory
        raw = self._variant.beta(statistics, **options)
        inside = (raw >= 0) & (raw <= 1) if self._variant.closed else (raw > 0) & (raw < 1)
        self._beta = torch.where(inside, raw, self.settings["fallback"])
        if self.steps == 0 and self.settings["start"] == "after_first_step":
            self._beta, inside = torch.zeros_like(raw), torch.zeros_like(inside)
        self._fallbacks += ~inside
        self._trace.append(torch.stack([raw, self._beta, (~inside).double()]))
        self.steps += 1

        lags, alphas = [], self._alphas()
        for chunk in _chunks(self._star):
            theta = _float32(parameters[chunk])
            torch._foreach_lerp_(self._star[chunk], theta, alphas[chunk])
            if "lag" in self._columns:  # |lag| of the next step, taken now, spares a copy of theta_{t-1}
                lags.append(_l1(torch._foreach_sub(theta, self._star[chunk])))
        self._lag = torch.cat(lags) if lags else self._lag

    def averages(self) -> dict[str, Tensor]:
        """name -> theta*, float32, in the order of construction: the live tensors, not copies."""
        return dict(zip(self.names, self._star, strict=True))

    def bytes(self) -> int:
        """What the average and its memory of the past take on this rank."""
        return sum(t.nbytes for tensors in (self._star, *self._past.values()) for t in tensors)

    def fallback_share(self) -> np.ndarray:
        """[n_tensors]: the share of steps so far in which the range rule applied, nan before the first."""
        return self._fallbacks.cpu().numpy() / (self.steps or np.nan)

    def drain_trace(self) -> Trace:
        """The trace since the last call, brought to the host in one transfer and forgotten here."""
        rows = torch.stack(self._trace).cpu().numpy() if self._trace else np.zeros((0, 3, len(self.names)))
        first = self.steps - len(self._trace) + 1
        self._trace = []
        return Trace(first, rows[:, 0], rows[:, 1], rows[:, 2].astype(bool))

    def state_dict(self) -> dict:
        """All an exact resume needs, the undrained trace included; the tensors are live, not copies."""
        return {
            "settings": dict(self.settings),
            "names": list(self.names),
            "shapes": list(self._shapes),
            "steps": self.steps,
            "average": self._star,
            "past": self._past,
            "small": [self._lag, self._beta, self._fallbacks, self._memory],
            "trace": list(self._trace),
        }

    def load_state_dict(self, state: dict) -> None:
        """Take over a `state_dict` of equal settings, names and shapes; otherwise ValueError shows both."""
        for key, mine in (("settings", self.settings), ("names", self.names), ("shapes", self._shapes)):
            if state[key] != mine:
                raise ValueError(f"saved average has other {key}: saved {state[key]}, here {mine}")
        device = self._lag.device

        def copies(tensors):
            return [t.detach().to(device, copy=True) for t in tensors]

        self._star = copies(state["average"])
        self._past = {key: copies(tensors) for key, tensors in state["past"].items()}
        self._lag, self._beta, self._fallbacks, self._memory = copies(state["small"])
        self._trace, self.steps = copies(state["trace"]), state["steps"]

    def _alphas(self) -> list[Tensor]:
        # 1 - beta of the last step, one float32 number a tensor, left on the device
        return list((1 - self._beta).float().unbind())

    def _check(self, what: str, tensors: Sequence[Tensor | None]) -> None:
        if len(tensors) != len(self.names):
            raise ValueError(f"{len(tensors)} {what}s for {len(self.names)} averaged tensors")
        for name, shape, dtype, t in zip(self.names, self._shapes, self._dtypes, tensors, strict=True):
            where = f"step {self.steps + 1}: {what} of {name}"
            if t is None:
                raise ValueError(f"{where} is missing; every averaged tensor needs one at every step")
            if tuple(t.shape) != shape:
                raise ValueError(f"{where} has shape {tuple(t.shape)}, expected {shape}")
            allowed = {dtype, torch.float32} if what == "gradient" else {dtype}
            if t.dtype not in allowed & {torch.float32, torch.bfloat16, torch.float16}:
                raise ValueError(f"{where} has dtype {t.dtype}, expected float32, bfloat16 or float16 as at start")

    def _check_finite(self, statistics: Statistics) -> None:
        finite = torch.stack([statistics["gradient"], statistics["gap"]]).isfinite().cpu()
        for what, column in zip(("gradient", "parameter"), finite, strict=True):
            if not column.all():
                bad = [self.names[i] for i in (~column).nonzero().flatten()]
                raise FloatingPointError(f"step {self.steps + 1}: {what} not finite in {', '.join(bad)}")
