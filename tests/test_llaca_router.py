"""The prototype router against stock hidden states, numpy, and the answers of the adapters that it chooses."""

import json

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from test_llaca_methods import method_of, view  # noqa: F401
from test_llaca_train import adapters, arguments, mini  # noqa: F401

from data.records import load_samples
from eval.predict import Answerer
from eval.report import main as report
from eval.runs import open_run
from eval.tables import read_matrix
from llaca.config import load_recipe
from llaca.train import run
from llava.backbones import load_base
from llava.dataset import InstructionDataset
from llava.generate import answer_batches
from llava.greedy import Decoder
from llava.states import asked, question_of, question_states


def test_the_state_of_a_question_is_stock_transformers_last_one(tiny, tiny_data):
    """Of records with and without pictures, one of two turns; the same from the token ids of the question alone."""
    model, backbone = tiny
    model.eval()
    records = InstructionDataset.of_samples(load_samples(tiny_data / "train.json", tiny_data), backbone, 512)
    items = [records[number] for number in range(len(records))]
    assert {"pixel_values" in item for item in items} == {True, False}
    found = question_states(model, backbone, map(question_of, items))
    for item, state in zip(items, found, strict=True):
        end = int((item["labels"] != -100).nonzero()[0])
        picture = {key: value for key, value in item.items() if key not in ("input_ids", "labels")}
        prompt = {"input_ids": item["input_ids"][None, :end], **{k: v[None] for k, v in picture.items()}}
        with torch.no_grad():
            wanted = model(**prompt, output_hidden_states=True).hidden_states[-1][0, -1]
        torch.testing.assert_close(state, wanted, rtol=0, atol=2e-5)
        [again] = question_states(model, backbone, [asked(backbone, item["input_ids"][:end].tolist(), picture)])
        torch.testing.assert_close(again, wanted, rtol=0, atol=2e-5)
    assert question_states(model, backbone, []).shape == (0,)


def test_every_question_is_answered_by_the_adapter_of_the_nearest_prototype(arguments, tmp_path):  # noqa: F811
    folder = run(load_recipe([*arguments, "--method", "prototype_router", "--estimate_records", "9"]))
    oracle = run(load_recipe([*arguments[:-1], "oracle", "--method", "lora_per_task"]))
    assert adapters(folder) == adapters(oracle)
    report(["--runs-dir", str(tmp_path / "runs"), "--run", "r", "--out", str(tmp_path / "tables")])
    assert np.isfinite(np.tril(read_matrix(folder / "matrix.csv")[0])).all()
    found = open_run(folder)
    answerer, (base, backbone) = Answerer(found), load_base(found.recipe.model.base)  # the pictures, not their features
    stages, chosen = [stage.name for stage in found.stages], set()
    prototypes = [torch.load(folder / "stages" / n / "method.pt")["mean"].double().numpy() for n in stages]
    models = [answerer.model(found, stage) for stage in stages]
    for place, stage in enumerate(stages):
        for task, questions in list(found.questions.items())[: place + 1]:
            rows = [json.loads(line) for line in found.answer_file(stage, task).read_text().splitlines()]
            for number, row in enumerate(rows):
                path = questions.picture(number)
                picture = {} if path is None else {key: value[None] for key, value in backbone.picture(path).items()}
                with torch.no_grad():
                    ids = torch.tensor([questions.ids(number)])
                    hidden = base.eval()(input_ids=ids, **picture, output_hidden_states=True).hidden_states[-1]
                away = [np.linalg.norm(hidden[0, -1].double().numpy() - p) for p in prototypes[: place + 1]]
                nearest = int(np.argmin(away))
                chosen.add((place, nearest))
                decoder = Decoder(models[nearest], answerer.backbone, found.answer_limit(task))
                [(_, texts)] = answer_batches(decoder, [questions.ids(number)], [path])
                assert texts == [row["text"]], (stage, task)
    assert len({nearest for place, nearest in chosen if place == 2}) > 1


def test_mean_covariance_and_discriminant_are_numpys_and_scikit_learns(tiny, tiny_data, view):  # noqa: F811
    method = method_of("discriminant_router", "--estimate_records", "9", "--shrinkage", "0.2")
    method.stage = view
    view.model.eval()
    method.recall({})
    states = question_states(view.model, view.backbone, [question_of(view.dataset[n]) for n in view.draw(9)])
    memory = method.memory()
    np.testing.assert_allclose(memory["mean"], states.double().mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(memory["covariance"], np.cov(states.double().T, ddof=0), rtol=1e-3, atol=1e-5)
    rng = np.random.default_rng(0)
    groups = [rng.normal(size=(40, 6)) @ rng.normal(size=(6, 6)) + rng.normal(size=6) for _ in range(3)]
    questions = rng.normal(size=(200, 6)) * 2
    told = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.2).fit(
        np.concatenate(groups), np.repeat([0, 1, 2], 40)
    )
    memories = [{"mean": torch.tensor(g.mean(0)), "covariance": torch.tensor(np.cov(g.T, ddof=0))} for g in groups]
    assert method.route(torch.tensor(questions), memories) == told.predict(questions).tolist()
    assert len(set(told.predict(questions))) == 3
    assert method.route(torch.tensor(questions), memories[:1]) == [0] * 200


def test_a_picture_that_is_gone_is_named(arguments):  # noqa: F811
    line = [*arguments, "--method", "prototype_router", "--tasks", "TextVQA", "GQA", "--reuse_vision_features", "false"]
    found = open_run(run(load_recipe(line)))
    questions = found.questions["GQA"]
    picture = questions.picture(0)
    content = picture.read_bytes()
    picture.unlink()
    try:
        with pytest.raises(OSError, match=picture.name):
            Answerer(found).routed(found, "02-GQA", "GQA", [0])
    finally:
        picture.write_bytes(content)
