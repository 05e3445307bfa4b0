"""Natural Instructions' schema becomes a benchmark, whose answers are scored by ROUGE-L."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from data.benchmark import open_benchmark
from data.check import check
from data.prepare import instructions
from data.prepare.instructions import STREAMS, main, prompt, rows_of
from data.records import instruction_of, load_samples
from eval.tasks import task_of
from eval.tasks.rouge import rouge_l

INSTRDIALOG = list(open_benchmark(".", STREAMS["instrdialog"].description).tasks)


def write_tasks(folder: Path, count: int = 120) -> Path:
    """Task files of made-up dialogues, one of them with several right outputs."""
    rng = random.Random(0)
    folder.mkdir()
    for number, task in enumerate(INSTRDIALOG):
        instances = [
            {
                "id": f"{task}-{i}",
                "input": f"A: {rng.choice('pqrs')} {i}?",
                "output": ["yes", "Yes, it is"][: 1 + i % 2],
            }
            for i in range(count)
        ]
        content = {
            "Definition": [f"In this task\nyou answer question number {number}"],
            "Positive Examples": [{"input": "A: hi", "output": "hello", "explanation": "polite"}] * 3,
            "Instances": instances,
        }
        (folder / f"{task}.json").write_text(json.dumps(content))
    return folder


def test_a_stream_is_written_checked_and_scored(tmp_path):
    source, root = write_tasks(tmp_path / "tasks"), tmp_path / "root"
    main(["--source", str(source), "--root", str(root)])
    benchmark = open_benchmark(root)
    assert list(benchmark.tasks) == INSTRDIALOG and benchmark.stream("order1") == INSTRDIALOG
    assert all(sorted(benchmark.stream(f"order{number}")) == sorted(INSTRDIALOG) for number in (1, 2, 3))
    assert benchmark.stream("order2")[1] == "task1603_smcalflow_sentence_generation"
    assert benchmark.stream("order3")[0] == "task1713_convai3_sentence_generation"
    report = check(benchmark, "original")
    assert report.ok and report.records == 19 * (20 + 50)
    folder = benchmark.folder("original", INSTRDIALOG[0])
    train, test, dev = (json.loads((folder / f"{split}.json").read_text()) for split in ("train", "test", "dev"))
    assert [row["question_id"] for row in test] == [f"{INSTRDIALOG[0]}-{i}" for i in range(50)]
    assert [row["question_id"] for row in dev] == [f"{INSTRDIALOG[0]}-{i}" for i in range(50, 100)]
    assert {row["id"] for row in train} == {f"{INSTRDIALOG[0]}-{i}" for i in range(100, 120)}
    assert test[1]["answers"] == ["yes", "Yes, it is"]
    [sample] = load_samples(folder / "train.json", root)[:1]
    assert instruction_of(sample.turns[0][0], "first line") == "Definition: In this task you answer question number 0"
    task = task_of(root, INSTRDIALOG[0])
    reference = task.load_references(root)[f"{INSTRDIALOG[0]}-1"]
    assert task.official("yes it is.", reference) == 1.0 and task.official("no", reference) == 0.0
    before = {path: path.read_bytes() for path in root.rglob("*.json")}
    main(["--source", str(source), "--root", str(root)])
    assert before == {path: path.read_bytes() for path in root.rglob("*.json")}
    with pytest.raises(SystemExit, match="is there with other content; move it away or pass --overwrite"):
        main(["--source", str(source), "--root", str(root), "--examples", "0"])


def test_the_prompt_is_tk_instructs():
    """Definition, examples, input, each ended by a punctuation mark."""
    found = prompt("Say  what\ncomes next", [("hi", "hello"), ("bye!", "see you")], "A: well")
    assert found == (
        "Definition: Say what comes next.\n\n"
        "Positive Example 1 -\nInput: hi.\nOutput: hello.\n\n"
        "Positive Example 2 -\nInput: bye!\nOutput: see you.\n\n"
        "Now complete the following example -\nInput: A: well.\nOutput:"
    )


def test_at_most_five_hundred_are_trained_on_and_the_seed_draws_them(tmp_path):
    source = write_tasks(tmp_path / "tasks", 700) / f"{INSTRDIALOG[3]}.json"
    one, again, other = (rows_of(INSTRDIALOG[3], source, STREAMS["instrdialog"], 2, seed) for seed in (0, 0, 1))
    assert len(one["train"]) == 500 and one == again
    assert one["test"] == other["test"] and one["train"] != other["train"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda task: task.update(Definition=[]), "'Definition' should be a text"),
        (lambda task: task["Instances"][3].update(output=[]), "instance 3: 'output' must be a text or a list of texts"),
        (lambda task: task["Instances"][3].update(input=" "), "instance 3: 'input' should be a text"),
        (lambda task: task.update(Instances=task["Instances"][:100]), "100 instances with an output are not enough"),
        (lambda task: task["Positive Examples"][1].pop("output"), "positive example 1: 'output' is missing"),
    ],
)
def test_what_is_broken_is_named_and_nothing_is_written(tmp_path, change, message):
    source = write_tasks(tmp_path / "tasks")
    file = source / f"{INSTRDIALOG[7]}.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    with pytest.raises(SystemExit, match=message) as error:
        main(["--source", str(source), "--root", str(tmp_path / "root")])
    assert file.name in str(error.value) and not (tmp_path / "root").exists()
    file.unlink()
    with pytest.raises(SystemExit, match=rf"{file.name} cannot be read: no such file"):
        main(["--source", str(source), "--root", str(tmp_path / "root")])


def test_rouge_l_against_counted_words():
    """Longest common subsequence by hand, words without their endings; the nearest reference counts."""
    assert rouge_l("the cat runs", ["The cats are running"]) == pytest.approx(2 * 3 / (3 + 4))
    assert rouge_l("a b c d", ["a x b d"]) == pytest.approx(3 / 4)
    assert rouge_l("yes", ["no", "Yes."]) == 1.0
    assert rouge_l("", ["yes"]) == 0.0 and rouge_l("狗", ["狗"]) == 0.0


def test_the_command_is_the_module(tmp_path):
    line = [sys.executable, "-m", "data.prepare.instructions", "--source", str(tmp_path), "--root", str(tmp_path / "r")]
    done = subprocess.run(line, capture_output=True, text=True, cwd=Path(instructions.__file__).parents[2])
    assert done.returncode == 1 and "task848_pubmedqa_classification.json cannot be read" in done.stderr


def test_every_stream_can_be_described():
    counts = {name: len(open_benchmark(".", stream.description).tasks) for name, stream in STREAMS.items()}
    assert counts == {"instrdialog": 19, "instrdialog_first": 100, "dialog_mini": 8}
    first = open_benchmark(".", STREAMS["instrdialog_first"].description).tasks
    assert not set(first) & set(INSTRDIALOG), "what is learnt before is not the stream"
