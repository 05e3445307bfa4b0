"""The compared methods against closed forms, autograd, scipy and one another."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.special import rel_entr, softmax
from test_llaca_train import TASKS, adapters, arguments, mini  # noqa: F401

from data.records import load_samples
from eval.runs import open_run
from llaca.config import load_recipe
from llaca.engines.shards import Layout, TensorSlice
from llaca.fisher import diagonal_fisher
from llaca.folders import handed_on
from llaca.launch import commands
from llaca.methods import METHODS
from llaca.methods.base import StageView
from llaca.train import run
from llava.adapters import attach_lora, trainable_parameters
from llava.backbones.llava15 import Llava15
from llava.dataset import InstructionDataset
from studies.reproduce import main as reproduce


def method_of(name: str, *line: str):
    """A method with its own file's settings, and those of `line`."""
    return METHODS[name](load_recipe(["--method", name, *line]).settings)


@pytest.fixture
def view(tiny, tiny_data):
    """A stage on the small random model."""
    torch.manual_seed(0)
    model = attach_lora(tiny[0], Llava15, 2, 4, 0.0)
    with torch.no_grad():
        for name, weight in trainable_parameters(model).items():
            if "lora_B" in name:
                weight.normal_(0, 0.1)
    dataset = InstructionDataset.of_samples(load_samples(tiny_data / "train.json", tiny_data), tiny[1], 512)
    return StageView("GQA", model, dataset, seed=7)


def layout_of(view: StageView) -> Layout:
    """That of one process."""
    slices = [TensorSlice(name, p.shape, p, 0, 0, p.numel()) for name, p in view.weights().items()]
    return Layout("one process", slices, list(view.weights().values()), False, torch.device("cpu"))


def moved(view: StageView, by: float, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in view.weights().values():
            weight.add_(by * torch.randn(weight.shape, generator=generator))


def test_fisher_is_the_mean_of_the_records_squared_gradients(view):
    """Against .backward() of each record's log-likelihood on its own; records without pictures are among them."""
    found = diagonal_fisher(view, 8)
    drawn = view.draw(8)
    assert len(set(drawn)) == 8 and {view.dataset.picture(i) is None for i in drawn} == {True, False}
    assert view.draw(99) != sorted(view.draw(99)) and len(view.draw(99)) == len(view.dataset)
    expected = {name: torch.zeros_like(weight) for name, weight in view.weights().items()}
    view.model.eval()
    for record in drawn:
        view.model.zero_grad()
        [batch] = view.batches([record])
        logits = view.model(**{k: v for k, v in batch.items() if k != "labels"}).logits[0, :-1].float()
        logits[:, view.model.config.image_token_id] = -torch.inf
        labels = batch["labels"][0, 1:]
        told = labels != -100
        torch.log_softmax(logits[told], -1).gather(1, labels[told, None]).sum().backward()
        for name, weight in view.weights().items():
            if weight.grad is not None:
                expected[name] += weight.grad**2 / 8
    for name, fisher in found.items():
        torch.testing.assert_close(fisher, expected[name], rtol=1e-4, atol=1e-9)
    assert sum(f.sum() for f in found.values()) > 0


@pytest.mark.parametrize("kind", ["online", "per_task"])
def test_ewc_pulls_as_the_closed_form_of_all_earlier_tasks(view, kind):
    """Two tasks, then a third: the gradient of the penalty against lambda sum_t F_t (theta - theta_t)."""
    method = method_of("ewc", "--consolidation", kind, "--penalty", "3", "--estimate_records", "6")
    method.stage = view
    method.recall({})
    assert method.loss(None, None, None) is None
    fishers, anchors = [], []
    for task in range(2):
        moved(view, 0.05, task)
        view.seed = task
        fishers.append(diagonal_fisher(view, 6))
        anchors.append({name: weight.detach().clone() for name, weight in view.weights().items()})
        method.after_task(layout_of(view).shards(), Path())
        method.recall(method.memory())
    moved(view, 0.1, 9)
    gradients = torch.autograd.grad(method.loss(None, None, None), list(view.weights().values()))
    for gradient, (name, weight) in zip(gradients, view.weights().items(), strict=True):
        one, two = (fishers[t][name] * (weight - anchors[t][name]) for t in range(2))
        both = one + two if kind == "per_task" else (fishers[0][name] + fishers[1][name]) * (weight - anchors[1][name])
        torch.testing.assert_close(gradient, 3 * both.detach(), rtol=1e-4, atol=1e-7)


def test_reglora_holds_the_positions_that_earlier_tasks_changed_most(view):
    """Two tasks, then a third: dense products in numpy, the union of both tasks' largest tenth, the mean over it."""
    method = method_of("reglora", "--penalty", "0.7", "--share", "0.1")
    method.stage, held, memory = view, {}, {}

    def products() -> dict[str, np.ndarray]:
        found = {name: weight.detach().double().numpy() for name, weight in view.weights().items()}
        return {n: found[n.replace("lora_A", "lora_B")] @ a for n, a in found.items() if "lora_A" in n}

    for task in range(2):
        method.recall(memory)
        before = products()
        shards = layout_of(view).shards()
        method.before_task(shards, task > 0, 1)
        assert (method.loss(None, None, None) is None) == (task == 0)
        moved(view, 0.05, task)
        method.after_task(shards, Path())
        memory = copy.deepcopy(method.memory())
        for name, now in products().items():
            far = np.abs(now - before[name])
            largest = far >= np.sort(far.ravel())[-round(0.1 * far.size)]
            held[name] = held.get(name, False) | largest
    method.recall(memory)
    before = products()
    method.before_task(layout_of(view).shards(), True, 1)
    assert method.loss(None, None, None).item() == 0, "nothing has moved yet"
    moved(view, 0.1, 9)
    term = method.loss(None, None, None)
    wanted = sum(np.abs(now - before[name])[held[name]].mean() for name, now in products().items())
    assert term.item() == pytest.approx(0.7 * wanted, rel=1e-4)
    gradients = torch.autograd.grad(term, list(view.weights().values()), allow_unused=True)
    pulled = dict(zip(view.weights(), gradients, strict=True))
    assert all((g is not None) == ("lora_" in name) for name, g in pulled.items())


def test_l2_is_the_squared_distance_from_the_last_tasks_weights(view):
    method = method_of("l2", "--penalty", "0.3")
    method.stage = view
    method.recall({})
    assert method.loss(None, None, None) is None
    for task in range(2):
        moved(view, 0.05, task)
        anchor = {name: weight.detach().clone() for name, weight in view.weights().items()}
        method.after_task(layout_of(view).shards(), Path())
        method.recall(method.memory())
    assert method.loss(None, None, None).item() == 0, "nothing has moved yet"
    moved(view, 0.1, 9)
    far = sum((weight.detach() - anchor[name]).double().norm() ** 2 for name, weight in view.weights().items())
    term = method.loss(None, None, None)
    assert term.item() == pytest.approx(0.3 * far.item(), rel=1e-5)
    gradients = torch.autograd.grad(term, list(view.weights().values()))
    for gradient, (name, weight) in zip(gradients, view.weights().items(), strict=True):
        torch.testing.assert_close(gradient, 0.6 * (weight - anchor[name]).detach(), rtol=1e-5, atol=1e-8)


def test_lwf_is_scipys_kl_between_the_weights_at_the_start_and_now(view):
    words = [
        word for word in range(view.model.config.text_config.vocab_size) if word != view.model.config.image_token_id
    ]
    method = method_of("lwf", "--penalty", "0.5", "--temperature", "3")
    method.stage = view
    method.before_task(None, True, 1)
    [batch] = view.batches([0, 3, 12], 3)
    with torch.no_grad():
        old = view.backbone.answer_logits(view.model, batch)[0].logits.double().numpy()
    outputs, _ = view.backbone.answer_logits(view.model, batch)
    assert method.loss(view.model, batch, outputs).item() == pytest.approx(0, abs=1e-6), "nothing has moved yet"
    moved(view, 0.1)
    outputs, _ = view.backbone.answer_logits(view.model, batch)
    term = method.loss(view.model, batch, outputs)
    p, q = (softmax(z[:, words] / 3, axis=1) for z in (old, outputs.logits.detach().double().numpy()))
    assert term.item() == pytest.approx(0.5 * 9 * rel_entr(p, q).sum(axis=1).mean(), rel=1e-4)
    assert all(g is not None for g in torch.autograd.grad(term, list(view.weights().values())))
    method.before_task(None, False, 1)
    assert method.loss(view.model, batch, outputs) is None, "a new group has nothing to keep"


@pytest.mark.parametrize("name", ["coma", "cofima"])
def test_merging_stands_between_start_and_end(view, name):
    method = method_of(name, "--merge_weight", "0.4")
    method.stage = view
    generator = torch.Generator().manual_seed(5)
    earlier = {k: 1e-4 * torch.rand(w.shape, generator=generator) for k, w in view.weights().items()}
    method.recall({"fisher": earlier})
    shards = layout_of(view).shards()
    method.before_task(shards, True, 1)
    start = [p.clone() for p in shards.parameters]
    moved(view, 0.5)
    merged, _ = method.after_task(shards, Path())
    later = diagonal_fisher(view, 200)
    for key, a, m, b in zip(earlier, start, merged, shards.parameters, strict=True):
        if name == "coma":
            torch.testing.assert_close(m, 0.6 * a + 0.4 * b)
        else:
            old, new = 0.6 * earlier[key], 0.4 * later[key].clamp(max=1e-4)
            torch.testing.assert_close(m, (old * a + new * b) / (old + new))
    apart = [(m - 0.6 * a - 0.4 * b).abs().max() for a, m, b in zip(start, merged, shards.parameters, strict=True)]
    assert (max(apart) > 0.01) == (name == "cofima")
    method.before_task(shards, False, 1)
    assert method.after_task(shards, Path())[0] is None


def test_the_replay_buffer_is_exact(arguments):  # noqa: F811
    """Each stage trains on its own 24 records and five of every earlier task; the same numbers every time."""
    folder = run(load_recipe([*arguments, "--method", "replay", "--memory_records", "5"]))
    stories = [torch.load(path, weights_only=True) for path in sorted(folder.glob("stages/*/method.pt"))]
    assert [list(story["buffer"]) for story in stories] == [TASKS[:1], TASKS[:2], TASKS]
    for numbers in stories[-1]["buffer"].values():
        assert len(set(numbers)) == 5 and all(0 <= n < 24 for n in numbers)
    assert stories[-1]["buffer"]["ScienceQA"] == stories[0]["buffer"]["ScienceQA"]
    told = [json.loads(path.read_text()) for path in sorted(folder.glob("stages/*/stage.json"))]
    assert [(t["samples"], t["replayed"], t["steps"]) for t in told] == [(24, 0, 3), (29, 5, 4), (34, 10, 5)]


def test_replay_takes_its_records_from_the_earlier_tasks_own(view, tiny, tiny_data):
    samples = [replace(s, id=f"old {s.id}") for s in load_samples(tiny_data / "train.json", tiny_data)]
    old = InstructionDataset.of_samples(samples, tiny[1], 512)
    method = method_of("replay")
    method.recall({"buffer": {"old": [3, 12]}})
    extended = method.extend(view.dataset, {"old": old, "GQA": view.dataset})
    names = [extended.name(i) for i in range(len(extended))]
    assert names == [*map(view.dataset.name, range(len(view.dataset))), old.name(3), old.name(12)]
    for mine, theirs in ((len(view.dataset), 3), (len(view.dataset) + 1, 12)):
        assert all(torch.equal(extended[mine][key], old[theirs][key]) for key in old[theirs])
    assert extended.modality_lengths[-2:] == [old.modality_lengths[3], old.modality_lengths[12]]


def test_a_memory_that_is_lost_stops_the_run(tmp_path):
    for name in ("replay", "agem", "ewc", "l2", "pgp", "cofima", "task_merge", "magmax", "olora", "reglora", "ccfi"):
        who = METHODS[name].__name__
        with pytest.raises(FileNotFoundError, match=f"method.pt is not there: what {who} has to know"):
            handed_on(method_of(name), tmp_path)
    assert handed_on(method_of("lora"), tmp_path) == {}


@pytest.mark.parametrize(
    ("name", "field", "value", "words"),
    [("replay", "memory_records", "-1", "at least 0"), ("ewc", "estimate_records", "0", "at least 1"),
     ("ewc", "penalty", "-1.0", "at least 0"), ("coma", "merge_weight", "1.5", "at least 0 and at most 1"),
     ("lwf", "temperature", "0.0", "above 0")],
)  # fmt: skip
def test_settings_out_of_range_are_refused_before_anything_is_trained(name, field, value, words):
    with pytest.raises(ValueError, match=f"{field}: '{value}' is not a (whole )?number (of )?{words}"):
        method_of(name, f"--{field}", value)


def test_joined_records_are_those_of_the_datasets(view):
    joined = view.dataset.joined([(view.dataset, [3, 12])])
    assert len(joined) == len(view.dataset) + 2 and len(view.dataset) == 16
    for there, here in ((16, 3), (17, 12)):
        for key, value in view.dataset[here].items():
            assert torch.equal(joined[there][key], value)
    assert joined.modality_lengths[-2:] == [view.dataset.modality_lengths[i] for i in (3, 12)]


@pytest.mark.parametrize(
    ("name", "line"),
    [("ewc", ["--penalty", "0"]), ("l2", ["--penalty", "0"]), ("reglora", ["--penalty", "0"]),
     ("lwf", ["--penalty", "0"]),
     ("replay", ["--memory_records", "0"]), ("coma", ["--merge_weight", "1"]), ("stacked_lora", ["--blocks", "1"]),
     ("recyclable", ["--penalty", "0", "--hidden", "0"]), ("corrective", ["--penalty", "0", "--boost", "0"]),
     ("smoothing", ["--smoothing", "0"]), ("pace", ["--noise", "0"]), ("dgg", ["--probability", "0"]),
     ("osf", ["--keep", "0"]), ("sd_lora", ["--blocks", "1"]), ("rcl", ["--rho", "0", "--energy", "0"]),
     ("safe", ["--diagonal", "0", "--redundant", "0", "--align", "0"])],
)  # fmt: skip
def test_without_strength_every_method_is_lora_bit_for_bit(arguments, name, line):  # noqa: F811
    runs = [[*arguments[:-1], name, "--method", name, *line], [*arguments[:-1], "lora", "--method", "lora"]]
    mine, lora = (adapters(run(load_recipe(r))) for r in runs)
    assert {k: v for k, v in mine.items() if "/adapter/" in k} == lora


def test_an_oracle_starts_every_task_fresh_and_answers_with_its_own(arguments):  # noqa: F811
    folder = run(load_recipe([*arguments, "--method", "lora_per_task"]))
    alone = run(load_recipe([*arguments[:-1], "alone", "--method", "lora", "--tasks", "ScienceQA"]))
    science = "stages/01-ScienceQA/adapter/adapter_model.safetensors"
    assert (folder / science).read_bytes() == (alone / science).read_bytes()
    last = open_run(folder).rows[-1][1]
    assert last == {"ScienceQA": "01-ScienceQA", "TextVQA": "02-TextVQA", "GQA": "03-GQA"}


@pytest.mark.parametrize("name", ["ewc", "l2", "lwf", "cofima", "replay"])
def test_methods_with_memory_train_and_hand_it_on(arguments, name):  # noqa: F811
    """Three stages with grouping: the third continues the second's group, and its memory."""
    folder = run(load_recipe([*arguments, "--method", name, "--grouping", "true"]))
    memories = {path.parent.name: torch.load(path, weights_only=True) for path in folder.glob("stages/*/method.pt")}
    if name == "replay":
        assert set(memories["03-GQA"]["buffer"]) == {"TextVQA", "GQA"}, "ScienceQA is of another group"
    if name == "ewc":
        two, three = memories["02-TextVQA"]["fisher"], memories["03-GQA"]["fisher"]
        assert all((three[key] >= two[key]).all() for key in two) and any((three[key] > two[key]).any() for key in two)
    lora = run(load_recipe([*arguments[:-1], "lora", "--method", "lora", "--grouping", "true"]))
    changed = "stages/03-GQA/adapter/adapter_model.safetensors"
    mine, plain = (load_file(f / changed) for f in (folder, lora))
    assert any(not torch.equal(mine[key], plain[key]) for key in plain)
    assert all(tensor.isfinite().all() for tensor in mine.values())


def test_eproj_trains_a_projector_for_every_group_and_nothing_else(arguments):  # noqa: F811
    folder = run(load_recipe([*arguments, "--method", "eproj", "--tasks", "TextVQA", "ScienceQA", "GQA"]))
    text, _, gqa = (load_file(path) for path in sorted(folder.glob("stages/*/adapter/*.safetensors")))
    assert all((tensor == 0).all() for name, tensor in gqa.items() if "lora_B" in name)
    assert all(torch.equal(tensor, text[name]) for name, tensor in gqa.items() if "lora" in name)
    apart = [name for name in gqa if not torch.equal(gqa[name], text[name])]
    assert len(apart) == 4 and all("multi_modal_projector" in name for name in apart)
    told = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("stages/*/stage.json")}
    assert told["03-GQA"]["start"] == "01-TextVQA", "its group"
    assert {own["trained_parameters"] for own in told.values()} == {sum(gqa[name].numel() for name in apart)}


@pytest.mark.parametrize(
    "name", ["ewc", "l2", "agem", "pgp", "cofima", "replay", "task_merge", "ties", "reglora", "ccfi"]
)
def test_a_stage_recalls_the_memory_of_its_group_not_of_the_latest_stage(arguments, monkeypatch, name):  # noqa: F811
    """TextVQA, ScienceQA, GQA: the third stage continues the first one's group."""
    seen, recall = {}, METHODS[name].recall

    def watched(self, memory):
        seen[self.stage.task] = copy.deepcopy(memory)
        recall(self, memory)

    monkeypatch.setattr(METHODS[name], "recall", watched)
    line = ["--method", name, "--grouping", "true", "--tasks", "TextVQA", "ScienceQA", "GQA"]
    folder = run(load_recipe([*arguments, *line]))
    kept = torch.load(folder / "stages/01-TextVQA/method.pt", weights_only=True)
    torch.testing.assert_close(seen["GQA"], kept, rtol=0, atol=0)
    assert seen["TextVQA"] == seen["ScienceQA"] == {}, "new groups"


def test_lwf_is_taught_by_the_weights_of_its_group(arguments, monkeypatch):  # noqa: F811
    teachers, before_task = [], METHODS["lwf"].before_task

    def watched(self, *given):
        before_task(self, *given)
        teachers.append(self.teacher)

    monkeypatch.setattr(METHODS["lwf"], "before_task", watched)
    line = ["--method", "lwf", "--grouping", "true", "--tasks", "TextVQA", "ScienceQA", "GQA"]
    folder = run(load_recipe([*arguments, *line]))
    first = load_file(folder / "stages/01-TextVQA/adapter/adapter_model.safetensors")
    assert teachers[:2] == [None, None] and len(teachers[2]) == len(first)
    for key, weight in teachers[2].items():
        assert torch.equal(weight, first[key.replace(".modules_to_save", "").replace(".default", "")]), key


@pytest.mark.parametrize("name", ["lora", "ewc", "agem", "pgp"])
@pytest.mark.parametrize("more", [["--logging_steps", "1"], ["--logging_steps", "99", "--save-steps", "1"]])
def test_numbers_that_are_not_finite_stop_the_run(arguments, tmp_path, name, more):  # noqa: F811
    """At the next line of the log, and before a checkpoint is completed."""
    line = [*arguments, "--method", name, "--learning_rate", "1e38", "--tasks", "GQA", *more]
    with pytest.raises(FloatingPointError, match=r"r/01-GQA, up to|checkpoint-\d+: not finite"):
        run(load_recipe(line))
    for complete in tmp_path.glob("runs/r/stages/*/trainer/*/COMPLETE"):
        saved = load_file(complete.parent / "adapter_model.safetensors")
        assert all(tensor.isfinite().all() for tensor in saved.values())


def test_what_the_last_run_would_refuse_is_refused_before_the_first(arguments):  # noqa: F811
    with pytest.raises(SystemExit, match=r"method lwf does not work with --zero 3"):
        reproduce(["table1", "--mini", "--rows", "LoRA", "LwF", "--zero", "3", *arguments[2:4]])
    for name in ("agem", "pgp"):
        with pytest.raises(ValueError, match=f"method {name} changes gradients"):
            commands([*arguments, "--method", name, "--max_grad_norm", "1"])


def test_a_method_refuses_the_engines_it_does_not_work_under(arguments):  # noqa: F811
    with pytest.raises(ValueError, match=r"method ewc does not work with --zero 3; it does with none, 0, 1, 2"):
        run(load_recipe([*arguments, "--method", "ewc", "--zero", "3"]))


def test_answer_loss_is_minus_the_log_likelihood(view):
    [batch] = view.batches([0])
    labels = batch["labels"][0, 1:]
    logits = view.model(**{k: v for k, v in batch.items() if k != "labels"}).logits[0, :-1].double()
    logits[:, view.model.config.image_token_id] = -torch.inf
    expected = -torch.log_softmax(logits, -1)[torch.arange(len(labels)), labels.clamp(min=0)][labels != -100].sum()
    found = view.backbone.answer_loss(view.model, batch).item()
    assert found == pytest.approx(expected.item(), rel=1e-5) and "labels" in batch
