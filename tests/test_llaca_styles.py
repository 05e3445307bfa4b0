"""Methods that add to the loss, the gradient or the step, against numpy, scipy and autograd."""

import copy
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr, softmax
from test_llaca_methods import layout_of, method_of, moved, view  # noqa: F401
from torch.nn.functional import cross_entropy

from llaca.config import load_recipe
from llaca.engines.shards import add_at_own_length
from llaca.methods import method_of as checked
from llaca.methods.replay import Replay
from llava.backbones import load_base
from llava.conversation import IGNORE


def words_of(view) -> list[int]:  # noqa: F811
    """The columns of the logits but the picture's."""
    config = view.model.config
    return [word for word in range(config.text_config.vocab_size) if word != config.image_token_id]


def logits_of(view, batch) -> np.ndarray:  # noqa: F811
    """Those of the answered tokens, without the picture's column."""
    with torch.no_grad():
        logits = view.backbone.answer_logits(view.model, batch)[0].logits
    return logits.double().numpy()[:, words_of(view)]


def started(view, name: str, *line: str):  # noqa: F811
    """A method at the start of a stage that continues earlier ones."""
    method = method_of(name, *line)
    method.stage = view
    method.recall({})
    method.before_task(layout_of(view).shards(), True, 1)
    return method


def test_recyclable_keeps_logits_and_what_goes_into_the_head(view):  # noqa: F811
    method = started(view, "recyclable", "--penalty", "0.5", "--temperature", "3", "--hidden", "4")
    [batch] = view.batches([0, 3, 12], 3)
    seen, head = [], view.model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().double().numpy()))
    old = logits_of(view, batch)
    outputs, _ = view.backbone.answer_logits(view.model, batch)
    assert method.loss(view.model, batch, outputs).item() == pytest.approx(0, abs=1e-6), "nothing has moved yet"
    moved(view, 0.1)
    before = seen[0]
    outputs, _ = view.backbone.answer_logits(view.model, batch)
    after, term = seen[-1], method.loss(view.model, batch, outputs)
    p, q = (softmax(z / 3, axis=1) for z in (old, outputs.logits.detach().double().numpy()[:, words_of(view)]))
    wanted = 0.5 * 9 * rel_entr(p, q).sum(axis=1).mean() + 4 / 2 * ((after - before) ** 2).mean()
    assert term.item() == pytest.approx(wanted, rel=1e-4)
    assert all(g is not None for g in torch.autograd.grad(term, list(view.weights().values())))
    hook.remove()
    method.after_task(None, Path())
    assert method.seen is None


def test_corrective_weighs_records_that_depart_from_the_teacher(view):  # noqa: F811
    method = started(view, "corrective", "--penalty", "0.5", "--temperature", "1", "--boost", "0.7")
    [batch] = view.batches([0, 1, 3, 12], 4)
    answered = (batch["labels"] != IGNORE).numpy()
    record, targets = answered.nonzero()[0], batch["labels"].numpy()[answered]
    words = words_of(view)
    places = np.array([words.index(word) for word in targets])
    old, kinds = logits_of(view, batch), set()
    for far in (0.0, *[0.01] * 12):
        moved(view, far)
        outputs, _ = view.backbone.answer_logits(view.model, batch)
        now = outputs.logits.detach().double().numpy()[:, words]
        departs = now.argmax(1) != old.argmax(1)
        weights = np.exp([0.7 * departs[record == row].any() for row in range(4)])
        weights = (weights / weights.mean())[record]
        ce = -log_softmax(now, axis=1)[np.arange(len(now)), places]
        kl = rel_entr(softmax(old, axis=1), softmax(now, axis=1)).sum(axis=1)
        whole = (weights * (ce + 0.5 * kl)).mean()
        assert method.loss(view.model, batch, outputs).item() + ce.mean() == pytest.approx(whole, rel=1e-4)
        kinds.add(len(set(weights)))
    assert kinds == {1, 2}, "some records depart, some do not, or all, or none"


def test_smoothing_makes_uncertain_records_labels_soft(view):  # noqa: F811
    method = started(view, "smoothing", "--smoothing", "0.3")
    [batch] = view.batches([0, 1, 3, 12], 4)
    answered = (batch["labels"] != IGNORE).numpy()
    record, words = answered.nonzero()[0], words_of(view)
    old = logits_of(view, batch)
    entropy = -(softmax(old, axis=1) * log_softmax(old, axis=1)).sum(1)
    unsure = np.array([entropy[record == row].mean() for row in range(4)])
    share = (0.3 * (unsure - unsure.min()) / (unsure.max() - unsure.min()))[record]
    moved(view, 0.1)
    outputs, targets = view.backbone.answer_logits(view.model, batch)
    logits = outputs.logits.detach()[:, words]
    place = torch.tensor([words.index(word) for word in targets.tolist()])
    soft = torch.zeros(logits.shape).scatter_(1, place[:, None], 1.0)
    soft = soft * (1 - torch.tensor(share)[:, None]) + torch.tensor(share)[:, None] / len(words)
    plain, whole = cross_entropy(logits, place), cross_entropy(logits.double(), soft.double())
    term = method.loss(view.model, batch, outputs)
    assert term.item() == pytest.approx((whole - plain).item(), rel=1e-3, abs=1e-6)


def test_pace_is_lora_without_noise_and_asks_two_draws_to_agree(view, tiny_base):  # noqa: F811
    model, backbone = load_base(tiny_base)
    config = load_recipe(["--method", "pace"]).model
    method = method_of("pace", "--penalty", "0.5", "--noise", "0.8")
    noisy = method.attach(model, backbone, config)
    layers = [module for module in noisy.modules() if hasattr(module, "sigma")]
    sigmas = [layer.sigma for layer in layers]
    assert sigmas == pytest.approx([0.8 * (1 - n / len(layers)) for n in range(len(layers))])
    layer = layers[0]
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_(0, 0.1)
    x = torch.randn(3, 5, layer.in_features)
    noisy.eval()
    plain, quiet = layer.base_layer(x), layer(x)
    assert torch.equal(quiet, super(type(layer), layer).forward(x)), "LoRA's own where nothing trains"
    noisy.train()
    torch.manual_seed(0)
    draws = (layer(x) - plain) / (quiet - plain)
    assert (draws.std(dim=1) < 1e-2).all(), "a number a record and channel"
    assert draws.mean(1).std().item() == pytest.approx(0.8, rel=0.25) and draws.mean().item() == pytest.approx(
        1, abs=0.2
    )
    method.stage = copy.copy(view)
    method.stage.model = noisy
    [batch] = view.batches([0, 3], 2)
    outputs, _ = backbone.answer_logits(noisy, batch)
    state = torch.get_rng_state()
    again, _ = backbone.answer_logits(noisy, batch)
    torch.set_rng_state(state)
    words = words_of(view)
    apart = (outputs.logits - again.logits)[:, words].double().square().sum(1).mean()
    assert method.loss(noisy, batch, outputs).item() == pytest.approx(0.5 * apart.item(), rel=1e-4) and apart > 0
    assert method_of("pace", "--penalty", "0").loss(noisy, batch, outputs) is None


def test_dgg_points_back_at_the_steps_that_are_drawn(view):  # noqa: F811
    method = started(view, "dgg", "--probability", "0.4")
    start = {name: weight.detach().clone() for name, weight in view.weights().items()}
    shards = layout_of(view).shards()
    shards.gradients = [torch.ones_like(weight) for weight in shards.parameters]
    add_at_own_length(shards, [torch.zeros_like(weight) for weight in shards.parameters])
    assert all((gradient == 1).all() for gradient in shards.gradients), "at the start there is no way back"
    moved(view, 0.1)
    guided = 0
    for step in range(1, 41):
        shards = layout_of(view).shards()
        generator = torch.Generator().manual_seed(step)
        own = [torch.randn(weight.shape, generator=generator) for weight in shards.parameters]
        shards.gradients = [gradient.clone() for gradient in own]
        method.after_backward(shards)
        drawn = random.Random(f"7 {step}").random() < 0.4
        guided += drawn
        flat = torch.cat([gradient.flatten() for gradient in own])
        away = torch.cat([(weight - start[name]).detach().flatten() for name, weight in view.weights().items()])
        wanted = flat + (flat.norm() * away / away.norm() if drawn else 0)
        torch.testing.assert_close(torch.cat([g.flatten() for g in shards.gradients]), wanted, rtol=1e-4, atol=1e-5)
    assert 8 < guided < 24
    assert method.extend(view.dataset, {}) is view.dataset, "no buffer unless asked for"


def test_ccfi_keeps_the_records_with_most_fisher_and_pulls_as_hard_as_the_task(view):  # noqa: F811
    method = started(view, "ccfi", "--memory_records", "3", "--estimate_records", "8")
    assert isinstance(method, Replay) and not method.watches
    shards = layout_of(view).shards()
    method.after_task(shards, Path())
    view.model.eval()
    squares, fisher = {}, {name: torch.zeros_like(weight) for name, weight in view.weights().items()}
    for record in view.draw(8):
        view.model.zero_grad()
        [batch] = view.batches([record])
        view.backbone.answer_loss(view.model, batch).backward()
        own = {n: w.grad.square() if w.grad is not None else torch.zeros_like(w) for n, w in view.weights().items()}
        squares[record] = sum(square.sum().item() for square in own.values())
        fisher = {name: total + own[name] / 8 for name, total in fisher.items()}
    assert method.buffer["GQA"] == sorted(sorted(squares, key=squares.get)[-3:])
    memory, start = copy.deepcopy(method.memory()), {n: w.detach().clone() for n, w in view.weights().items()}
    method.recall(memory)
    assert method.watches
    moved(view, 0.1)
    shards = layout_of(view).shards()
    shards.gradients = [torch.randn_like(weight) for weight in shards.parameters]
    flat = torch.cat([gradient.flatten() for gradient in shards.gradients])
    pull = torch.cat([(fisher[n] * (w - start[n])).detach().flatten() for n, w in view.weights().items()])
    method.after_backward(shards)
    wanted = flat + flat.norm() * pull / pull.norm()
    torch.testing.assert_close(torch.cat([g.flatten() for g in shards.gradients]), wanted, rtol=1e-3, atol=1e-5)


def test_osf_leaves_the_leading_directions_alone(view):  # noqa: F811
    """Against numpy's SVD: what B writes and A reads is orthogonal to the leading half, and the rest moved freely."""
    method = started(view, "osf", "--keep", "0.5")
    start = {name: weight.detach().clone() for name, weight in view.weights().items()}
    moved(view, 0.1)
    free = {name: (weight - start[name]).detach().numpy() for name, weight in view.weights().items()}
    method.after_step(layout_of(view).shards())
    seen = 0
    for name, weight in view.weights().items():
        change = (weight.detach() - start[name]).numpy()
        if "lora_" not in name:
            assert np.array_equal(change, free[name]), "the connector is as it is"
            continue
        layer = view.model.get_submodule(name.partition(".lora_")[0])
        a, b = (
            start[name.replace("lora_B", "lora_A").replace("lora_A", part)].numpy() for part in ("lora_A", "lora_B")
        )
        whole = layer.base_layer.weight.detach().numpy() + layer.scaling["default"] * b @ a
        u, _, vt = np.linalg.svd(whole)
        count = min(whole.shape) // 2
        basis = vt[:count].T if "lora_A" in name else u[:, :count]
        free_part = free[name] - (free[name] @ basis @ basis.T if "lora_A" in name else basis @ (basis.T @ free[name]))
        np.testing.assert_allclose(change, free_part, rtol=0, atol=2e-5)
        assert np.abs(change).max() > 1e-3
        seen += 1
    assert seen > 10
    with pytest.raises(ValueError, match="take --quantization none"):
        method.check_model(load_recipe(["--method", "osf", "--quantization", "nf4"]).model)
    with pytest.raises(ValueError, match="method osf does not work with --zero 2; it does with none, 0"):
        checked(load_recipe(["--method", "osf", "--zero", "2"]))


def test_safe_decorrelates_from_the_start_and_then_stays_near_the_slow_one(view):  # noqa: F811
    """The first task's correlations by numpy, from what goes into the head; later ones' cosines to what it left."""
    method = method_of("safe", "--diagonal", "0.2", "--redundant", "0.03", "--align", "0.6")
    [batch] = view.batches([0, 1, 3, 12], 4)
    seen, head = [], view.model.get_output_embeddings()
    head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().double().numpy()))
    method.stage = view
    method.recall({})
    method.before_task(layout_of(view).shards(), False, 1)
    logits_of(view, batch)
    start = seen[-1]
    moved(view, 0.1)
    outputs, _ = view.backbone.answer_logits(view.model, batch)
    now, term = seen[-1], method.loss(view.model, batch, outputs)
    c = np.corrcoef(now, start, rowvar=False)[: now.shape[1], now.shape[1] :]
    off = np.square(c).sum() - np.square(np.diag(c)).sum()
    assert term.item() == pytest.approx(0.2 * np.square(np.diag(c) - 1).sum() + 0.03 * off, rel=1e-3)
    method.after_task(layout_of(view).shards(), Path())
    memory = copy.deepcopy(method.memory())
    assert method.seen is None
    for far in (0.05, 0.05):  # the slow one stays the first task's
        moved(view, far, 2)
        method.recall(memory)
        method.before_task(layout_of(view).shards(), True, 1)
        outputs, _ = view.backbone.answer_logits(view.model, batch)
        late, term = seen[-1], method.loss(view.model, batch, outputs)
        cosine = (late * now).sum(1) / np.linalg.norm(late, axis=1) / np.linalg.norm(now, axis=1)
        assert term.item() == pytest.approx(0.6 * (1 - cosine).mean(), rel=1e-3) and term > 1e-4
        assert all(g is not None for g in torch.autograd.grad(term, list(view.weights().values())))
        method.after_task(layout_of(view).shards(), Path())
        memory = copy.deepcopy(method.memory())


def test_rcl_takes_the_gradient_at_the_steepest_point_nearby(view):  # noqa: F811
    """Against .backward() at weights moved by hand; the weights and the value of the loss are as before."""
    method = started(view, "rcl", "--rho", "0.3")
    view.model.eval()
    [batch] = view.batches([0, 3, 12], 3)
    weights = view.weights()

    def loss() -> torch.Tensor:
        outputs, targets = view.backbone.answer_logits(view.model, batch)
        return view.backbone.token_loss(outputs.logits, targets) / len(targets)

    def gradients() -> dict[str, torch.Tensor]:
        view.model.zero_grad()
        loss().backward()
        return {name: weight.grad.clone() for name, weight in weights.items()}

    before, here = {name: weight.detach().clone() for name, weight in weights.items()}, gradients()
    outputs, targets = view.backbone.answer_logits(view.model, batch)
    plain = view.backbone.token_loss(outputs.logits, targets) / len(targets)
    term = method.loss(view.model, batch, outputs)
    assert term.item() == 0
    view.model.zero_grad()
    (plain + term).backward()
    mine = {name: weight.grad.clone() for name, weight in weights.items()}
    assert all(torch.equal(weight, before[name]) for name, weight in weights.items())
    length = torch.cat([g.flatten() for g in here.values()]).norm()
    with torch.no_grad():
        for name, weight in weights.items():
            weight.add_(0.3 * here[name] / length)
    there = gradients()
    for name in weights:
        torch.testing.assert_close(mine[name], there[name], rtol=1e-3, atol=1e-5)
    assert any((there[name] - here[name]).norm() > 0.05 * here[name].norm() for name in weights)
    with pytest.raises(ValueError, match="method rcl works on a micro-batch's mean loss: give --loss_norm"):
        checked(load_recipe(["--method", "rcl", "--loss_normalisation", "global"]))
