"""Which questions count, what is wrong with their references, and what an unchecked run leaves out."""

import json
from pathlib import Path

import pytest

from data.benchmark import open_benchmark
from eval.report import main as report
from eval.score import QuestionSet, majority, majority_score, score_task
from eval.tasks import TASKS, task_of
from llaca.config import load_recipe
from llaca.train import run

ANNOTATED = ("ScienceQA", "TextVQA", "GQA")


def write(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def annotate(root: Path, task: str, n: int) -> None:
    """Official annotation files of `n` questions with the ids "0", "1", ...: the answers are B, stop and red."""
    images = root / "cl_dataset" / task
    if task == "ScienceQA":
        write(images / "pid_splits.json", {"test": [str(i) for i in range(n)]})
        write(images / "problems.json", {str(i): {"choices": ["x", "y"], "answer": 1} for i in range(n)})
    if task == "TextVQA":
        entries = [{"question_id": i, "answers": ["stop"] * 10} for i in range(n)]
        write(images / "TextVQA_0.5.1_val.json", {"data": entries})
    if task == "GQA":
        entry = {"answer": "red", "isBalanced": True, "types": {"structural": "query"}, "groups": {"global": None}}
        write(images / "testdev_balanced_questions.json", dict.fromkeys(map(str, range(n)), entry))


RIGHT = {"ScienceQA": "B", "TextVQA": "stop", "GQA": "red"}


def ask(root: Path, task: str, ids) -> Path:
    """The task's question file."""
    records = [{"question_id": i, "text": "q"} for i in ids]
    return write(root / "Instructions" / task / TASKS[task].spec.test, records)


def right_answers(task: str, ids) -> list[dict]:
    return [{"question_id": i, "text": RIGHT[task]} for i in ids]


# --- questions that are never asked ---


@pytest.mark.parametrize("task", ANNOTATED)
def test_questions_that_are_never_asked_count_nowhere(tmp_path, task):
    annotate(tmp_path, task, 250)
    ask(tmp_path, task, range(20))
    score = score_task(right_answers(task, range(20)), QuestionSet(tmp_path, task))
    assert (score.n, score.missing, score.left_out) == (20, 0, 0)
    assert score.accuracy["official"] == score.accuracy["lenient"] == score.format_rate == 100
    # The released evaluator of ScienceQA divides by the whole split, the others by the answers.
    assert score.accuracy["legacy"] == (8 if task == "ScienceQA" else 100)
    assert list(score.per_question) == [str(i) for i in range(20)]
    without = score_task(right_answers(task, range(15)), QuestionSet(tmp_path, task))
    assert (without.n, without.missing, without.accuracy["official"]) == (20, 5, 75), "asked, not answered: wrong"
    limited = score_task(right_answers(task, range(10)), QuestionSet(tmp_path, task, limit=10))
    assert (limited.n, limited.accuracy) == (10, {"official": 100, "legacy": 100, "lenient": 100})
    # An entry that is never asked may be as broken as it likes.
    path = TASKS[task].annotation_files(tmp_path)[-1]
    content = json.loads(path.read_text())
    (content["data"] if task == "TextVQA" else content)[30 if task == "TextVQA" else "30"] = {"question_id": 30}
    write(path, content)
    assert score_task(right_answers(task, range(20)), QuestionSet(tmp_path, task)).accuracy["official"] == 100


@pytest.mark.parametrize("task", ANNOTATED)
def test_without_a_question_file_every_annotated_question_counts(tmp_path, task):
    annotate(tmp_path, task, 40)
    score = score_task(right_answers(task, range(10)), QuestionSet(tmp_path, task))
    assert (score.n, score.missing, score.accuracy["official"]) == (40, 30, 25)


# --- what is wrong with references, before anything is trained ---


@pytest.mark.parametrize("task", ANNOTATED)
def test_every_question_without_an_annotation_is_found(tmp_path, task):
    annotate(tmp_path, task, 3)
    ask(tmp_path, task, [0, 7, 1, 9])
    faults = TASKS[task].check_questions(tmp_path)
    assert [(fault.record, fault.kind) for fault in faults] == [(1, "annotations"), (3, "annotations")]
    for fault, question_id in zip(faults, (7, 9), strict=True):
        assert f"record {fault.record}, question_id {question_id}: " in fault.text
        assert "take the files of one release" in fault.text
        assert all(str(path) in fault.text for path in TASKS[task].annotation_files(tmp_path))
    with pytest.raises(ValueError, match=rf"Instructions/{task}/\w+\.json, record 1, question_id 7: .*1 more record"):
        score_task(right_answers(task, [0, 7, 1, 9]), QuestionSet(tmp_path, task))
    score = score_task(right_answers(task, [0, 7, 1, 9]), QuestionSet(tmp_path, task, unchecked=True))
    assert (score.n, score.left_out, score.accuracy["official"]) == (2, 2, 100)


def spoil_annotation(root: Path, task: str) -> str:
    """Breaks the entry of question 1; returns what its fault says."""
    path = TASKS[task].annotation_files(root)[-1]
    content = json.loads(path.read_text())
    if task == "ScienceQA":
        content["1"]["answer"] = 2
    elif task == "TextVQA":
        content["data"][1]["answers"].pop()
    else:
        content["1"]["types"] = []
    write(path, content)
    return {"ScienceQA": "answer 2 of 2 choices", "TextVQA": "'answers' must hold 10", "GQA": "'types'"}[task]


@pytest.mark.parametrize("task", ANNOTATED)
def test_a_broken_annotation_is_one_fault_of_the_question(tmp_path, task):
    annotate(tmp_path, task, 3)
    ask(tmp_path, task, [2, 1, 0])
    said = spoil_annotation(tmp_path, task)
    (fault,) = TASKS[task].check_questions(tmp_path)
    assert fault.record == 1 and "record 1, question_id 1: " in fault.text and said in fault.text
    with pytest.raises(ValueError, match=said):
        TASKS[task].load_references(tmp_path)


def test_references_in_the_question_file_are_checked_one_by_one(tmp_path):
    records = [
        {"question_id": "a", "text": "q", "answer": "red"},
        {"question_id": "b", "text": "q"},
        {"question_id": "c", "text": "q", "answer": 2},
        {"question_id": "d", "text": "q", "answer": "red", "answers": ["red"] * 9},
        {"text": "q", "answer": "red"},  # what is no question is not said here
        {"question_id": "a", "text": "q", "answer": "red"},
        "no record",
    ]
    write(tmp_path / "Instructions/VizWiz/val.json", records)
    faults = TASKS["VizWiz"].check_questions(tmp_path)
    assert [fault.record for fault in faults] == [1, 2, 3]
    assert faults[0].text == "record 1, question_id b: 'answer' is missing or of the wrong type; correct the record"
    for size in ([], ["a", "b"], None):
        box = {"question_id": 1, "text": "q", "answer_bbox": "[0, 0, 1, 1]", "size": size}
        write(tmp_path / "Instructions/Grounding/test.json", [box])
        (fault,) = TASKS["Grounding"].check_questions(tmp_path)
        assert "record 0, question_id 1: " in fault.text and "size" in fault.text


def test_files_that_cannot_be_read_are_one_fault(tmp_path):
    ask(tmp_path, "GQA", [0])
    (fault,) = TASKS["GQA"].check_questions(tmp_path)
    assert fault.record == 0 and "testdev_balanced_questions.json cannot be read: no such file" in fault.text
    (tmp_path / "Instructions/VizWiz").mkdir()
    (tmp_path / "Instructions/VizWiz/val.json").write_bytes(b"\xff\xfe[")
    (fault,) = TASKS["VizWiz"].check_questions(tmp_path)
    assert "val.json is UTF-16 text" in fault.text


def test_a_byte_order_mark_is_read_over(tmp_path):
    path = write(tmp_path / "Instructions/VizWiz/val.json", [{"question_id": 1, "text": "q", "answer": "red"}])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert TASKS["VizWiz"].check_questions(tmp_path) == []


# --- an unchecked run ---


@pytest.fixture
def own(tmp_path):
    """A benchmark of one's own: six training records of which one begins with the answer, four questions of which
    one has a number for an answer, one no id, one the id of another, and one no text."""
    (tmp_path / "benchmark.yaml").write_text("tasks: {T: {scoring: open}}")
    turns = [{"from": "human", "value": "What colour is it?"}, {"from": "gpt", "value": "red"}]
    records = [{"id": str(i), "conversations": turns} for i in range(5)]
    write(tmp_path / "T/train.json", [*records, {"id": "5", "conversations": turns[::-1]}])
    test = {"text": "What colour is it?", "answer": "red"}
    questions = [{**test, "question_id": "0"}, {**test, "question_id": "1", "answer": 2}, test]
    more = [{**test, "question_id": "0", "answer": "blue"}, {**test, "question_id": "4", "text": " "}]
    write(tmp_path / "T/test.json", [*questions, *more])
    return tmp_path


def test_an_unchecked_run_is_scored_without_what_it_left_out(own):
    rows = [{"question_id": "0", "text": "Red"}, {"question_id": "1", "text": "2"}]
    with pytest.raises(ValueError, match=r"T/test\.json, record 1, question_id 1: 'answer' is missing .*3 more"):
        score_task(rows, QuestionSet(own, "T"))
    score = score_task(rows, QuestionSet(own, "T", unchecked=True))
    assert (score.n, score.missing, score.left_out) == (1, 0, 4)
    assert score.accuracy == {"official": 100, "legacy": 100, "lenient": 100}
    assert score_task(rows, QuestionSet(own, "T", limit=2, unchecked=True)).left_out == 1
    with pytest.raises(ValueError, match="T: answer to unknown question_id 2"):
        score_task([{"question_id": "2", "text": ""}], QuestionSet(own, "T", unchecked=True))


def test_the_baseline_of_an_unchecked_run_leaves_out_the_same(own):
    with pytest.raises(ValueError, match=r"(?s)T/train\.json.*record 5 \(id '5'\): roles are .*must alternate"):
        majority_score(QuestionSet(own, "T"))
    assert majority_score(QuestionSet(own, "T", unchecked=True))[0] == 100
    found = majority(QuestionSet(own, "T", unchecked=True))
    assert (found.records_left_out, found.answers_left_out) == (1, 0)


def test_a_file_of_which_nothing_can_be_scored_is_an_error(own):
    write(own / "T/test.json", [{"question_id": "1", "text": "q", "answer": 2}])
    with pytest.raises(ValueError, match=r"T/test\.json: no question of it can be scored"):
        score_task([{"question_id": "1", "text": "2"}], QuestionSet(own, "T", unchecked=True))


# --- region captions among boxes ---


def test_the_baseline_of_boxes_leaves_out_and_counts_what_is_no_box(tmp_path):
    (tmp_path / "benchmark.yaml").write_text("tasks: {B: {scoring: box, instruction: before colon}}")
    box = "Please provide the bounding box coordinate of the region this sentence describes: "
    caption = "Please provide a short description for this region: [0.32, 0.8, 0.59, 1.0]."

    def record(*pairs):
        said = [
            {"from": who, "value": value} for pair in pairs for who, value in zip(("human", "gpt"), pair, strict=True)
        ]
        return {"conversations": said, "image": "a.png"}

    boxes = [record((f"<image>\n{box}the ear", "[0.1, 0.2, 0.5, 0.6]"))] * 5
    mixed = record((f"<image>\n{caption}", "The cupboards are white."), (f"{box}the floor", "[0.2, 0.9, 0.3, 1.0]"))
    write(tmp_path / "B/train.json", [*boxes, mixed, record((f"<image>\n{caption}", "inf, inf, inf, inf"))])
    test = [{"question_id": i, "text": f"{box}the ear", "answer_bbox": "[0.1, 0.2, 0.5, 0.6]"} for i in range(3)]
    write(tmp_path / "B/test.json", test)
    assert majority_score(QuestionSet(tmp_path, "B"))[0] == 100
    found = majority(QuestionSet(tmp_path, "B"))
    assert found.answers_left_out == 2 and found.rows[0]["text"] == "[0.1000, 0.2000, 0.5000, 0.6000]"
    task = task_of(open_benchmark(tmp_path), "B")
    assert task.best_constant(["a caption", "[0, 0, 1, 1]", "nan, 0, 1, 1"]) == "[0.0000, 0.0000, 1.0000, 1.0000]"
    write(tmp_path / "B/train.json", [record((f"<image>\n{caption}", "The cupboards are white."))])
    assert majority(QuestionSet(tmp_path, "B")).rows[0]["text"] == "", (
        "where no training answer is a box there is none to give"
    )


# --- all of it together ---


def test_an_unchecked_run_comes_to_its_table(own, tiny_base, tmp_path_factory, capsys):
    runs = tmp_path_factory.mktemp("runs")
    line = ["--base", str(tiny_base), "--data-root", str(own), "--lora_rank", "2", "--max_new_tokens", "2"]
    line += ["--runs-dir", str(runs), "--run", "r", "--method", "lora", "--unchecked", "true"]
    folder = run(load_recipe(line))
    assert json.loads((folder / "stages/01-T/stage.json").read_text())["dropped_records"] == 1
    report(["--runs-dir", str(runs)])
    printed = capsys.readouterr().out
    assert "lora: 1 broken records were left out of training." in printed
    assert "T: 4 questions that cannot be scored were left out." in printed
    assert "Question-only majority: 1 broken records of T were left out." in printed
    (cell,) = json.loads((folder / "scores.json").read_text())
    assert (cell["questions"], cell["missing"], cell["left_out"]) == (1, 0, 4)
    assert len((folder / "answers/01-T/T.jsonl").read_text().splitlines()) == 2, "the reference does not matter there"
