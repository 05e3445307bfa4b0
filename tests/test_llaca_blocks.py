"""Methods that share the rank between tasks, against numpy and autograd."""

import copy
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import softmax
from test_llaca_methods import layout_of, method_of, moved, view  # noqa: F401

from llaca.config import load_recipe
from llaca.methods import method_of as checked
from llaca.methods.base import StageView
from llaca.methods.blocks import leading
from llava.adapters import trainable_parameters
from llava.backbones import load_base


def test_blocks_of_the_rank_train_one_after_the_other(view):  # noqa: F811
    """Two blocks of a rank of 2: every task moves its own, the connector, and nothing else; O-LoRA's term by numpy."""
    method = method_of("olora", "--blocks", "2", "--penalty", "0.3")
    method.stage, memory = view, {}
    for task in range(3):
        method.recall(memory)
        shards = layout_of(view).shards()
        shards.gradients = [torch.ones_like(weight) for weight in shards.parameters]
        method.before_task(shards, task > 0, 1)
        method.after_backward(shards)
        block = min(task, 1)
        for name, gradient in zip(shards.names, shards.gradients, strict=True):
            wanted = torch.ones_like(gradient)
            if "lora_A" in name:
                wanted[1 - block] = 0
            elif "lora_B" in name:
                wanted[:, 1 - block] = 0
            assert torch.equal(gradient, wanted), name
        term = method.loss(None, None, None)
        if task == 0:
            assert term is None
        else:
            rows = [w.detach().numpy() for name, w in view.weights().items() if "lora_A" in name]
            assert term.item() == pytest.approx(0.3 * sum(np.abs(a[:1] @ a[1:].T).sum() for a in rows), rel=1e-5)
            gradients = torch.autograd.grad(term, list(view.weights().values()), allow_unused=True)
            pulled = dict(zip(view.weights(), gradients, strict=True))
            assert all((g is not None) == ("lora_A" in name) for name, g in pulled.items())
            assert all(not g[0].any() and g[1].any() for g in pulled.values() if g is not None)
        memory = method.memory()
    assert memory == {"tasks": 3}
    with pytest.raises(ValueError, match="blocks 3 does not divide lora_rank 16"):
        method_of("stacked_lora", "--blocks", "3").check_model(load_recipe(["--method", "lora"]).model)


def test_inflora_reads_where_earlier_tasks_have_no_inputs(view):  # noqa: F811
    """Two tasks on halves of the rank; inputs taken down by hooks of our own, directions by numpy."""
    method = method_of("inflora", "--blocks", "2", "--energy", "0.6", "--estimate_records", "6")
    method.stage, memory, bases = view, {}, {}
    for task in range(2):
        view.seed, seen, hooks = task, {}, []
        for name in view.weights():
            if "lora_A" in name:
                seen[name] = []
                take = partial(lambda rows, _, x: rows.append(x[0].flatten(0, -2)), seen[name])
                hooks.append(view.model.get_submodule(name.rpartition(".")[0]).register_forward_pre_hook(take))
        view.model.eval()
        with torch.no_grad():
            for record in view.draw(6):
                [batch] = view.batches([record])
                view.backbone.answer_loss(view.model, batch)
        for hook in hooks:
            hook.remove()
        inputs = {name: torch.cat(rows).double().numpy() for name, rows in seen.items()}
        method.recall(memory)
        for name, weight in view.weights().items():
            if "lora_A" not in name:
                continue
            row, x = weight.detach().double().numpy()[task], inputs[name]
            rest = x - x @ bases[name] @ bases[name].T if task else x
            leading = np.linalg.svd(rest, full_matrices=False)[2][0]
            assert abs(row @ leading) == pytest.approx(1, abs=1e-3), name
            if task:
                assert np.abs(row @ bases[name]).max() < 1e-4
        shards = layout_of(view).shards()
        shards.gradients = [torch.ones_like(weight) for weight in shards.parameters]
        method.before_task(shards, task > 0, 1)
        method.after_backward(shards)
        for name, gradient in zip(shards.names, shards.gradients, strict=True):
            wanted = 0 if "lora_A" in name else gradient.shape[0] if "lora_B" in name else gradient.numel()
            assert gradient.sum() == wanted, name
        method.after_task(shards, Path())
        memory = copy.deepcopy(method.memory())
        bases = {name: basis.double().numpy() for name, basis in memory["basis"].items()}


def test_inflora_leaves_a_full_rank_as_it_is_and_takes_no_direction_twice(view):  # noqa: F811
    """A task beyond the last block trains it on; where no direction is left, a row reads nothing."""
    method = method_of("inflora", "--blocks", "2", "--estimate_records", "6")
    method.stage = view
    before = {name: weight.detach().clone() for name, weight in view.weights().items()}
    method.recall({"tasks": 2, "basis": {}})
    assert all(torch.equal(weight, before[name]) for name, weight in view.weights().items())
    x = torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(torch.randn(6, 4, dtype=torch.float64)).Q
    rows = leading(x.T @ x, basis.float(), 3)
    torch.testing.assert_close(rows[:2] @ rows[:2].T, torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-6)
    assert (rows @ basis).abs().max() < 1e-6 and not rows[2].any()


def test_blocks_ask_for_groups_that_start_empty_and_no_decay():
    with pytest.raises(ValueError, match="weight_decay would move what method olora leaves at rest: take 0"):
        checked(load_recipe(["--method", "olora", "--weight_decay", "0.1"]))
    with pytest.raises(ValueError, match="method inflora needs groups that start empty: give --new_group_start fresh"):
        checked(load_recipe(["--method", "inflora", "--grouping", "true", "--new_group_start", "latest"]))
    assert checked(load_recipe(["--method", "stacked_lora", "--grouping", "true"])).rests
    with pytest.raises(ValueError, match=r"method corrective compares the records .*: take --batch_size 2 or more"):
        checked(load_recipe(["--method", "corrective", "--batch_size", "1"]))


def test_keeplora_reads_what_the_gradient_does_and_neither_base_nor_tasks_need(view):  # noqa: F811
    """Two tasks on halves of the rank; gradients by .backward(), directions and shares by numpy."""
    method = method_of(
        "keeplora", "--blocks", "2", "--energy", "0.7", "--base_energy", "0.4", "--estimate_records", "6"
    )
    method.stage, memory, bases = view, {}, {}
    layers = {n: view.model.get_submodule(n.partition(".lora_A")[0]) for n in view.weights() if "lora_A" in n}

    def gradients() -> dict[str, np.ndarray]:
        view.model.eval()
        for layer in layers.values():
            layer.base_layer.weight.requires_grad_(True)
        for record in view.draw(6):
            [batch] = view.batches([record])
            view.backbone.answer_loss(view.model, batch).backward()
        found = {name: layer.base_layer.weight.grad.double().numpy() for name, layer in layers.items()}
        view.model.zero_grad()
        for layer in layers.values():
            layer.base_layer.weight.requires_grad_(False)
        return found

    for name, layer in layers.items():
        _, sizes, vt = np.linalg.svd(layer.base_layer.weight.detach().double().numpy())
        shares = np.cumsum(sizes**2) / (sizes**2).sum()
        bases[name] = vt[: np.searchsorted(shares, 0.4) + 1].T
    for task in range(2):
        view.seed, before = task, set(view.weights())
        wanted = gradients()
        method.recall(memory)
        assert set(view.weights()) == before, "the base rests again"
        for name, g in wanted.items():
            row, basis = view.weights()[name].detach().double().numpy()[task], bases[name]
            first = np.linalg.svd(g - g @ basis @ basis.T, full_matrices=False)[2][0]
            assert abs(row @ first) == pytest.approx(1, abs=1e-3), name
            assert np.abs(row @ basis).max() < 1e-4
        moved(view, 0.05, task)
        after = gradients()
        method.after_task(layout_of(view).shards(), Path())
        memory = copy.deepcopy(method.memory())
        for name, g in after.items():
            basis, old = memory["basis"][name].double().numpy(), bases[name]
            np.testing.assert_allclose(basis[:, : old.shape[1]] @ basis[:, : old.shape[1]].T, old @ old.T, atol=1e-4)
            np.testing.assert_allclose(basis.T @ basis, np.eye(basis.shape[1]), atol=1e-4)
            held = [(np.square(g @ b).sum() / np.square(g).sum()) for b in (basis[:, :-1], basis)]
            grown = basis.shape[1] > old.shape[1]
            assert held[1] >= 0.7 - 1e-5 and (held[0] < 0.7 or not grown), name
            bases[name] = basis
    with pytest.raises(ValueError, match="take --quantization none"):
        method.check_model(load_recipe(["--method", "keeplora", "--quantization", "nf4", "--lora_rank", "16"]).model)


def test_sd_lora_moves_earlier_blocks_along_themselves_alone(view):  # noqa: F811
    """The second of two tasks, by numpy: gradients and steps; the first task is stacked LoRA."""
    method = method_of("sd_lora", "--blocks", "2")
    method.stage = view
    for task in range(2):
        method.recall({"tasks": task})
        start = {name: weight.detach().clone() for name, weight in view.weights().items()}
        shards = layout_of(view).shards()
        generator = torch.Generator().manual_seed(task)
        shards.gradients = [torch.randn(weight.shape, generator=generator) for weight in shards.parameters]
        own = {name: gradient.numpy().copy() for name, gradient in zip(shards.names, shards.gradients, strict=True)}
        method.before_task(shards, task > 0, 1)
        method.after_backward(shards)
        for name, gradient in zip(shards.names, shards.gradients, strict=True):
            wanted, first = own[name], start[name].numpy()
            if "lora_A" in name:
                wanted[1 - task] = 0
            elif "lora_B" in name:
                other = first[:, 0]
                wanted[:, 1 - task] = (wanted[:, 0] @ other) / (other @ other) * other if task else 0
            np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-5)
        moved(view, 0.1, task)
        free = {name: weight.detach().numpy().copy() for name, weight in view.weights().items()}
        method.after_step(layout_of(view).shards())
        for name, weight in view.weights().items():
            wanted = free[name]
            if task and "lora_B" in name:
                other = start[name].numpy()[:, 0]
                wanted[:, 0] = other + ((wanted[:, 0] - other) @ other) / (other @ other) * other
            np.testing.assert_allclose(weight.detach(), wanted, rtol=1e-4, atol=1e-5)


def test_pathweave_is_a_sum_over_gated_paths(view, tiny_base):  # noqa: F811
    """The first path alone is LoRA; two trained ones and the third in training, by numpy; who trains."""
    method = method_of("pathweave", "--blocks", "3")
    model, backbone = load_base(tiny_base)
    config = load_recipe(["--method", "pathweave", "--blocks", "3", "--lora_rank", "6", "--lora_dropout", "0"]).model
    woven = method.attach(model, backbone, config)
    name, layer = next((n, m) for n, m in woven.named_modules() if hasattr(m, "lora_gate"))
    x = torch.randn(2, 3, layer.in_features, generator=torch.Generator().manual_seed(0))
    assert torch.equal(layer(x), layer.base_layer(x)), "nothing is trained yet"
    method.stage = StageView("GQA", woven, view.dataset, seed=7)
    for task in range(3):
        method.recall({})
        assert method.tasks == task
        shards = layout_of(method.stage).shards()
        shards.gradients = [torch.ones_like(weight) for weight in shards.parameters]
        method.before_task(shards, False, 1)
        method.after_backward(shards)
        about = dict(zip(shards.names, shards.gradients, strict=True))
        trains = {part: about[f"{name}.lora_{part}.default.weight"] for part in ("A", "B", "inner", "gate")}
        mine = slice(2 * task, 2 * task + 2)
        assert trains["A"][mine].all() and trains["A"].sum() == 2 * layer.in_features
        assert trains["B"][:, mine].all() and trains["B"].sum() == 2 * layer.out_features
        assert trains["gate"].all() and trains["inner"][: 2 * task].all() and not trains["inner"][2 * task :].any()
        generator = torch.Generator().manual_seed(task)
        with torch.no_grad():
            for key, weight in trainable_parameters(woven).items():
                weight.add_(0.2 * about[key] * torch.randn(weight.shape, generator=generator))
        A, B, M, R = (
            getattr(layer, f"lora_{part}")["default"].weight.detach().double().numpy()
            for part in ("A", "B", "inner", "gate")
        )
        wanted = layer.base_layer(x).detach().double().numpy()
        gates = softmax(x.double().numpy() @ R[: task + 1].T, axis=-1)
        for path in range(task + 1):
            rows = slice(2 * path, 2 * path + 2)
            h = x.double().numpy() @ A[rows].T
            h = h if path == task else h @ (np.eye(2) + M[rows]).T
            wanted += layer.scaling["default"] * gates[..., path : path + 1] * (h @ B[:, rows].T)
        np.testing.assert_allclose(layer(x).detach(), wanted, rtol=1e-4, atol=1e-5)
        answers = copy.deepcopy(layer)
        answers.own = None
        torch.testing.assert_close(answers(x), layer(x), rtol=0, atol=0)
    with pytest.raises(ValueError, match="cannot be merged"):
        woven.merge_and_unload()
