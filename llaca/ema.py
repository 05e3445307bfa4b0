"""The balance weight beta and the moving average of the weights: tensor math only, no engine, no files.

    theta*_t = beta_t theta*_{t-1} + (1 - beta_t) theta_t              (Eq. 1; beta weights the OLD average)

Each trainable tensor ("module layer") has its own beta, a function of sums over its elements. One step:

    measure   sums of all tensors -> table [n_tensors, n_statistics], float64, additive over shards
    update    table -> beta [n_tensors] -> range rule -> Eq. 1

An engine that shards the tensors adds up the tables of its ranks in between. No number goes to the host
tensor by tensor; the one host synchronisation of a step is the check that the table is finite.

Notation: gap = theta_t - theta*_{t-1}, lag = theta_{t-1} - theta*_{t-1}, move = theta_t - theta_{t-1},
change = g_t - g_{t-1}, with g_t the gradient that step t used; |x| is the L1 norm over a tensor. The paper
prints its norms around products and quotients of tensors, so the name of a variant tells how it is read:

    *_norm       every bracket becomes a number, its L1 norm; g + 1 becomes |g| + 1, as in the released code
    *_norm_ones  g + 1 becomes |g + 1|, 1 added to each element: about the tensor's size for small gradients
    *_elem       the L1 norm of the element-wise quotient, as printed; infinite if one denominator is zero

`eq14` and `eq45` mean *_norm: the other two grow with the number of elements and leave (0, 1) by size alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

Statistics = Mapping[str, Tensor]  # name of a statistic -> [n_tensors], float64


def eq14_norm(s: Statistics) -> Tensor:
    """Eq. 14: beta = (|g_t| + 1) |move| / (|gap| |change|)."""
    return (s["gradient"] + 1) * s["move"] / (s["gap"] * s["change"])


def eq14_norm_ones(s: Statistics) -> Tensor:
    """Eq. 14: beta = |g_t + 1| |move| / (|gap| |change|)."""
    return s["gradient_ones"] * s["move"] / (s["gap"] * s["change"])


def eq14_elem(s: Statistics) -> Tensor:
    """Eq. 14: beta = |(g_t + 1) move / (gap change)|, element by element inside the norm."""
    return s["quotient14"]


def eq45_norm(s: Statistics) -> Tensor:
    """Eq. 45: beta = 1 - |lag| (|g_t| + 1) / (|gap| |change|)."""
    return 1 - s["lag"] * (s["gradient"] + 1) / (s["gap"] * s["change"])


def eq45_norm_ones(s: Statistics) -> Tensor:
    """Eq. 45: beta = 1 - |lag| |g_t + 1| / (|gap| |change|)."""
    return 1 - s["lag"] * s["gradient_ones"] / (s["gap"] * s["change"])


def eq45_elem(s: Statistics) -> Tensor:
    """Eq. 45: beta = 1 - |lag (g_t + 1) / (gap change)|, element by element inside the norm."""
    return 1 - s["quotient45"]


def release(s: Statistics, constant: float) -> Tensor:
    """The released code: beta = 1 - constant (|g_t| + 1) / (|gap| |change|).

    Eq. 45 with a constant in place of |lag|: 2 in LCIA, 0.01 in the later library of the same group.
    """
    return 1 - constant * (s["gradient"] + 1) / (s["gap"] * s["change"])


def fixed(s: Statistics, beta: float) -> Tensor:
    """A given beta, the same for every tensor and step."""
    return torch.full_like(s["gradient"], beta)


def secant(s: Statistics, mu_rel: float, smoothing: float, memory: Tensor) -> Tensor:
    """Our dimensionally consistent reading of Eq. 12: the old average protected in units of the curvature.

    Eq. 12 minimises [L(theta*_t) - L(theta_t)] + [theta*_t - theta*_{t-1}], a loss plus a length. Square the
    second term, weigh it by mu/2, and expand L at theta_t, where theta*_t = theta_t - beta gap:

        J(beta) = -beta g.gap + beta^2/2 gap.H gap + mu/2 (1 - beta)^2 gap.gap
        J' = 0  =>  beta = (g.gap + mu gap.gap) / (gap.H gap + mu gap.gap), clipped to [0, 1]

    gap.H gap is the difference of the slopes at the two ends of the gap. The gradient at the average is never
    computed, but for a quadratic loss it is gbar, the average of the gradients under the weights' own betas,
    with the batch noise averaged out. g_t was taken at theta_{t-1}, so both slopes are taken along lag, which
    does not hold this step's noise yet: S = g_t.lag, M = gbar.lag, gap.H gap = S - M. With S, M and
    C = |S - M| smoothed over the steps (`smoothing` weighs the past) and mu gap.gap = mu_rel C:

        beta = (S + mu_rel C) / (S - M + mu_rel C)

    Every term is a difference of losses, so the scale of the loss and the units of the parameters cancel.
    Where the slope at theta_t has gone (S = 0), 1 - beta = 1 / (1 + mu_rel): a horizon of 1 + mu_rel steps,
    to be set to those of the stage. Still falling (S < 0) the average follows faster, rising slower.
    `memory` [n_tensors, 3] holds S, M, C and is updated in place.
    """
    slopes = torch.stack([s["slope"], s["mean_slope"], (s["slope"] - s["mean_slope"]).abs()], dim=1)
    memory.lerp_(slopes, 1 - smoothing)
    slope, mean_slope, scale = memory.unbind(dim=1)
    return ((slope + mu_rel * scale) / (slope - mean_slope + mu_rel * scale)).clamp(0, 1)


@dataclass(frozen=True)
class Variant:
    """A beta, the statistics it reads beside |g| and |gap|, its parameters and defaults.

    closed: 0 and 1 are results, not failures. memory: numbers it keeps for each tensor.
    """

    beta: Callable[..., Tensor]
    statistics: tuple[str, ...] = ()
    parameters: Mapping[str, float] = field(default_factory=dict)
    fallback: float = 0.99
    start: str = "stage_start"
    closed: bool = False
    memory: int = 0


VARIANTS = {
    "eq14_norm": Variant(eq14_norm, ("move", "change")),
    "eq14_norm_ones": Variant(eq14_norm_ones, ("gradient_ones", "move", "change")),
    "eq14_elem": Variant(eq14_elem, ("quotient14",)),
    "eq45_norm": Variant(eq45_norm, ("lag", "change")),
    "eq45_norm_ones": Variant(eq45_norm_ones, ("gradient_ones", "lag", "change")),
    "eq45_elem": Variant(eq45_elem, ("quotient45",)),
    "lcia_release": Variant(release, ("change",), {"constant": 2.0}, 0.99, "after_first_step"),
    "next_release": Variant(release, ("change",), {"constant": 0.01}, 0.999, "after_first_step"),
    "fixed": Variant(fixed, (), {"beta": 0.99}),
    "secant": Variant(secant, ("slope", "mean_slope"), {"mu_rel": 99.0, "smoothing": 0.9}, closed=True, memory=3),
}
ALIASES = {"eq14": "eq14_norm", "eq45": "eq45_norm"}
LIMITS = {
    "fallback": (lambda v: 0 <= v <= 1, "in [0, 1]"),
    "start": (lambda v: v in ("stage_start", "after_first_step"), "stage_start or after_first_step"),
    "beta": (lambda v: 0 < v < 1, "in (0, 1)"),
    "constant": (lambda v: v > 0, "positive"),
    "mu_rel": (lambda v: v > 0, "positive"),
    "smoothing": (lambda v: 0 <= v < 1, "in [0, 1)"),
}


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


def _settings(variant: str, given: Mapping[str, float | str | None]) -> dict:
    # the variant's defaults under what is given (None: not given), checked
    name = ALIASES.get(variant, variant)
    if name not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}; known: {', '.join([*ALIASES, *VARIANTS])}")
    known = {"fallback": VARIANTS[name].fallback, "start": VARIANTS[name].start, **VARIANTS[name].parameters}
    if unknown := sorted(given.keys() - known.keys()):
        raise ValueError(f"{name} has no setting {', '.join(unknown)}; it has {', '.join(known)}")
    settings = known | {key: value for key, value in given.items() if value is not None}
    for key, value in settings.items():
        holds, rule = LIMITS[key]
        if not holds(value):
            raise ValueError(f"{name}: {key} = {value!r} must be {rule}")
    return {"variant": name, **settings}


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
        self.settings = _settings(variant, {"fallback": fallback, "start": start, **variant_parameters})
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
