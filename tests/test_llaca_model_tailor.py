"""Model Tailor against numpy's least squares and loops written by hand, and through the whole harness."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_llaca_methods import layout_of, method_of, moved, view  # noqa: F401
from test_llaca_train import adapters, arguments, mini  # noqa: F401

from eval.predict import answer_share, merge_parts
from eval.runs import open_run
from llaca import second_moments as moments
from llaca.config import load_recipe
from llaca.methods import model_tailor
from llaca.methods.model_tailor import compensations, damped, score, standardised, top_share
from llaca.second_moments import passes, second_moments
from llaca.train import run
from llava.adapters import is_connector

WEIGHTS = "adapter_model.safetensors"


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("room", [2**28, 1])
def test_compensation_is_numpys_least_squares(monkeypatch, room):
    """Rows with all, none and some of their weights kept; solved together, and one by one."""
    monkeypatch.setattr(model_tailor, "SOLVE_BYTES", room)
    X = (random(300, 20) @ random(20, 20, seed=1)).numpy()  # correlated inputs
    new, old = random(7, 20, seed=2), random(7, 20, seed=3)
    patch = random(7, 20, seed=4) > 0.3
    patch[0], patch[1] = True, False
    found = compensations(new, old, patch, damped(torch.from_numpy(X.T @ X)))
    ridge = np.sqrt(0.01 * (X**2).sum(0).mean())
    inputs = np.concatenate([X, ridge * np.eye(20)])
    for row in range(7):
        K = patch[row].numpy()
        lost = inputs[:, ~K] @ (old - new)[row].numpy()[~K]  # what going back does to the outputs
        expected, *_ = np.linalg.lstsq(inputs[:, K], lost, rcond=None)
        np.testing.assert_allclose(found[row].numpy()[K], expected, rtol=1e-7, atol=1e-10)
        assert not found[row].numpy()[~K].any()
    assert found[2:].abs().max() > 0.1 and not found[:2].any()


def test_damping_and_inputs_that_are_always_zero():
    X = random(50, 4)
    X[:, 2] = 0
    H = damped(X.T @ X)
    raw = (X.T @ X).numpy()
    raw[2, 2] = 1
    np.testing.assert_allclose(H.numpy(), raw + 0.01 * np.diag(raw).mean() * np.eye(4))
    assert torch.equal(damped(torch.zeros(3, 3)), 1.01 * torch.eye(3, dtype=torch.float64))


def test_score_is_the_loop_over_blocks_and_rows():
    """Two blocks of columns, the second narrower; u from the Cholesky factor of the inverse itself."""
    new, old = random(5, 150), random(5, 150, seed=1)
    X = random(400, 150, seed=2) @ random(150, 150, seed=3)
    H = damped(X.T @ X)
    found = score(new, old, H).numpy()
    u = np.diag(np.linalg.cholesky(np.linalg.inv(H.numpy())))  # the same for the lower and the upper factor
    assert u.max() > 2 * u.min()
    for start, end in ((0, 128), (128, 150)):
        for row in range(5):
            change = abs(new[row, start:end].numpy() - old[row, start:end].numpy())
            need = new[row, start:end].numpy() ** 2 / u[start:end] ** 2
            expected = 0.8 * (change - change.mean()) / change.std() + 0.2 * (need - need.mean()) / need.std()
            np.testing.assert_allclose(found[row, start:end], expected, rtol=1e-6, atol=1e-8)


def test_what_is_the_same_all_along_a_row_tells_nothing():
    assert torch.equal(standardised(torch.tensor([[3.0, 3, 3], [1, 2, 3]]))[0], torch.zeros(3))
    assert not score(random(2, 1), random(2, 1, seed=1), torch.eye(1, dtype=torch.float64)).any(), "one column"


@pytest.mark.parametrize(("share", "count"), [(0.1, 2), (0.5, 10), (0.001, 1), (1.0, 20)])
def test_as_many_are_kept_as_the_share_says_ties_or_not(share, count):
    scores = random(4, 5)
    kept = top_share(scores, share)
    assert kept.sum() == count and (count == 20 or scores[kept].min() > scores[~kept].max())
    assert top_share(torch.zeros(4, 5), share).sum() == count


def test_energies_are_those_of_every_token_of_the_records(view):  # noqa: F811
    """The first layer's inputs have a mean square of 1 each; B's inputs are A's outputs."""
    names = [name for name in view.weights() if not is_connector(name)]
    found = second_moments(view, names, 6)
    tokens = sum(len(view.dataset[record]["input_ids"]) for record in view.draw(6))
    for name in names:
        if "layers.0" in name and ("q_proj.lora_A" in name or "v_proj.lora_A" in name):
            assert found[name].trace().item() == pytest.approx(tokens * len(found[name]), rel=1e-3)
        if "lora_B" in name:
            twin = name.replace("lora_B", "lora_A")
            A = view.weights()[twin].detach()
            torch.testing.assert_close(found[name], A @ found[twin] @ A.T, rtol=1e-3, atol=1e-3)
    assert len(found) == 28 and view.model.training, "as it was"
    assert not any(module._forward_pre_hooks for name, module in view.model.named_modules() if "lora" in name)


def test_ranks_share_the_records(view, monkeypatch):  # noqa: F811
    names, parts, summed = [name for name in view.weights() if "o_proj" in name], [], []
    whole = second_moments(view, names, 5)
    monkeypatch.setattr(moments.ranks, "count", lambda: 2)
    monkeypatch.setattr(moments.ranks, "add_up", summed.extend)
    for rank in range(2):
        monkeypatch.setattr(moments.ranks, "rank", lambda rank=rank: rank)
        parts.append(second_moments(view, names, 5))
    assert [id(t) for part in parts for t in part.values()] == [id(t) for t in summed]
    for name in names:
        torch.testing.assert_close(parts[0][name] + parts[1][name], whole[name], rtol=1e-4, atol=1e-4)
        assert parts[0][name].trace() > 0 and parts[1][name].trace() > 0


def tailored(view, share: str = "0.1"):  # noqa: F811
    """Start, trained and tailored weights by name, and the report."""
    method = method_of("model_tailor", "--keep_share", share, "--estimate_records", "8")
    method.stage, shards = view, layout_of(view).shards()
    method.before_task(shards, True, 1)
    start = {name: weight.detach().clone() for name, weight in view.weights().items()}
    moved(view, 0.1)
    found, told = method.after_task(shards, Path())
    return start, view.weights(), dict(zip(shards.names, found, strict=True)), told


def test_a_patch_of_each_tensor_stays_and_the_rest_goes_back_bit_for_bit(view):  # noqa: F811
    start, trained, found, told = tailored(view)
    kept = 0
    for name, tensor in found.items():
        away = tensor != start[name]
        assert away.sum() == (0 if is_connector(name) else round(0.1 * tensor.numel())), name
        kept += away.sum().item()
    changes = [(found[n] - trained[n])[found[n] != start[n]].abs() for n in found if not is_connector(n)]
    assert told["kept_share"] == kept / sum(t.numel() for n, t in found.items() if not is_connector(n))
    assert told["mean_compensation"] == pytest.approx(torch.cat(changes).mean().item(), rel=1e-4)


def test_compensated_outputs_are_nearer_to_the_trained_layers_than_the_bare_patch(view):  # noqa: F811
    start, trained, found, _ = tailored(view, "0.3")
    for name, total in second_moments(view, [name for name in found if "lora" in name], 8).items():
        new, old, H = trained[name].detach().double(), start[name].double(), damped(total)
        bare = torch.where(found[name] != start[name], new, old)

        def error(weight, new=new, H=H):
            return (((weight - new) @ H) * (weight - new)).sum().item()

        assert error(found[name].double()) < error(bare) < error(old)


def test_however_many_passes_the_result_is_the_same(view, monkeypatch):  # noqa: F811
    layers = {name: weight for name, weight in view.weights().items() if not is_connector(name)}
    assert list(passes(layers.items())) == [list(layers)]
    state = {name: weight.detach().clone() for name, weight in view.weights().items()}
    _, _, one, _ = tailored(view)
    with torch.no_grad():
        for name, weight in view.weights().items():
            weight.copy_(state[name])
    monkeypatch.setattr(moments, "PASS_BYTES", 10_000)  # of 32 x 32 and 64 x 64 numbers
    groups = list(passes(layers.items()))
    assert [name for group in groups for name in group] == list(layers) and 4 < len(groups) < len(layers)
    assert all(len(g) == 1 or sum(4 * layers[n].shape[1] ** 2 for n in g) <= 10_000 for g in groups)
    _, _, many, _ = tailored(view)
    assert all(torch.equal(tensor, many[name]) for name, tensor in one.items())


def test_with_all_kept_it_is_lora_bit_for_bit(arguments):  # noqa: F811
    """The projector too."""
    runs = [
        [*arguments, "--method", "model_tailor", "--keep_share", "1"],
        [*arguments[:-1], "lora", "--method", "lora"],
    ]
    mine, lora = (adapters(run(load_recipe(line))) for line in runs)
    assert mine == lora


def test_a_run_tailors_every_stage(arguments):  # noqa: F811
    """The first one towards the untrained LoRA; the projector is the base's to the end."""
    folder = run(load_recipe([*arguments, "--method", "model_tailor", "--estimate_records", "8"]))
    still = ["--method", "lora", "--tasks", "ScienceQA", "--learning_rate", "0", "--projector_learning_rate", "0"]
    untrained = run(load_recipe([*arguments[:-1], "untrained", *still])) / "stages" / "01-ScienceQA"
    stages = sorted(folder.glob("stages/*"))
    for before, stage in zip((untrained, *stages), stages, strict=False):
        start, trained, found = (
            load_file(p / WEIGHTS) for p in (before / "adapter", stage / "plain", stage / "adapter")
        )
        for name, tensor in found.items():
            share = 0 if is_connector(name) else round(0.1 * tensor.numel())
            assert (tensor != start[name]).sum() == share and not torch.equal(trained[name], start[name]), name
        told = json.loads((stage / "stage.json").read_text())
        assert told["averaged"] and 0.09 < told["kept_share"] < 0.11 and told["mean_compensation"] > 0
    found = open_run(folder)
    answer_share([found], 0, 1, 16)
    merge_parts([found])
    assert not found.missing() and len(list(folder.glob("answers/*/*.jsonl"))) == 6


@pytest.mark.parametrize("share", ["0", "1.5"])
def test_a_share_that_cannot_be_is_refused(share):
    with pytest.raises(ValueError, match=f"keep_share: '{share}' is not a number above 0 and at most 1"):
        method_of("model_tailor", "--keep_share", share)
