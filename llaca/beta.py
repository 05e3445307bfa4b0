"""The rules of the balance weight beta: each tensor's beta from sums over its elements (llaca/ema.py measures them).

Notation: gap = theta_t - theta*_{t-1}, lag = theta_{t-1} - theta*_{t-1}, move = theta_t - theta_{t-1},
change = g_t - g_{t-1}, with g_t the gradient that step t used; |x| is the L1 norm over a tensor. The paper
prints its norms around products and quotients of tensors, so the name of a variant tells how it is read:

    *_norm       every bracket becomes a number, its L1 norm; g + 1 becomes |g| + 1, as in the released code
    *_norm_ones  g + 1 becomes |g + 1|, 1 added to each element: about the tensor's size for small gradients
    *_elem       the L1 norm of the element-wise quotient, as printed; infinite if one denominator is zero

`eq14` and `eq45` mean *_norm: the other two grow with the number of elements and leave (0, 1) by size alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

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


def uniform(s: Statistics, memory: Tensor) -> Tensor:
    """The mean of the stage's weights, its start among them: beta = t / (t + 1). `memory` [n_tensors, 1] counts t."""
    memory += 1
    return memory[:, 0] / (memory[:, 0] + 1)


def release_horizon(s: Statistics, rate: float, memory: Tensor) -> Tensor:
    """The released code's rule with the constant that gives 1 - beta the mean `rate` over the stage so far.

        r_t = (|g_t| + 1) / (|gap| |change|),    1 - beta = rate r_t / mean(r_1 ... r_t)

    The constant carries units of gap and gradient, which cancel here, but for the 1 beside |g|. `memory` [n_tensors, 2]
    has the sum and the number of the finite r.
    """
    ratio = (s["gradient"] + 1) / (s["gap"] * s["change"])
    finite = ratio.isfinite()
    memory += torch.stack([torch.where(finite, ratio, 0), finite.to(ratio.dtype)], dim=1)
    return 1 - rate * ratio * memory[:, 1] / memory[:, 0]


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
    "lcia_horizon": Variant(release_horizon, ("change",), {"rate": 0.01}, 0.99, "after_first_step", memory=2),
    "fixed": Variant(fixed, (), {"beta": 0.99}),
    "uniform": Variant(uniform, memory=1),
    "secant": Variant(secant, ("slope", "mean_slope"), {"mu_rel": 99.0, "smoothing": 0.9}, closed=True, memory=3),
}
ALIASES = {"eq14": "eq14_norm", "eq45": "eq45_norm"}
LIMITS = {
    "fallback": (lambda v: 0 <= v <= 1, "in [0, 1]"),
    "start": (lambda v: v in ("stage_start", "after_first_step"), "stage_start or after_first_step"),
    "beta": (lambda v: 0 < v < 1, "in (0, 1)"),
    "constant": (lambda v: v > 0, "positive"),
    "rate": (lambda v: 0 < v < 1, "in (0, 1)"),
    "mu_rel": (lambda v: v > 0, "positive"),
    "smoothing": (lambda v: 0 <= v < 1, "in [0, 1)"),
}


def settings_of(variant: str, given: Mapping[str, float | str | None]) -> dict:
    """The rule's defaults under what is given (None: not given). Raises ValueError for an unknown or impossible one."""
    name = ALIASES.get(variant, variant)
    if name not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}; known: {', '.join([*ALIASES, *VARIANTS])}")
    known = {"fallback": VARIANTS[name].fallback, "start": VARIANTS[name].start, **VARIANTS[name].parameters}
    if unknown := sorted(given.keys() - known.keys()):
        raise ValueError(f"{name} has no setting {', '.join(unknown)}; it has {', '.join(known)}")
    settings = known | {key: value for key, value in given.items() if value is not None}
    if name == "uniform" and settings["start"] != "stage_start":
        raise ValueError("uniform: start must be stage_start, for the start is one of the weights")
    for key, value in settings.items():
        holds, rule = LIMITS[key]
        if not holds(value):
            raise ValueError(f"{name}: {key} = {value!r} must be {rule}")
    return {"variant": name, **settings}
