"""Answer files: batches, processes and kills change no answer; cells, parts and what is wrong with them."""

import gc
import json
import os
import re
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from data.mini import build
from eval.metrics import forward_transfer
from eval.predict import Answerer, answer_share, merge_parts, share_of
from eval.report import main as report
from eval.runs import BASE, open_run
from eval.score import QuestionSet, legacy_accuracy, read_answers
from llaca.config import load_recipe
from llaca.train import run

ROOT = Path(__file__).parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_base):
    """A folder with a run of three stages, in two groups, of a random base."""
    folder = tmp_path_factory.mktemp("predict")
    build_in(folder / "mini", {"train": 16, "dev": 4, "test": 7})
    line = ["--base", str(tiny_base), "--data-root", str(folder / "mini"), "--tasks", "ScienceQA", "TextVQA", "GQA"]
    line += ["--lora_rank", "4", "--max_new_tokens", "4", "--epochs", "1", "--runs-dir", str(folder / "runs")]
    run(load_recipe([*line, "--method", "llaca", "--learning_rate", "1e-2", "--run", "r"]))
    return folder / "runs"


def build_in(folder: Path, sizes: dict[str, int]) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "SIZES", sizes)
        build.build(folder)
    return folder


def copy_of(runs: Path, tmp_path: Path) -> Path:
    subprocess.run(["cp", "-r", str(runs / "r"), str(tmp_path / "r")], check=True)
    return tmp_path / "r"


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("answers/**/*"))
            if path.is_file()}  # fmt: skip


def predict(runs: Path, processes: int, name: str = "r", *flags: str) -> list[str]:
    """The command of several processes that answer a run."""
    start = [*TORCHRUN, str(processes), "-m", "--"] if processes > 1 else [sys.executable, "-m"]
    return [*start, "eval.predict", "--runs-dir", str(runs), "--run", name, *flags]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_shares_make_the_same_files(trained, tmp_path, world):
    folder = copy_of(trained, tmp_path)
    for rank in reversed(range(world)):  # whoever comes first
        answer_share([open_run(folder)], rank, world, 4)
    merge_parts([open_run(folder)])
    whole = tmp_path / "whole"
    whole.mkdir()
    single = copy_of(trained, whole)
    answer_share([open_run(single)], 0, 1, 1)
    merge_parts([open_run(single)])
    assert files(folder) == files(single)
    assert [path for path in files(folder) if ".part" in path] == []
    asked = json.loads((trained.parent / "mini/Instructions/GQA/test.json").read_text())
    rows = [json.loads(line) for line in (folder / "answers/03-GQA/GQA.jsonl").read_text().splitlines()]
    assert [row["question_id"] for row in rows] == [record["question_id"] for record in asked]


def test_a_killed_share_goes_on_with_another_number_of_processes(trained, tmp_path):
    folder = copy_of(trained, tmp_path)
    answer_share([open_run(folder)], 0, 2, 1)  # the other process never came
    [part] = folder.glob("answers/03-GQA/GQA.jsonl.part-*")
    kept = part.read_bytes()
    part.write_bytes(kept[: len(kept) // 2] + b"\xc3")  # killed in the middle of a line, and of a character
    left = part.read_bytes().count(b"\n")
    assert 0 < left < kept.count(b"\n")
    with pytest.raises(ValueError, match=r"ScienceQA\.jsonl: of 7 questions 3 have no answer"):
        merge_parts([open_run(folder)])
    for rank in range(3):
        answer_share([open_run(folder)], rank, 3, 2)
    rows = [
        json.loads(line) for p in folder.glob("answers/03-GQA/GQA.jsonl.part-*") for line in p.read_text().splitlines()
    ]
    assert len(rows) == len({row["question_id"] for row in rows}) == 7, "what was answered is not answered again"
    merge_parts([open_run(folder)])
    again = tmp_path / "again"
    again.mkdir()
    whole = copy_of(trained, again)
    answer_share([open_run(whole)], 0, 1, 4)
    merge_parts([open_run(whole)])
    assert files(folder) == files(whole)


def test_doubled_and_unknown_answers_are_named(trained, tmp_path):
    folder = copy_of(trained, tmp_path)
    answer_share([open_run(folder)], 0, 1, 4)
    part = folder / "answers/03-GQA/GQA.jsonl.part-0"
    first = part.read_text().splitlines()[0]
    part.with_name("GQA.jsonl.part-1").write_text(first + "\n")
    with pytest.raises(ValueError, match=r"GQA\.jsonl: of 7 questions 0 have no answer \(\), 1 have two \(GQA-"):
        merge_parts([open_run(folder)])
    part.with_name("GQA.jsonl.part-1").write_text(first.replace("GQA-", "Cooking-") + "\n")
    with pytest.raises(ValueError, match="1 are unknown \\(Cooking-"):
        merge_parts([open_run(folder)])


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_questions_about_a_picture_are_answered_by_one_process(world):
    """As in CoIN: a few pictures with many questions, many with five or six, and questions without any."""
    draw = np.random.default_rng(0)
    images = [Path(f"a{i}") for i in range(9) for _ in range(31)] + [Path(f"b{i}") for i in range(40) for _ in range(6)]
    images = [images[i] for i in draw.permutation(len(images))] + [None] * 50
    shares = [share_of(images, rank, world) for rank in range(world)]
    assert sorted(number for share in shares for number in share) == list(range(len(images)))
    asked = [{images[number] for number in share} - {None} for share in shares]
    assert sum(map(len, asked)) == len(set().union(*asked)) == 49
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert max(map(len, asked)) - min(map(len, asked)) <= 7, "a picture costs more than a question"


def test_runs_of_one_benchmark_hold_its_questions_once(trained, tmp_path):
    """However many runs a table has, their questions are the same objects, whose columns are mapped from one file."""
    runs = []
    for name in "ab":
        (tmp_path / name).mkdir()
        runs.append(open_run(copy_of(trained, tmp_path / name), cells="final"))
    for task in runs[0].tasks:
        assert runs[0].questions[task] is runs[1].questions[task] and len(runs[0].questions[task]) == 7
    answer_share(runs, 0, 1, 8)
    merge_parts(runs)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    other = build_in(tmp_path / "other", {"train": 16, "dev": 4, "test": 5})
    recipe = yaml.safe_load((tmp_path / "b/r/recipe.yaml").read_text())
    (tmp_path / "b/r/recipe.yaml").write_text(yaml.safe_dump(recipe | {"data_root": str(other)}))
    assert len(open_run(tmp_path / "b/r").questions["GQA"]) == 5


def test_a_picture_that_cannot_be_opened_is_named_with_its_record(trained, tmp_path):
    """Everything else that was asked with it is kept; mended, evaluation goes on, and the files are those of before."""
    data = build_in(tmp_path / "mini", {"train": 16, "dev": 4, "test": 7})
    folder = copy_of(trained, tmp_path)
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe |= {"data_root": str(data), "reuse_vision_features": False}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    record = json.loads((data / "Instructions/GQA/test.json").read_text())[3]
    [picture] = data.rglob(record["image"])
    assert len(open_run(folder).questions["GQA"]) == 7, "the pictures have been looked at: they were whole then"
    whole = picture.read_bytes()
    picture.write_bytes(whole[: len(whole) // 2])
    message = rf"GQA/test\.json: record 3 \(question_id '{record['question_id']}'\): .*{picture.name} cannot be read"
    with pytest.raises(OSError, match=message):
        answer_share([open_run(folder)], 0, 1, 8)
    [part] = folder.glob("answers/03-GQA/GQA.jsonl.part-0")
    assert part.read_text().count("\n") == 6
    picture.write_bytes(whole)
    answer_share([open_run(folder)], 0, 1, 8)
    merge_parts([open_run(folder)])
    (tmp_path / "whole").mkdir()
    single = copy_of(trained, tmp_path / "whole")
    answer_share([open_run(single)], 0, 1, 1)
    merge_parts([open_run(single)])
    assert files(folder) == files(single)


@pytest.mark.slow
def test_a_process_that_fails_ends_the_others(trained, tmp_path):
    """The second process meets the picture; the first would wait two days for it."""
    data = build_in(tmp_path / "mini", {"train": 16, "dev": 4, "test": 7})
    folder = copy_of(trained, tmp_path)
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe |= {"data_root": str(data), "reuse_vision_features": False}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    number = share_of(open_run(folder).questions["GQA"].shown, 1, 2)[0]
    record = json.loads((data / "Instructions/GQA/test.json").read_text())[number]
    [picture] = data.rglob(record["image"])
    picture.write_bytes(picture.read_bytes()[:100])  # after it was looked at
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        predict(tmp_path, 2), capture_output=True, text=True, timeout=300, env=environment, cwd=ROOT, check=False
    )
    assert done.returncode != 0 and f"record {number} (question_id '{record['question_id']}')" in done.stderr
    assert not list(folder.glob("answers/**/*.jsonl")) and list(folder.glob("answers/*/GQA.jsonl.part-1"))


def test_merged_answers_are_counted_beside_others(trained, capsys, monkeypatch):
    from benchmarks import merged_answers

    monkeypatch.setattr(merged_answers, "WIDTHS", (64,))
    line = ["merged_answers", "--run", str(trained / "r"), "--stage", "03-GQA", "--questions", "6"]
    monkeypatch.setattr(sys, "argv", line)
    merged_answers.main()
    printed = capsys.readouterr().out
    assert "6 questions of ScienceQA, TextVQA, GQA" in printed and len(re.findall(r"^\| 64 \|", printed, re.M)) == 2
    assert re.search(r"\| float32 \| 0 \| \d \|", printed)


def test_which_cells_are_answered(trained, tmp_path):
    def rows(cells):
        return [(stage, sorted(row)) for stage, row in open_run(trained / "r", cells=cells).rows]

    science, text, gqa = "01-ScienceQA", "02-TextVQA", "03-GQA"
    everything = ["GQA", "ScienceQA", "TextVQA"]
    assert rows("final") == [(science, []), (text, []), (gqa, everything)]
    assert rows("diagonal") == [(science, ["ScienceQA"]), (text, ["TextVQA"]), (gqa, everything)]
    assert rows("triangle") == [(science, ["ScienceQA"]), (text, ["ScienceQA", "TextVQA"]), (gqa, everything)]
    assert rows("next") == [(science, ["ScienceQA", "TextVQA"]), (text, everything), (gqa, everything)]
    assert rows("full") == [(stage, everything) for stage in (BASE, science, text, gqa)]


def test_full_cells_give_the_zero_shot_row_and_fwt(trained, tmp_path, capsys):
    folder = copy_of(trained, tmp_path)
    report(["--runs-dir", str(tmp_path), "--cells", "full"])
    assert "FWT" in capsys.readouterr().out
    whole = pd.read_csv(folder / "matrix_full.csv", index_col="stage")
    assert list(whole.index) == [BASE, "01-ScienceQA", "02-TextVQA", "03-GQA"] and not whole.isna().any().any()
    triangle = pd.read_csv(folder / "matrix.csv", index_col="stage")
    expected = whole.iloc[1:].where(np.tri(3, dtype=bool))
    pd.testing.assert_frame_equal(triangle, expected)
    metrics = json.loads((folder / "metrics.json").read_text())
    by_hand = (whole.loc["01-ScienceQA", "TextVQA"] - whole.loc[BASE, "TextVQA"]) / 2
    by_hand += (whole.loc["02-TextVQA", "GQA"] - whole.loc[BASE, "GQA"]) / 2
    assert metrics["FWT"] == pytest.approx(by_hand)
    assert metrics["FWT"] == pytest.approx(forward_transfer(whole.iloc[1:].to_numpy(), whole.loc[BASE].to_numpy()))
    each = pd.read_csv(folder / "scores/03-GQA/GQA.csv", index_col="question_id")
    assert list(each) == ["official", "legacy", "lenient"] and len(each) == 7
    assert 100 * each["official"].mean() == pytest.approx(whole.loc["03-GQA", "GQA"])
    report(["--runs-dir", str(tmp_path), "--cells", "final"])
    assert json.loads((folder / "metrics.json").read_text())["New.ACC"] is None


def test_tables_of_the_released_evaluators_scores(trained, tmp_path, capsys):
    """Answers that are official 0 and legacy 1: a longer name, a letter in running text."""
    folder = copy_of(trained, tmp_path)
    for cell in open_run(folder).missing():
        answer_share([open_run(folder)], 0, 1, 8)
        file = open_run(folder).answer_file(*cell)
        part = file.with_name(f"{file.name}.part-0")
        rows = [json.loads(line) | {"text": "It is a picture, A I think"} for line in part.read_text().splitlines()]
        part.write_text("".join(json.dumps(row) + "\n" for row in rows))
    merge_parts([open_run(folder)])
    report(["--runs-dir", str(tmp_path), "--scoring", "legacy"])
    assert "Scoring: legacy, as the released evaluators do" in capsys.readouterr().out
    assert not (folder / "matrix.csv").exists(), "that is where the official ones stand"
    legacy = pd.read_csv(folder / "legacy" / "matrix.csv", index_col="stage")
    report(["--runs-dir", str(tmp_path)])
    assert "Scoring: official, the rule of each benchmark" in capsys.readouterr().out
    official = pd.read_csv(folder / "matrix.csv", index_col="stage")
    data = trained.parent / "mini"
    for holder, task in (("01-ScienceQA", "ScienceQA"), ("03-GQA", "GQA")):
        rows = read_answers(folder / "answers" / holder / f"{task}.jsonl")
        assert legacy.loc["03-GQA", task] == pytest.approx(legacy_accuracy(rows, QuestionSet(data, task)))
    assert official.loc["03-GQA", "ScienceQA"] == 0 < legacy.loc["03-GQA", "ScienceQA"]
    official_average, legacy_average = (
        json.loads((place / "metrics.json").read_text())["Avg.ACC"] for place in (folder, folder / "legacy")
    )
    assert legacy_average == pytest.approx(legacy.iloc[-1].mean()) and legacy_average > official_average


def test_a_process_that_answers_holds_the_base_and_one_copy(trained, tmp_path, monkeypatch):
    folder, held, give = copy_of(trained, tmp_path), [], Answerer.model

    def watched(answerer, run, holder):
        gc.collect()
        assert not [name for name, model in held if model() is not None], "the copy before is still in memory"
        model = give(answerer, run, holder)
        held.append((holder, weakref.ref(model)))
        return model

    monkeypatch.setattr(Answerer, "model", watched)
    answer_share([open_run(folder)], 0, 1, 4)
    assert len(held) == len({name for name, _ in held}) > 1


def test_runs_of_one_row_are_told_apart_from_those_of_another(trained, tmp_path):
    """The runs behind a table, and the notes, are named as its rows are."""
    folder = copy_of(trained, tmp_path)
    subprocess.run(["cp", "-r", str(folder), str(tmp_path / "other")], check=True)
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    (tmp_path / "other" / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"learning_rate": 0.5}))
    report(["--runs-dir", str(tmp_path)])
    behind, table = (pd.read_csv(tmp_path / "tables" / f"{name}.csv", comment="#") for name in ("runs", "table"))
    assert len(set(behind["method"])) == 2 and set(behind["method"]) < set(table["method"])
    notes = (tmp_path / "tables" / "table.txt").read_text()
    assert notes.count("beta fell back in") == 2 and "learning rates 0.5 and" in notes


def test_runs_that_cannot_be_compared_stand_apart_and_the_heads_say_why(trained, tmp_path, capsys):
    """And the smaller limit of an answer's length holds, the recipe's or the benchmark's."""
    folder = copy_of(trained, tmp_path)
    subprocess.run(["cp", "-r", str(folder), str(tmp_path / "other")], check=True)
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    other = recipe | {"epochs": 7.0, "max_new_tokens": 2000}
    (tmp_path / "other" / "recipe.yaml").write_text(yaml.safe_dump(other))
    assert [open_run(tmp_path / "other").answer_limit(task) for task in ("ScienceQA", "GQA")] == [1024, 128]
    assert open_run(folder).answer_limit("ScienceQA") == 4
    (tmp_path / "other" / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"epochs": 7.0}))
    report(["--runs-dir", str(tmp_path)])
    heads = [row for row in capsys.readouterr().out.splitlines() if row.startswith("Runs that differ in these")]
    assert [row.partition(": ")[2] for row in heads] == ["epochs 7.0", "epochs 1.0"]
    names = sorted(path.name for path in (tmp_path / "tables").iterdir())
    assert len(names) == 2 and all(name.startswith("mini-") for name in names)


@pytest.mark.slow
def test_batches_processes_and_kills_change_no_answer_of_coin_mini(tmp_path):
    """All eight test sets, the shipped base: one at a time by two processes, in batches by one, and in batches by one
    that is killed and by two that go on."""
    build_in(tmp_path / "mini", {"train": 8, "dev": 4, "test": 20})
    runs, environment = tmp_path / "runs", {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for name in ("single", "batched", "killed"):
        line = [
            "--method",
            "zero_shot",
            "--data-root",
            str(tmp_path / "mini"),
            "--base",
            str(ROOT / "checkpoints/tiny-llava"),
        ]
        run(load_recipe([*line, "--runs-dir", str(runs), "--run", name]))

    def go(line):
        subprocess.run(line, check=True, capture_output=True, env=environment, cwd=ROOT)

    go(predict(runs, 2, "single", "--batch-size", "1"))
    go(predict(runs, 1, "batched"))
    process = subprocess.Popen(
        predict(runs, 1, "killed"), env=environment, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while len(list((runs / "killed").rglob("*.part-0"))) < 3 and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert list((runs / "killed").rglob("*.part-0")) and not list((runs / "killed").rglob("*.jsonl"))
    go(predict(runs, 2, "killed"))
    single = files(runs / "single")
    assert len(single) == 8 and sum(content.count(b"\n") for content in single.values()) == 160
    assert len({json.loads(line)["text"] for content in single.values() for line in content.splitlines()}) > 50
    for name in ("batched", "killed"):
        assert files(runs / name) == single, name
