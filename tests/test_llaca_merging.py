"""Averages and merges, against closed forms, numpy and PEFT."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from peft.utils.merge_utils import ties as peft_ties
from test_llaca_methods import layout_of, method_of, moved, view  # noqa: F401
from test_llaca_train import adapters, arguments, mini  # noqa: F401

from llaca.config import load_recipe
from llaca.methods.merging import merge
from llaca.methods.task_vectors import elect, trim
from llaca.train import run


def test_a_horizon_in_stages_takes_the_place_of_a_constant():
    """1 - beta is 1 / (horizon x steps): at every step, or on average, however long the stage."""
    for steps in (40, 400):
        for rule, fallback in (("fixed", 0.99), ("lcia_release", 1 - 2 / steps), ("secant", 0.99)):
            line = ["--average", rule, "--horizon", "0.5"]
            average = method_of("llaca", *line)._start(["w"], [torch.zeros(50)], steps)
            assert average.settings["fallback"] == pytest.approx(fallback)
            if rule != "secant":
                generator = torch.Generator().manual_seed(0)
                for _ in range(steps):
                    average.step([torch.randn(50, generator=generator)], [torch.randn(50, generator=generator)])
                away = 1 - average.drain_trace().beta[2:]
                assert away.mean() == pytest.approx(2 / steps, rel=0.15)
                assert (away.std() > 0) == (rule == "lcia_release")
    assert method_of("fixed_ema", "--horizon", "0.5")._start(["w"], [torch.zeros(5)], 100).settings["beta"] == 0.98
    assert method_of("llaca", "--average", "secant", "--horizon", "2")._start(["w"], [torch.zeros(5)], 50).settings[
        "mu_rel"
    ] == pytest.approx(99)
    with pytest.raises(ValueError, match="beta and horizon say the same thing twice"):
        method_of("fixed_ema", "--beta", "0.9", "--horizon", "0.5")
    with pytest.raises(ValueError, match="uniform: start must be stage_start"):
        method_of("llaca", "--average", "uniform", "--average_start", "after_first_step")
    with pytest.raises(ValueError, match="the rule eq45 has none; those that do are fixed, lcia_release, secant"):
        method_of("llaca", "--average", "eq45", "--horizon", "1")


def test_a_uniform_average_is_the_mean_of_all_weights():
    weights = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    average = method_of("llaca", "--average", "uniform")._start(["w"], [weights[0]], 29)
    for weight in weights[1:]:
        average.step([weight], [weight])
    torch.testing.assert_close(average.averages()["w"], weights.mean(0), rtol=0, atol=1e-6)
    assert not average.drain_trace().fallback.any()


def test_merges_by_tasks_are_the_mean_of_all_or_weigh_by_the_root(view):  # noqa: F811
    """Four tasks: with 1/k what is handed on is the mean of their weights; what a stage starts from is what was."""
    for law in ("mean", "sqrt"):
        method, seen, expected = method_of("task_merge", "--law", law), [], None
        method.stage, memory = view, {}
        for task in range(4):
            method.recall(memory)
            shards = layout_of(view).shards()
            method.before_task(shards, task > 0, 1)
            moved(view, 0.1, task)
            seen.append([weight.detach().clone() for weight in shards.parameters])
            handed, _ = method.after_task(shards, Path())
            memory = method.memory()
            share = 1 / (task + 1) if law == "mean" else (task + 1) ** -0.5
            expected = seen[0] if task == 0 else [e + share * (n - e) for e, n in zip(expected, seen[-1], strict=True)]
            for weight, value in zip(shards.parameters, handed or seen[-1], strict=True):
                weight.data.copy_(value)
            for weight, value in zip(shards.parameters, expected, strict=True):
                torch.testing.assert_close(weight.detach(), value, rtol=0, atol=1e-6)
        assert memory == {"tasks": 4}


def test_bema_is_the_closed_form_and_without_correction_the_average(view):  # noqa: F811
    """Every weight's share in the average by hand, in float64; eta 0 adds the whole way from the start."""
    for eta in ("0.2", "0"):
        method = method_of("bema", "--ema_power", "0.7", "--bias_power", eta, "--lag", "3")
        shards = layout_of(view).shards()
        method.before_task(shards, True, 9)
        path = [[weight.detach().double().clone() for weight in shards.parameters]]
        for step in range(9):
            moved(view, 0.1, step)
            method.after_step(shards)
            path.append([weight.detach().double().clone() for weight in shards.parameters])
        shares, rest = [], 1.0
        for step in range(9, 0, -1):
            own = (3 + step) ** -0.7
            shares.append(rest * own)
            rest *= 1 - own
        shares = [rest, *reversed(shares)]
        assert sum(shares) == pytest.approx(1)
        handed, _ = method.after_task(shards, Path())
        for place, weight in enumerate(handed):
            mean = sum(share * row[place] for share, row in zip(shares, path, strict=True))
            wanted = mean + 12 ** -float(eta) * (path[-1][place] - path[0][place])
            torch.testing.assert_close(weight.double(), wanted, rtol=0, atol=1e-5)
    method.before_task(shards, False, 9)
    assert not method.watches and method.after_task(shards, Path()) == (None, {})


def test_merged_task_vectors_are_pefts_and_training_goes_on_where_the_papers_say(view):  # noqa: F811
    """TIES of one tensor against PEFT's, all elements kept; MagMax by brute force; and the next stage's start."""
    vectors = [torch.randn(40, 5, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    ours = elect([trim({"w": vector}, 0.3)["w"] for vector in vectors])
    torch.testing.assert_close(ours, peft_ties(vectors, torch.ones(3), 0.3), rtol=0, atol=1e-6)
    for name in ("magmax", "ties"):
        method = method_of(name, "--scale", "0.5", *(["--density", "1"] if name == "ties" else []))
        method.stage, memory, moves, trained = view, {}, [], {}
        start = {key: weight.detach().clone() for key, weight in view.weights().items()}
        for task in range(3):
            if task:
                moved(view, 9.0)  # the merged weights, which the stage does not start from
            method.recall(memory)
            begins = start if name == "ties" or not task else trained
            assert all(torch.equal(weight, begins[key]) for key, weight in view.weights().items())
            shards = layout_of(view).shards()
            method.before_task(shards, task > 0, 1)
            moved(view, 0.1, task)
            trained = {key: weight.detach().clone() for key, weight in view.weights().items()}
            moves.append({key: weight - start[key] for key, weight in trained.items()})
            handed, _ = method.after_task(shards, Path())
            memory = copy.deepcopy(method.memory())
            for place, key in enumerate(shards.names):
                rows = np.stack([move[key].numpy() for move in moves])
                largest = np.take_along_axis(rows, np.abs(rows).argmax(0)[None], 0)[0]
                agrees = np.sign(rows) == np.sign(rows.sum(0))
                mean = (rows * agrees).sum(0) / np.maximum(agrees.sum(0), 1)
                wanted = start[key].numpy() + 0.5 * (largest if name == "magmax" else mean)
                np.testing.assert_allclose(handed[place].numpy(), wanted, rtol=0, atol=1e-6)


def test_cofima_with_equal_fisher_is_coma_and_weighs_by_fisher():
    generator = torch.Generator().manual_seed(0)
    old, new = torch.randn(2, 50, generator=generator)
    f = torch.rand(50, generator=generator)
    torch.testing.assert_close(merge(old, new, f, f, 0.4), 0.6 * old + 0.4 * new)
    torch.testing.assert_close(merge(old, new, f, torch.zeros(50), 0.4), old)
    torch.testing.assert_close(merge(old, new, torch.zeros(50), torch.zeros(50), 0.4), 0.6 * old + 0.4 * new)
    g = torch.rand(50, generator=generator)
    by_hand = (0.6 * f * old + 0.4 * g * new) / (0.6 * f + 0.4 * g)
    torch.testing.assert_close(merge(old, new, f, g, 0.4), by_hand)


def test_an_average_of_projected_steps_stays_where_they_may_go(view):  # noqa: F811
    """And is their mean, weighed by hand."""
    method = method_of("averaged_pgp", "--horizon", "0.5")
    generator, basis = torch.Generator().manual_seed(3), {}
    for name, weight in view.weights().items():
        inputs = weight.shape[1] if weight.dim() == 2 else 1
        basis[name] = torch.linalg.qr(torch.randn(inputs, inputs, generator=generator)).Q[:, : inputs // 2].contiguous()
    method.stage = view
    method.recall({"basis": basis})
    shards = layout_of(view).shards()
    method.before_task(shards, True, 8)
    start = {name: weight.detach().clone() for name, weight in view.weights().items()}
    mean = {name: weight.double() for name, weight in start.items()}
    for step in range(8):
        moved(view, 0.1, step)
        shards.gradients = [torch.ones_like(weight) for weight in shards.parameters]
        method.after_step(shards)
        for name, weight in view.weights().items():
            mean[name] = 0.75 * mean[name] + 0.25 * weight.detach().double()  # 1 - beta = 1 / (0.5 x 8)
    averages = method.average.average.averages()
    for name, average in averages.items():
        torch.testing.assert_close(average.double(), mean[name], rtol=0, atol=1e-5)
        change = average - start[name]
        assert change.norm() > 1e-3 or change.dim() == 1
        rows = change if change.dim() == 2 else change[:, None]
        assert (rows @ basis[name]).abs().max() < 1e-4 if basis[name].numel() else True


def test_without_directions_it_is_the_fixed_average_bit_for_bit(arguments):  # noqa: F811
    lines = [["averaged_pgp", "--energy", "0"], ["fixed_ema", "--grouping", "true"]]
    found = [
        run(load_recipe([*arguments[:-1], name, "--method", name, *more, "--horizon", "0.7"])) for name, *more in lines
    ]
    ours, fixed = (adapters(folder) for folder in found)
    assert {key: value for key, value in ours.items() if "/adapter/" in key} == {
        key: value for key, value in fixed.items() if "/adapter/" in key
    }
