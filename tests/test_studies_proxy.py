"""The proxy stream and the bandit that chooses a setting on it."""

import json
import math

import pytest
from test_llaca_train import arguments, mini  # noqa: F401

from data.check import check_benchmark
from llaca.config import load_recipe
from studies import proxy


@pytest.mark.parametrize("task", ["ScienceQA", "Grounding", "VQAv2"])
def test_the_proxy_stream_divides_the_first_tasks_training_records(arguments, mini, tmp_path, task):  # noqa: F811
    """Every record once, no answer in both tasks, nothing of another file; the check finds nothing."""
    recipe = load_recipe([*arguments, "--method", "lora", "--tasks", task, "TextVQA"])
    proxy.write_proxy(recipe, tmp_path / "proxy", seed=1)
    report = check_benchmark(tmp_path / "proxy", "original", list(proxy.TASKS))
    assert report.ok
    whole = json.loads((mini / "Instructions" / task / "train.json").read_text())
    ids, answers = [], []
    for own in proxy.TASKS:
        trained, asked = (json.loads((tmp_path / "proxy" / own / f"{k}.json").read_text()) for k in ("train", "test"))
        ids += [record["id"] for record in trained] + [record["question_id"] for record in asked]
        said = {record["conversations"][1]["value"] for record in trained}
        answers.append(said | {record.get("answer", record.get("answer_bbox")) for record in asked})
        assert len(asked) == max(1, round(0.1 * (len(asked) + len(trained)))) and "<image>" not in asked[0]["text"]
    assert sorted(ids) == sorted(record["id"] for record in whole) and not answers[0] & answers[1]
    with pytest.raises(ValueError, match="all have one answer"):
        proxy.halves(whole[:1], 0)


def test_exp3_favours_what_scored_better(arguments, tmp_path, monkeypatch, capsys):  # noqa: F811
    """The trainings replaced by known scores; weights and chances by the formula, written out."""
    scores, drawn = {"0.1": 90.0, "10": 10.0}, []

    def trained(lines, side_by_side):
        drawn.append(lines[0][lines[0].index("--penalty") + 1])
        return 0

    monkeypatch.setattr(proxy, "run_all", trained)
    for name in ("open_run", "answer_share", "merge_parts"):
        monkeypatch.setattr(proxy, name, lambda *given: given[0])
    monkeypatch.setattr(proxy, "score_run", lambda folder: {"Avg.ACC": scores[drawn[-1]]})
    line = ["--recipe", arguments[1], "--method", "l2", "--setting", "penalty", "--values", "0.1", "10"]
    proxy.main([*line, "--trials", "12", "--out", str(tmp_path / "proxy"), "--lora_rank", "2"])
    weights = {"0.1": 1.0, "10": 1.0}
    for value in drawn:
        chance = 0.7 * weights[value] / sum(weights.values()) + 0.15
        weights[value] *= math.exp(0.3 * scores[value] / 100 / (2 * chance))
    told = capsys.readouterr().out.splitlines()
    chances = {value: 0.7 * weight / sum(weights.values()) + 0.15 for value, weight in weights.items()}
    assert told[-2] == f"probabilities: 0.1 {chances['0.1']:.2f}, 10 {chances['10']:.2f}"
    assert set(drawn) == {"0.1", "10"} and drawn.count("0.1") > 6
    assert told[-1].endswith("--method l2 --penalty 0.1 --lora_rank 2")


@pytest.mark.slow
def test_a_value_is_chosen_by_real_trials_and_goes_on_where_it_was(arguments, tmp_path, capsys):  # noqa: F811
    line = ["--recipe", arguments[1], "--method", "l2", "--setting", "penalty", "--values", "0.01", "10"]
    line += ["--trials", "2", "--out", str(tmp_path / "proxy")]
    proxy.main(line)
    first = capsys.readouterr().out
    assert first.count("Avg.ACC") == 2 and "bash train_continual.sh" in first
    proxy.main(line)
    trials = [[t for t in out.splitlines() if t.startswith("trial")] for out in (first, capsys.readouterr().out)]
    assert trials[0] == trials[1]
