"""The rules of beta against the released code's trace, the printed formulas, and their own invariances."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from walks import NAMES, STEPS, run, walk

from llaca.beta import ALIASES, VARIANTS
from llaca.ema import BLOCK, DynamicAverage

GOLDEN = Path(__file__).parent / "golden" / "ema_release"


def formula(variant, *, g, gap, lag, move, change, slope, mean_slope, scale, t, ratios,
            constant=None, beta=0.99, mu_rel=99, rate=0.01):  # fmt: skip
    """Every beta as printed, of one tensor, float64; `ratios` of the released rule so far, this step's behind them."""

    def size(x):
        return x.abs().sum()

    release = (1 + size(g)) / size(gap) / size(change)
    if release.isfinite():
        ratios.append(release)
    ratio = sum(ratios) / max(len(ratios), 1)
    return {
        "eq14_norm": (1 + size(g)) * size(move) / size(gap) / size(change),
        "eq14_norm_ones": size(g + 1) * size(move) / size(gap) / size(change),
        "eq14_elem": size((g + 1) * move / (gap * change)),
        "eq45_norm": 1 - size(lag) * (1 + size(g)) / size(gap) / size(change),
        "eq45_norm_ones": 1 - size(lag) * size(g + 1) / size(gap) / size(change),
        "eq45_elem": 1 - size(lag * (g + 1) / (gap * change)),
        "lcia_release": 1 - (constant or 2.0) * release,
        "next_release": 1 - (constant or 0.01) * release,
        "fixed": torch.tensor(beta),
        "uniform": torch.tensor(t / (t + 1)),
        "lcia_horizon": 1 - rate * release / ratio,
        "secant": ((slope + mu_rel * scale) / (slope - mean_slope + mu_rel * scale)).clip(0, 1),
    }[variant]


def oracle(variant, thetas, gradients, k, **options):
    """Tensor k step by step in float64: raw beta, weight used [steps] and theta* after the last step."""
    fallback = 0.999 if variant == "next_release" else 0.99
    star, old_g, gbar, beta, slopes = thetas[0][k].double(), gradients[1][k].double(), 0.0, 0.0, 0.0
    raws, betas, ratios = [], [], []
    for t in range(1, len(thetas)):
        theta, old, g = thetas[t][k].double(), thetas[t - 1][k].double(), gradients[t][k].double()
        gbar = beta * gbar + (1 - beta) * g
        s, m = (g * (old - star)).sum(), (gbar * (old - star)).sum()
        slopes = 0.9 * slopes + 0.1 * torch.stack([s, m, (s - m).abs()])
        raw = formula(
            variant,
            g=g,
            gap=theta - star,
            lag=old - star,
            move=theta - old,
            change=g - old_g,
            t=t,
            ratios=ratios,
            **dict(zip(("slope", "mean_slope", "scale"), slopes, strict=True)),
            **options,
        ).item()
        beta = raw if (0 < raw < 1 or (variant == "secant" and 0 <= raw <= 1)) else fallback
        if t == 1 and (variant.endswith("_release") or variant == "lcia_horizon"):
            beta = 0.0
        star, old_g = beta * star + (1 - beta) * theta, g
        raws.append(raw)
        betas.append(beta)
    return np.array(raws), np.array(betas), star


@pytest.mark.parametrize("kernels", BLOCK)
@pytest.mark.parametrize("settings", [{}, {"start": "after_first_step"}])
def test_released_trace(settings, kernels):
    tensors, expected = (
        load_file(GOLDEN / "trace.safetensors"),
        json.loads((GOLDEN / "trace.json").read_text()),
    )
    names = list(expected["tensors"])
    average = DynamicAverage(
        names, [tensors[f"theta.{n}.0"] for n in names], "lcia_release", kernels=kernels, **settings
    )
    for t in range(1, expected["steps"] + 1):
        average.step([tensors[f"theta.{n}.{t}"] for n in names], [tensors[f"grad.{n}.{t}"] for n in names])
        for n in names:
            torch.testing.assert_close(
                average.averages()[n], tensors[f"average.{n}.{t}"], rtol=0, atol=1e-6, msg=f"{n} step {t}"
            )
    trace = average.drain_trace()
    for i, n in enumerate(names):
        alpha = np.array(expected["raw_alpha"][n][1:], dtype=float)
        np.testing.assert_allclose(1 - trace.raw[1:, i], alpha, rtol=1e-5)
        assert (trace.fallback[1:, i] == ((alpha <= 0) | (alpha >= 1))).all() and trace.fallback[0, i]
    assert 0 < trace.fallback[1:].mean() < 1


@pytest.mark.parametrize("kernels", BLOCK)
@pytest.mark.parametrize(
    ("variant", "options"),
    [(v, {}) for v in VARIANTS]
    + [
        ("lcia_release", {"constant": 0.1}),
        ("fixed", {"beta": 0.9}),
        ("secant", {"mu_rel": 4.0}),
        ("lcia_horizon", {"rate": 0.2}),
    ],
)
def test_formula(variant, options, kernels):
    thetas, gradients = walk()
    average = run(thetas, gradients, variant, kernels=kernels, **options)
    trace = average.drain_trace()
    for k, name in enumerate(NAMES):
        raw, beta, star = oracle(variant, thetas, gradients, k, **options)
        # a large beta is a quotient by nearly nothing: its float32 error grows with its square
        assert (np.abs(trace.raw[1:, k] - raw[1:]) <= 5e-5 * (1 + raw[1:] ** 2)).all(), name
        np.testing.assert_allclose(trace.beta[:, k], beta, rtol=1e-4, err_msg=name)
        torch.testing.assert_close(average.averages()[name], star.float(), rtol=0, atol=1e-5)


def test_short_names_mean_the_norm_wise_reading():
    thetas, gradients = walk()
    for short, name in ALIASES.items():
        a, b = run(thetas, gradients, short), run(thetas, gradients, name)
        assert name.endswith("_norm") and (a.drain_trace().beta == b.drain_trace().beta).all()


@pytest.mark.parametrize(
    ("variant", "loss", "units"),
    [
        # same beta when the loss is rescaled, when the parameters' units are
        ("eq14_norm", False, False),
        ("eq14_norm_ones", False, False),
        ("eq14_elem", False, False),
        ("eq45_norm", False, False),
        ("eq45_norm_ones", False, False),
        ("eq45_elem", False, False),
        ("lcia_release", False, False),
        ("next_release", False, False),
        ("lcia_horizon", False, False),
        ("fixed", True, True),
        ("uniform", True, True),
        ("secant", True, True),
    ],
)
def test_which_variants_are_dimensionless(variant, loss, units):
    """Loss in other units: g x c. Parameters in other units: theta x s, g / s. The training is the same."""
    raw = run(*walk(), variant).drain_trace().raw[1:]
    scaled_loss = run(*walk(loss_scale=1000.0), variant).drain_trace().raw[1:]
    scaled_units = run(*walk(units=30.0), variant).drain_trace().raw[1:]
    assert np.allclose(scaled_loss, raw, rtol=1e-4) == loss
    assert np.allclose(scaled_units, raw, rtol=1e-4) == units


@pytest.mark.parametrize("kernels", BLOCK)
def test_secant_finds_the_slope_at_the_average(kernels):
    """On a noiseless quadratic the averaged gradient is the gradient at the average: beta in closed form.

    L = 3/2 theta.theta, d = theta - theta*: beta = (3 theta.d + mu_rel 3 d.d) / (3 d.d + mu_rel 3 d.d).
    """
    theta = [[torch.tensor([10.0 * 0.9**t, -4.0 * 0.8**t])] for t in range(STEPS)]
    average = DynamicAverage(["w"], theta[0], "secant", mu_rel=19.0, smoothing=0.0, kernels=kernels)
    star, expected = theta[0][0].double(), []
    for t in range(1, STEPS):
        average.step(theta[t], [3 * theta[t - 1][0]])
        now, d = theta[t][0].double(), theta[t - 1][0].double() - star
        beta = ((theta[t - 1][0].double() @ d + 19 * d @ d) / (20 * d @ d)).clip(0, 1) if t > 1 else 0.99
        star = beta * star + (1 - beta) * now
        expected.append(float(beta))
    beta = average.drain_trace().beta[:, 0]
    np.testing.assert_allclose(beta, expected, rtol=1e-4)
    assert np.ptp(beta[1:]) > 0.01


def test_secant_follows_a_fall_and_holds_against_a_rise():
    """Without noise, mu_rel 49: 1 - beta = 1/50 at the minimum along the gap, more before, less beyond."""
    alphas = []
    for reach in (0.5, 1.0, 1.5):  # theta goes from -1 to reach - 1, the minimum is at 0
        average = DynamicAverage(["w"], [torch.tensor([-1.0])], "secant", mu_rel=49.0, smoothing=0.0)
        average.step([torch.tensor([reach - 1])], [torch.tensor([-1.0])])
        average.step([torch.tensor([reach - 1])], [torch.tensor([reach - 1])])
        alphas.append(1 - average.drain_trace().beta[1, 0])
    assert alphas[0] > alphas[1] > alphas[2] > 0
    np.testing.assert_allclose(alphas[1], 1 / 50, rtol=1e-5)


@pytest.mark.parametrize(
    ("variant", "settings", "message"),
    [
        ("eq99", {}, "unknown variant 'eq99'; known: eq14, eq45"),
        ("eq45", {"beta": 0.9}, "eq45_norm has no setting beta; it has fallback, start"),
        ("fixed", {"beta": 1.0}, r"beta = 1.0 must be in \(0, 1\)"),
        ("fixed", {"start": "never"}, "start = 'never' must be"),
        ("secant", {"mu_rel": -1.0}, "mu_rel = -1.0 must be positive"),
    ],
)
def test_impossible_settings(variant, settings, message):
    with pytest.raises(ValueError, match=message):
        DynamicAverage(NAMES, walk()[0][0], variant, **settings)
