"""A-GEM and PGP against their formulas, numpy and plain LoRA."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_base
from safetensors.torch import load_file
from test_llaca_methods import layout_of, method_of, view  # noqa: F401
from test_llaca_train import adapters, arguments, command, mini  # noqa: F401

from data.records import load_samples
from llaca.config import load_recipe
from llaca.engines.shards import Shards
from llaca.methods import METHODS
from llaca.methods.base import StageView
from llaca.methods.pgp import extended
from llaca.second_moments import second_moments
from llaca.train import run
from llava.adapters import attach_lora
from llava.backbones import load_base
from llava.backbones.llava15 import Llava15
from llava.dataset import InstructionDataset

ROOT = Path(__file__).parents[1]


def flat(tensors) -> np.ndarray:
    return torch.cat([tensor.detach().flatten() for tensor in tensors]).double().numpy()


def agem_with(view: StageView, buffer: dict[str, list[int]]):  # noqa: F811
    """A-GEM in a stage whose earlier tasks are subsets of the same records."""
    method = method_of("agem")
    method.stage = view
    method.recall({"buffer": buffer})
    assert method.extend(view.dataset, dict.fromkeys(buffer, view.dataset)) is view.dataset
    method.before_task(layout_of(view).shards(), True, 1)
    return method


def mean_gradient(view: StageView, records: list[int]) -> list[torch.Tensor]:  # noqa: F811
    """By .backward() of the mean over the records' supervised tokens, from the logits of all positions."""
    view.model.zero_grad()
    view.model.eval()
    [batch] = view.batches(records, len(records))
    labels = batch.pop("labels")
    logits = view.model(**batch).logits[:, :-1].float()
    logits[..., view.model.config.image_token_id] = -torch.inf
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()).backward()
    gradients = [weight.grad.clone() for weight in view.weights().values()]
    view.model.zero_grad()
    view.model.train()
    return gradients


@pytest.mark.parametrize("sign", [-1, 1])
def test_agem_projects_by_the_formula_only_a_gradient_that_points_against_the_memory(view, sign):  # noqa: F811
    """The sign is that of the product over all tensors; that over one of them alone is the opposite."""
    buffer = {"one": [0, 3, 12], "two": [5, 14]}
    method, reference = agem_with(view, buffer), mean_gradient(view, [0, 3, 12, 5, 14])
    generator = torch.Generator().manual_seed(0)
    gradients = [sign * r + r.abs().mean() * torch.randn(r.shape, generator=generator) for r in reference]
    gradients[0] = -0.5 * sign * reference[0]
    g, r = flat(gradients), flat(reference)
    assert sign * (g @ r) > 0 and sign * (flat(gradients[:1]) @ flat(reference[:1])) < 0
    layout, before, state = layout_of(view), [each.clone() for each in gradients], torch.get_rng_state()
    method.after_backward(Shards(layout, layout.shards().parameters, gradients))
    after = flat(gradients)
    if sign > 0:
        assert all(torch.equal(a, b) for a, b in zip(gradients, before, strict=True))
    else:
        np.testing.assert_allclose(after, g - (g @ r) / (r @ r) * r, rtol=1e-4, atol=1e-6 * abs(g).max())
        assert np.linalg.norm(after - g) > 0.1 * np.linalg.norm(g)
    assert after @ r >= -1e-5 * np.linalg.norm(after) * np.linalg.norm(r)
    assert method.log() == {"projected_share": float(sign < 0)}
    assert torch.equal(torch.get_rng_state(), state) and view.model.training, "training goes on as if nothing had been"
    assert all(weight.grad is None for weight in view.weights().values())


def test_agem_draws_by_the_step_and_goes_on_with_the_step_of_a_checkpoint(view):  # noqa: F811
    """24 records in the memory, 16 a step."""
    buffer = {"one": list(range(12)), "two": list(range(4, 16))}
    method, again = agem_with(view, buffer), agem_with(view, buffer)
    first, second = (flat(method.reference(step).values()) for step in (0, 1))
    assert np.array_equal(first, flat(again.reference(0).values())) and not np.allclose(first, second, rtol=0.01)
    layout = layout_of(view)
    shards = Shards(layout, layout.shards().parameters, [torch.zeros_like(w) for w in view.weights().values()])
    for _ in range(3):
        method.after_backward(shards)
    again.load_state_dict(method.state_dict())
    assert again.steps == 3 and again.log() == {"projected_share": 0.0}
    view.seed += 1
    assert not np.allclose(first, flat(again.reference(0).values()), rtol=0.01), "another stage draws other records"


def test_an_empty_memory_needs_no_work(view):  # noqa: F811
    assert not agem_with(view, {}).watches and not agem_with(view, {"one": []}).watches
    method = method_of("pgp")
    method.stage = view
    method.recall({})
    assert not method.watches
    method.recall({"basis": {name: torch.empty(4, 0) for name in view.weights()}})
    assert not method.watches


@pytest.mark.parametrize("energy", ["-0.1", "1.5"])
def test_pgp_refuses_an_energy_that_is_no_share(energy):
    with pytest.raises(ValueError, match=f"energy: '?{energy}'? is not a number of at least 0 and at most 1"):
        load_recipe(["--method", "pgp", "--energy", energy])


def test_agem_refuses_clipping(arguments):  # noqa: F811
    line = [*arguments, "--method", "agem", "--max_grad_norm", "1", "--tasks", "GQA"]
    with pytest.raises(ValueError, match="changes gradients, and engines clip"):
        run(load_recipe(line))


def test_the_basis_grows_by_the_rule_of_gpm():
    """Three tasks, against singular value decompositions of the inputs themselves, a column each, in numpy."""
    rng, basis, expected = np.random.default_rng(0), None, np.zeros((20, 0))
    for task in range(3):
        X = rng.normal(size=(20, 6)) @ np.diag(np.arange(6) + 1.0) @ rng.normal(size=(6, 40))
        X += 3 * task * rng.normal(size=(20, 1)) @ rng.normal(size=(1, 40))
        outside = X - expected @ (expected.T @ X)
        vectors, values, _ = np.linalg.svd(outside, full_matrices=False)
        held = (np.linalg.norm(X) ** 2 - np.linalg.norm(outside) ** 2 + np.cumsum(values**2)) / np.linalg.norm(X) ** 2
        already = 1 - np.linalg.norm(outside) ** 2 / np.linalg.norm(X) ** 2
        more = 0 if already >= 0.9 else int(np.argmax(held >= 0.9)) + 1
        expected = np.hstack([expected, vectors[:, :more]])
        basis = extended(basis, torch.from_numpy(X @ X.T).float(), 0.9)
        np.testing.assert_allclose(basis @ basis.T, expected @ expected.T, atol=1e-5)
        np.testing.assert_allclose(basis.T @ basis, np.eye(basis.shape[1]), atol=1e-6)
        again = extended(basis, torch.from_numpy(X @ X.T).float(), 0.9)
        assert torch.equal(again, basis), "a task whose energy is held adds nothing"
    assert 3 < basis.shape[1] < 20
    assert extended(None, torch.eye(4), 0.0).shape == (4, 0) and extended(None, torch.eye(4), 1.0).shape == (4, 4)
    assert extended(None, torch.zeros(4, 4), 1.0).shape == (4, 0), "a layer that no record reaches is free"


def test_input_energies_are_those_of_the_layers_inputs(view):  # noqa: F811
    """Against the inputs themselves, written down in one padded batch; records without pictures are among them."""
    energies = second_moments(view, list(view.weights()), 3)
    seen = {}
    layers = {name: view.model.get_submodule(name.rpartition(".")[0]) for name in view.weights()}
    for name, layer in layers.items():
        layer.forward = lambda x, name=name, linear=layer.forward: (seen.setdefault(name, []).append(x), linear(x))[1]
    view.model.eval()
    with torch.no_grad():
        [batch] = view.batches(view.draw(3), 3)
        view.model(**{key: value for key, value in batch.items() if key != "labels"})
    mask = batch["attention_mask"].bool()
    for name, layer in layers.items():
        [x] = seen[name]
        x = x[mask] if "multi_modal" not in name else x.flatten(0, -2)
        x = x.double().numpy() if name.endswith("weight") else np.ones((len(x), 1))
        np.testing.assert_allclose(energies[name], x.T @ x, rtol=1e-3, atol=1e-4 * abs(x.T @ x).max())
        assert layer.weight.requires_grad and not layer._forward_pre_hooks


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory):
    """More inputs than a record has tokens."""
    return make_base(tmp_path_factory.mktemp("wide-llava"), width=128)


def test_pgp_leaves_the_protected_subspace_alone_and_the_old_records_answers_with_it(wide_base, tiny_data):
    """Six steps of AdamW on pictures after a stage on a text of 76 tokens; plain LoRA for comparison."""
    kept = []
    for protects in (False, True):
        torch.manual_seed(0)
        model, backbone = load_base(wide_base)
        model = attach_lora(model, Llava15, 4, 8, 0.0)
        samples = load_samples(tiny_data / "train.json", tiny_data)
        old, new = (InstructionDataset.of_samples(each, backbone, 512) for each in (samples[10:11], samples[:4]))
        stage = StageView("old", model, old, seed=1)
        for name, weight in stage.weights().items():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, 0, 0.05)
        method = method_of("pgp", "--energy", "1", "--estimate_records", "1")
        method.stage = stage
        method.recall({})
        method.after_task(layout_of(stage).shards(), Path())
        method.stage = replace(stage, dataset=new)
        method.recall(method.memory())
        shards = layout_of(stage).shards()
        method.before_task(shards, True, 6)
        start = {name: weight.detach().clone() for name, weight in stage.weights().items()}
        [question], [batch] = stage.batches([0]), method.stage.batches(range(4), 4)
        with torch.no_grad():
            answered = model(**question).logits
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        for _ in range(6):
            backbone.answer_loss(model, batch).backward()
            if protects:
                shards.gradients = [weight.grad for weight in stage.weights().values()]
                method.after_backward(shards)
            optimizer.step()
            optimizer.zero_grad()
            if protects:
                method.after_step(shards)
        with torch.no_grad():
            kept.append((model(**question).logits - answered).norm().item())
        leaks = []
        for name, weight in stage.weights().items():
            moved, basis = (weight - start[name]).detach().double(), method.basis[name].double()
            moved = moved.view(len(moved), -1)
            if basis.shape[1] < len(basis):
                assert moved.norm() > 0.1 * weight.norm(), "what is free does move"
            if 0 < basis.shape[1] < len(basis):
                leaks.append(((moved @ basis).norm() / moved.norm()).item())
                momentum = optimizer.state[weight]["exp_avg"].double()
                assert ((momentum @ basis).norm() < 1e-5 * momentum.norm()) == protects, "Adam never sees it"
        assert len(leaks) == 14 and (max(leaks) < 1e-6 if protects else min(leaks) > 0.1)
    assert kept[1] < 0.01 * kept[0]


@pytest.mark.parametrize(("name", "line"), [("agem", ["--memory_records", "0"]), ("pgp", ["--energy", "0"])])
def test_without_strength_both_are_lora_bit_for_bit(arguments, name, line):  # noqa: F811
    runs = [[*arguments[:-1], name, "--method", name, *line], [*arguments[:-1], "lora", "--method", "lora"]]
    mine, lora = (adapters(run(load_recipe(r))) for r in runs)
    assert mine == lora


def test_agem_that_never_projects_is_lora_bit_for_bit(arguments, monkeypatch):  # noqa: F811
    """With dropout: the memory's batches draw nothing from the generators of training."""
    lora = adapters(run(load_recipe([*arguments[:-1], "lora", "--method", "lora"])))
    honest, asked = METHODS["agem"].reference, []

    def zero(self, step):
        asked.append(step)
        return {name: torch.zeros_like(r) for name, r in honest(self, step).items()}

    monkeypatch.setattr(METHODS["agem"], "reference", zero)
    assert adapters(run(load_recipe([*arguments[:-1], "agem", "--method", "agem"]))) == lora
    assert asked == [0, 1, 2] * 2


@pytest.mark.parametrize("name", ["agem", "pgp"])
def test_three_stages_with_a_memory(arguments, name):  # noqa: F811
    line = ["--method", name, *(["--memory_records", "5"] if name == "agem" else ["--estimate_records", "6"])]
    folder = run(load_recipe([*arguments[:-1], name, *line, "--logging_steps", "1"]))
    told = [json.loads(path.read_text()) for path in sorted(folder.glob("stages/*/stage.json"))]
    memories = [torch.load(path, weights_only=True) for path in sorted(folder.glob("stages/*/method.pt"))]
    weights = [load_file(path) for path in sorted(folder.glob("stages/*/adapter/*.safetensors"))]
    assert [(t["samples"], t["steps"]) for t in told] == [(24, 3)] * 3, "the memory is not trained on"
    if name == "agem":
        assert [[len(kept) for kept in memory["buffer"].values()] for memory in memories] == [[5], [5, 5], [5, 5, 5]]
        shares = [t.get("projected_share") for t in told]
        assert shares[0] is None and all(share in (0, 1 / 3, 2 / 3, 1) for share in shares[1:])
        log = [json.loads(text) for text in (folder / "stages/03-GQA/train_log.jsonl").read_text().splitlines()]
        assert [entry["projected_share"] for entry in log if "loss" in entry][-1] == shares[-1]
    else:
        shares = [t["protected_share"] for t in told]
        assert 0 < shares[0] < shares[1] <= shares[2] <= 1
        for before, after in itertools.pairwise(memories):
            for key, basis in before["basis"].items():
                assert torch.equal(after["basis"][key][:, : basis.shape[1]], basis), "what is protected stays so"
        for stage in (1, 2):
            for key, basis in memories[stage - 1]["basis"].items():
                short = key.replace(".default.", ".").replace(".modules_to_save.", ".")
                moved = torch.from_numpy(np.asarray(weights[stage][short] - weights[stage - 1][short]))
                moved = moved.view(len(moved), -1)
                assert (moved @ basis).norm() <= 1e-5 * weights[stage][short].norm()
