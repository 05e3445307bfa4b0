"""Differences between rows and how sure they are, against scipy's paired test and a normal approximation."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from test_llaca_train import mini  # noqa: F401

from eval.intervals import differences, over_questions, over_seeds
from eval.overlap import answer_overlap, correlation, kept
from eval.run_statistics import blind_notes
from eval.runs import EvaluatedRun
from eval.tasks import task_of
from llaca.config import load_recipe

METRICS = ("Avg.ACC", "Forgetting", "New.ACC")


def scored(folder: Path, seed: int, scores: dict[str, list[float]], scoring: str = "official") -> SimpleNamespace:
    """A run that stands evaluated in `folder`, of one answer file a task."""
    for task, values in scores.items():
        path = folder / str(seed) / "scores" / "last" / f"{task}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        frame = pd.DataFrame({"question_id": [f"0{n}" for n in range(len(values))], "official": values})
        frame.sample(frac=1, random_state=seed).to_csv(path, index=False)  # in whatever order
    rows = [("last", dict.fromkeys(scores, "last"))]
    return SimpleNamespace(
        folder=folder / str(seed), split="test", scoring=scoring, seed=seed, tasks=list(scores), rows=rows
    )


def test_over_seeds_is_scipys_paired_t():
    a, b = [67.2, 65.1, 69.0], [57.9, 60.0, 55.5]
    wanted = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert over_seeds(np.subtract(a, b)) == pytest.approx((wanted.low, wanted.high))
    assert over_seeds([3.0]) is None


def test_over_questions_pairs_them_and_knows_their_number(tmp_path):
    """Two tasks of 400 and 50 questions, two seeds: the normal approximation's standard error, not that of unpaired."""
    rng = np.random.default_rng(0)
    hard = {"A": rng.random(400), "B": rng.random(50)}  # what both rows have in common
    rows = {}
    for label, skill in (("one", 0.6), ("other", 0.4)):
        rows[label] = [
            scored(tmp_path / label, seed, {t: ((h + 0.1 * rng.random(len(h))) < skill).astype(float).tolist()
                                            for t, h in hard.items()})
            for seed in (0, 1)
        ]  # fmt: skip
    apart = []
    for task in hard:
        by_seed = []
        for seed in (0, 1):
            one, other = (
                pd.read_csv(tmp_path / label / f"{seed}/scores/last/{task}.csv", dtype={"question_id": str})
                .set_index("question_id").sort_index()["official"]
                for label in ("one", "other")
            )  # fmt: skip
            by_seed.append(100 * (one - other))
        apart.append(np.mean(by_seed, axis=0))
    mean = np.mean([d.mean() for d in apart])
    error = np.sqrt(sum(d.var(ddof=1) / len(d) for d in apart)) / 2
    found = over_questions(rows["one"], rows["other"])
    assert found == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.4)
    assert over_questions(rows["one"], rows["one"]) == (0, 0)
    assert over_questions(rows["one"], rows["other"]) == found, "the same draws every time"
    assert over_questions(rows["one"][:1], rows["other"][1:]) is None, "no seed in common"
    for run in rows["one"]:
        run.scoring = "legacy"
    assert over_questions(rows["one"], rows["other"]) is None


def test_differences_are_taken_seed_by_seed(tmp_path):
    rows = [("A", 0, 50.0), ("A", 1, 60.0), ("A", 2, 99.0), ("B", 1, 50.0), ("B", 0, 44.0)]
    behind = pd.DataFrame(
        [{"method": m, "seed": s, "Avg.ACC": v, "Forgetting": -v, "New.ACC": v / 2} for m, s, v in rows]
    )
    runs = {m: [scored(tmp_path / m, s, {"T": [1.0, 0.0]}) for k, s, _ in rows if k == m] for m in "AB"}
    line = differences(behind, {"what": ["A", "B"]}, runs, METRICS).splitlines()[2]
    assert line == "| what | A - B | +8.0 ± 2.8 | -8.0 ± 2.8 | +4.0 ± 1.4 | 2 | -17.4 to +33.4 | +0.0 to +0.0 |"


def test_one_seed_has_no_spread(tmp_path):
    behind = pd.DataFrame({"method": ["A", "B"], "seed": 0, "Avg.ACC": [3.0, 1], "Forgetting": 2.0, "New.ACC": 1.0})
    runs = {m: [scored(tmp_path / m, 0, {"T": [0.5, 0.5]})] for m in "AB"}
    line = differences(behind, {"what": ["A", "B"]}, runs, METRICS).splitlines()[2]
    assert line == "| what | A - B | +2.0 | +0.0 | +0.0 | 1 | - | +0.0 to +0.0 |"


def test_a_method_that_learns_no_more_than_the_majority_is_told():
    metrics = {
        "a": {"learnt": {"GQA": 40.0, "VQAv2": 20.0}},
        "b": {"learnt": {"GQA": 50.0, "VQAv2": 30.0}},
        "base": {},
    }
    behind = pd.DataFrame({"method": ["LoRA", "LoRA", "Zero-shot"], "run": ["a", "b", "base"]})
    [note] = blind_notes(behind, metrics, {"GQA": 44.0, "VQAv2": 25.0})
    assert note.startswith("LoRA: no better than the question-only majority right after the task's own stage, 1 of 2")
    assert "VQAv2 25.0 (majority 25.0)" in note and "GQA" not in note
    assert not blind_notes(behind, metrics, {"GQA": 44.0, "VQAv2": 24.0})


def test_overlap_is_what_another_tasks_answers_would_score(mini, tmp_path):  # noqa: F811
    """GQA's is exact match, so that its column is a share of words; what is left by hand, the correlation by numpy."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"base: none\ndata_root: {mini}\ntasks: [ScienceQA, GQA, VQAv2]\n")
    recipe = load_recipe(["--recipe", str(recipe), "--method", "lora"])
    found = answer_overlap(EvaluatedRun(tmp_path, recipe, [], "test"))
    words = {}
    for task in ("ScienceQA", "GQA", "VQAv2"):
        records = json.loads(task_of(mini, task).train_file(mini, "original").read_text())
        turns = [turn["value"] for record in records for turn in record["conversations"] if turn["from"] == "gpt"]
        words[task] = {answer.lower() for answer in turns}
    asked = task_of(mini, "GQA").read_references(mini, "original", "test").asked
    right = [entry.reference.answer.lower() for entry in asked.values()]
    for task, known in words.items():
        assert found.loc[task, "GQA"] == pytest.approx(100 * np.mean([word in known for word in right]))
    assert found.loc["ScienceQA", "GQA"] < found.loc["GQA", "GQA"]
    A = np.array([[80, np.nan, np.nan], [40, 60, np.nan], [0, 30, 70]])
    cells = kept(A, ["ScienceQA", "GQA", "VQAv2"], found)
    assert [left for _, left in cells] == [0.5, 0.0, 0.5]
    ranks = [np.argsort(np.argsort(values)) for values in ([1.0, 2.0, 4.0], [3.0, 9.0, 5.0])]
    assert correlation([(1, 3), (2, 9), (4, 5)]) == pytest.approx(np.corrcoef(*ranks)[0, 1])
