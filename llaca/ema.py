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
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from llaca.beta import VARIANTS, Statistics, settings_of

# How the passes over a block are made, and how many elements a block has at most: tensor by tensor, what stays in a
# CPU's cache; or all tensors at once, enough for a fused launch on a GPU. Both run everywhere; they differ by rounding.
BLOCK = {"loop": 1 << 19, "foreach": 1 << 24}


def kernels_of(device: str) -> str:
    """The key of BLOCK that is faster on a device of this type."""
    return "loop" if device == "cpu" else "foreach"


def _distance(x: Tensor, y: Tensor, row: int = 16) -> Tensor:
    # |x - y| in one pass over both; subtracting, abs and sum make three
    even = x.numel() // row * row
    found = torch.cdist(x[:even].view(-1, 1, row), y[:even].view(-1, 1, row), p=1).sum()
    return found if even == x.numel() else found + (x[even:] - y[even:]).abs().sum()


class _Block:
    """Parts of some tensors, flat and float32, with room for intermediate results.

    Large temporaries cost more than the arithmetic on a CPU (each is fresh memory from the system), so nothing here
    allocates more than a number a tensor.
    """

    def __init__(self, kernels: str, scratch: list[Tensor], **tensors: list[Tensor]):
        self._loop = kernels == "loop"
        self.theta, self.star, self.g = tensors["theta"], tensors["star"], tensors["g"]
        self.old_theta, self.old_g, self.gbar = (tensors.get(key) for key in ("old_theta", "old_g", "gbar"))
        sizes = [t.numel() for t in self.theta]
        self._room = [list(buffer[: sum(sizes)].split(sizes)) for buffer in scratch]

    def difference(self, a: list[Tensor], b: list[Tensor], room: int = 0) -> list[Tensor]:
        """a - b, in one of the three rooms."""
        out = self._room[room]
        if self._loop:
            for x, y, z in zip(a, b, out, strict=True):
                torch.sub(x, y, out=z)
        else:
            torch._foreach_copy_(out, a)
            torch._foreach_sub_(out, b)
        return out

    def distance(self, a: list[Tensor], b: list[Tensor]) -> Tensor:
        """[tensors]: the L1 norm of a - b."""
        if not self._loop:
            return self.l1(self.difference(a, b))
        return torch.stack([_distance(x, y) for x, y in zip(a, b, strict=True)])

    def g_ones(self, room: int = 0) -> list[Tensor]:
        """g + 1."""
        out = self._room[room]
        torch._foreach_copy_(out, self.g)
        torch._foreach_add_(out, 1.0)
        return out

    def l1(self, tensors: list[Tensor]) -> Tensor:
        """[tensors]: the L1 norm of each; overwrites them."""
        # Not torch._foreach_norm: on CPU it adds into one float32, 6e-4 off at 16M elements and stuck at 2^24.
        torch._foreach_abs_(tensors)
        return self.sums(tensors)

    def g_l1(self) -> Tensor:
        """[tensors]: the L1 norm of each gradient."""
        out = self._room[0]
        if self._loop:
            for x, y in zip(self.g, out, strict=True):
                torch.abs(x, out=y)
            return self.sums(out)
        torch._foreach_copy_(out, self.g)
        return self.l1(out)

    def sums(self, tensors: list[Tensor]) -> Tensor:
        """[tensors]: the sum of each."""
        return torch.stack([t.sum() for t in tensors])

    def dots(self, a: list[Tensor], b: list[Tensor]) -> Tensor:
        """[tensors]: the dot product of each pair; overwrites `a`."""
        torch._foreach_mul_(a, b)
        return self.sums(a)

    def quotient(self, factor: list[Tensor]) -> Tensor:
        """[tensors]: |factor (g + 1) / (gap change)|; `factor` is in room 0."""
        torch._foreach_div_(factor, self.difference(self.theta, self.star, 1))
        ratio = self.g_ones(1)
        torch._foreach_div_(ratio, self.difference(self.g, self.old_g, 2))
        torch._foreach_mul_(factor, ratio)
        return self.l1(factor)


# Name -> what it keeps of the past (each as large as the parameters) and its sums over a block's tensors. The step
# before knows "lag".
STATISTICS: dict[str, tuple[set[str], Callable[[_Block], Tensor]]] = {
    "gradient": (set(), lambda b: b.g_l1()),
    "gradient_ones": (set(), lambda b: b.l1(b.g_ones())),
    "gap": (set(), lambda b: b.distance(b.theta, b.star)),
    "move": ({"old_theta"}, lambda b: b.distance(b.theta, b.old_theta)),
    "change": ({"old_g"}, lambda b: b.distance(b.g, b.old_g)),
    "quotient14": ({"old_theta", "old_g"}, lambda b: b.quotient(b.difference(b.theta, b.old_theta))),
    "quotient45": ({"old_theta", "old_g"}, lambda b: b.quotient(b.difference(b.old_theta, b.star))),
    "slope": ({"old_theta"}, lambda b: b.dots(b.difference(b.old_theta, b.star), b.g)),
    "mean_slope": ({"old_theta", "gbar"}, lambda b: b.dots(b.difference(b.old_theta, b.star), b.gbar)),
}


def columns_of(variant: str) -> tuple[str, ...]:
    """The statistics that a key of VARIANTS needs; |g| and |gap| also tell whether a step is finite."""
    return ("gradient", "gap", *VARIANTS[variant].statistics)


def kept_of_the_past(variant: str) -> list[str]:
    """What a key of VARIANTS remembers of the past, each as large as the parameters."""
    return sorted(set().union(*(STATISTICS[c][0] for c in columns_of(variant) if c != "lag")))


def blocks(sizes: Sequence[int], limit: int) -> list[list[tuple[int, int, int]]]:
    """Tensors of these sizes cut into blocks of at most `limit` elements: (tensor, start, end) of every part."""
    found, room = [[]], limit
    for i, size in enumerate(sizes):
        start = 0
        while start < size or size == 0:
            if not room:
                found.append([])
                room = limit
            end = min(size, start + room)
            found[-1].append((i, start, end))
            room -= end - start
            start = end
            if size == 0:
                break
    return found


def _lerp(tensors: list[Tensor], ends: list[Tensor], weights: list[Tensor] | list[float]) -> None:
    # in place; numbers are three times as fast as tensors of one element on a CPU
    if isinstance(weights[0], float):
        for tensor, end, weight in zip(tensors, ends, weights, strict=True):
            tensor.lerp_(end, weight)
    else:
        torch._foreach_lerp_(tensors, ends, weights)


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
    kernels: a key of BLOCK. None: the faster one where the parameters are.

    Raises ValueError for an unknown or impossible setting.
    """

    def __init__(
        self,
        names: Sequence[str],
        parameters: Sequence[Tensor],
        variant: str,
        fallback: float | None = None,
        start: str | None = None,
        kernels: str | None = None,
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
        self._columns = columns_of(self.settings["variant"])
        keeps = kept_of_the_past(self.settings["variant"])
        self._past: dict[str, list[Tensor]] = {key: [] for key in keeps}
        if "old_theta" in keeps:
            self._past["old_theta"] = [p.detach().clone() for p in parameters]
        zeros = torch.zeros(len(names), dtype=torch.float64, device=parameters[0].device)
        self._lag, self._beta, self._fallbacks = zeros.clone(), zeros.clone(), zeros.clone()
        self._memory = zeros[:, None].repeat(1, self._variant.memory)
        self._kernels = kernels or kernels_of(zeros.device.type)
        self._blocks = blocks([t.numel() for t in self._star], BLOCK[self._kernels])
        self._parts = torch.tensor([i for block in self._blocks for i, *_ in block], device=zeros.device).bincount()
        largest = max(sum(end - start for _, start, end in block) for block in self._blocks)
        self._scratch = [self._star[0].new_empty(largest) for _ in range(3)]
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
        measured = [c for c in self._columns if c != "lag"]
        rows, alphas = [], self._alphas()
        everything = {"theta": parameters, "g": gradients, "star": self._star, **self._past}
        flat = {key: [t.detach().reshape(-1) for t in tensors] for key, tensors in everything.items()}
        for block in self._blocks:
            parts = {key: [tensors[i][a:b] for i, a, b in block] for key, tensors in flat.items()}
            index = [i for i, *_ in block]
            g = [t.float() for t in parts["g"]]
            if "gbar" in parts:  # theta*_{t-1} has just taken in theta_{t-1}, which is where g_t was taken
                _lerp(parts["gbar"], g, [alphas[i] for i in index])
            floats = {key: [t.float() for t in tensors] for key, tensors in parts.items() if key != "g"}
            view = _Block(self._kernels, self._scratch, g=g, **floats)
            rows.append([STATISTICS[c][1](view) for c in measured])
            for key, now in (("old_theta", "theta"), ("old_g", "g")):
                if key in parts:
                    torch._foreach_copy_(parts[key], parts[now])
        parts = [torch.cat(column).double() for column in zip(*rows, strict=True)]
        # unsafe: the lengths, which are our own, are not read back from the device to be checked
        sums = [torch.segment_reduce(column, "sum", lengths=self._parts, unsafe=True) for column in parts]
        columns = dict(zip(measured, sums, strict=True)) | {"lag": self._lag}
        self._gap = columns["gap"]
        return torch.stack([columns[c] for c in self._columns], dim=1)

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

        # |theta_t - theta*_t| = beta_t |theta_t - theta*_{t-1}|: no pass over the elements for the next step's lag
        self._lag = self._beta * self._gap
        _lerp(self._star, [p.detach().float() for p in parameters], self._alphas())

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

    def _alphas(self) -> list[Tensor] | list[float]:
        # 1 - beta of the last step, a float32 number a tensor, left where the tensors are
        alphas = (1 - self._beta).float()
        return alphas.tolist() if self._kernels == "loop" else list(alphas.unbind())

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
