"""What stays of the base: answers against plain generation, losses against transformers' own, and the columns."""

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from test_llaca_train import arguments, mini  # noqa: F401

from data.mini import skills
from data.mini.folder import STAMP
from eval import retained as module
from eval.predict import Answerer
from eval.report import main as report
from eval.retained import token_loss, write_stages
from eval.runs import open_run, retained
from eval.tasks import task_of
from llaca.config import load_recipe
from llaca.train import run
from llava.backbones import load_base
from llava.generate import generate_answers
from llava.greedy import Decoder


@pytest.fixture(scope="module")
def skill_folder(tmp_path_factory):
    """Two questions a skill and two texts, one of them longer than a window."""
    root = tmp_path_factory.mktemp("retained") / "skills"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(skills, "PER_SKILL", 2)
        assert skills.build(root, seed=1) and not skills.build(root, seed=1)
    assert json.loads((root / STAMP).read_text())["questions"] == 2 and skills.is_built(root)
    for name, times in (("long", 40), ("short", 1)):
        (root / f"{name}.txt").write_text(times * "The dog is left of the red circle. ")
    return root


def test_the_skills_are_a_benchmark_of_test_sets(skill_folder):
    spec = yaml.safe_load((skill_folder / "benchmark.yaml").read_text())
    assert len(spec["tasks"]) == len(skills.SKILLS) - 1 and "point at a thing" not in spec["tasks"]
    for skill in spec["tasks"]:
        task = task_of(skill_folder, skill)
        for entry in task.read_references(skill_folder, "original", "test").whole().asked.values():
            assert all(task.official(text, entry.reference) == 1 for text in entry.reference)
            assert task.official("It is choice E, the dog.", entry.reference) == 0
    for skill in ("choose its kind", "choose what is shown", "choose without a picture"):
        asked = task_of(skill_folder, skill).read_references(skill_folder, "original", "test").asked.values()
        assert all(len(entry.reference) == 2 for entry in asked), "both sentences of the corpus are right"
    assert skills.both("I see a dog here.") == ["I see a dog here."]
    assert skills.both("I take B because of the dog.") == skills.both("It is choice B, the dog.")


def test_a_texts_loss_is_transformers_own_with_labels_shifted_once(tiny, monkeypatch):
    model, backbone = tiny
    ids = torch.tensor(
        [backbone.tokenizer(text := "What color is the dog? red", add_special_tokens=False)["input_ids"]]
    )
    model.eval()
    with torch.no_grad():
        assert token_loss(model, backbone, text) == pytest.approx(
            model(input_ids=ids, labels=ids).loss.item(), rel=1e-5
        )
        monkeypatch.setattr(module, "LENGTH", 5)
        windows = [ids[:, begin : begin + 5] for begin in range(0, ids.shape[1], 5)]
        sums = [model(input_ids=w, labels=w).loss.item() * (w.shape[1] - 1) for w in windows if w.shape[1] > 1]
        count = sum(w.shape[1] - 1 for w in windows)
    assert len(windows) > 1 and token_loss(model, backbone, text) == pytest.approx(sum(sums) / count, rel=1e-5)
    with pytest.raises(ValueError, match="a text of 0 tokens has no loss"):
        token_loss(model, backbone, "")


def test_a_run_is_measured_stage_by_stage_beside_its_base(arguments, skill_folder, tmp_path):  # noqa: F811
    """In groups; by a flag; the base's row without an adapter; again without a question or a text read twice."""
    line = [*arguments, "--method", "llaca", "--grouping", "true"]
    folder = run(load_recipe(line))
    given = ["--runs-dir", str(tmp_path / "runs"), "--retained", str(skill_folder)]
    report(given)
    found = pd.read_csv(folder / "retained" / "matrix.csv", index_col="stage")
    losses = pd.read_csv(folder / "retained" / "loss.csv", index_col="stage")
    assert list(found.index) == list(losses.index) == ["base", "01-ScienceQA", "02-TextVQA", "03-GQA"]
    assert found.shape[1] == len(skills.SKILLS) - 1 and list(losses.columns) == ["long", "short"]
    kept = retained(open_run(folder), str(skill_folder))
    base, backbone = load_base(kept.recipe.model.base)
    text = (skill_folder / "short.txt").read_text()
    assert losses.loc["base", "short"] == pytest.approx(token_loss(base, backbone, text), rel=1e-5)
    model = Answerer(kept).model(kept, "03-GQA")
    assert losses.loc["03-GQA", "short"] == pytest.approx(token_loss(model, backbone, text), rel=1e-5)
    assert losses.loc["03-GQA", "short"] != losses.loc["base", "short"]
    skill = "name an object"
    questions = kept.questions[skill]
    asked = [f"<image>\n{questions.text(number)}" for number in range(2)]
    pictures = [questions.picture(number) for number in range(2)]
    wanted = generate_answers(Decoder(base, backbone, 40), asked, pictures)
    rows = [json.loads(line) for line in kept.answer_file("base", skill).read_text().splitlines()]
    assert [row["text"] for row in rows] == wanted
    table = (tmp_path / "runs" / "tables" / "table.txt").read_text()
    assert f"{found.iloc[-1].mean():.2f}" in table and "Retained (base)" in table and "Retained loss" in table
    before = {path: path.stat().st_mtime_ns for path in (folder / "answers-retained").rglob("*.jsonl")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "token_loss", lambda *given: pytest.fail("read again"))
        report(given)
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "answers-retained").rglob("*.jsonl")}
    assert np.allclose(pd.read_csv(folder / "retained" / "loss.csv", index_col="stage"), losses)
    (skill_folder / "short.txt").write_text("A circle is red.")  # another text under the same name is read
    report(given)
    again = pd.read_csv(folder / "retained" / "loss.csv", index_col="stage")
    assert again.loc["base", "short"] != pytest.approx(losses.loc["base", "short"])
    assert "What stays of the base" in (folder / "report.html").read_text()


def test_a_recipe_names_the_folder_and_may_do_so_later(arguments, skill_folder, tmp_path):  # noqa: F811
    line = [*arguments, "--method", "lora", "--tasks", "TextVQA", "GQA"]
    folder = run(load_recipe(line))
    run(load_recipe([*line, "--retained", str(skill_folder)]))  # it changes nothing that is trained
    assert retained(open_run(folder)) is None
    named = run(load_recipe([*line, "--run", "named", "--retained", str(skill_folder)]))
    assert retained(open_run(named)).tasks == [skill for skill, *_ in skills.SKILLS if skill != "point at a thing"]
    with pytest.raises(FileNotFoundError, match=r"retained: .*nowhere is no folder: make it, or name another"):
        retained(open_run(folder), str(tmp_path / "nowhere"))


def test_a_studys_stages_are_the_means_of_its_runs(tmp_path):
    cells = {"a": [[100, 80], [50, 0]], "b": [[100, 60], [30, 20]], "c": [[100, 80], [90, 70]]}  # base, one stage
    runs = {}
    for name, rows in cells.items():
        (tmp_path / name / "retained").mkdir(parents=True)
        matrix = pd.DataFrame(rows, index=["base", "01-GQA"], columns=["count", "read"])
        matrix.to_csv(tmp_path / name / "retained" / "matrix.csv", index_label="stage")
        runs[name] = SimpleNamespace(name=name, folder=tmp_path / name)
    joint = pd.read_csv(tmp_path / "c" / "retained" / "matrix.csv", index_col="stage")
    joint.index = ["base", "01-multi_task"]
    (tmp_path / "d" / "retained").mkdir(parents=True)
    joint.to_csv(tmp_path / "d" / "retained" / "matrix.csv", index_label="stage")
    zero_shot, joint = (SimpleNamespace(name=name, folder=tmp_path / name) for name in "ed")
    methods = {"Zero-shot": [zero_shot], "LoRA": [runs["a"], runs["b"]], "LLaCA": [runs["c"]], "Multi-task": [joint]}
    write_stages(methods, tmp_path)
    assert (tmp_path / "retained.md").read_text().splitlines() == [
        "| Method | base | 01-GQA | 01-multi_task |",
        "| --- | ---: | ---: | ---: |",
        "| LoRA (n=2) | 85.0 ± 7.1 | 25.0 ± 0.0 | - |",
        "| LLaCA (n=1) | 90.0 | 80.0 | - |",
        "| Multi-task (n=1) | 90.0 | - | 80.0 |",
    ]
    found = pd.read_csv(tmp_path / "retained.csv")
    assert len(found) == 16
    assert found[(found.run == "b") & (found.stage == "01-GQA")].accuracy.tolist() == [30, 20]
