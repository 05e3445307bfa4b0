"""Scoring of answer files against the figures of the released evaluators and against brute force."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from eval.score import QuestionSet, legacy_accuracy, main, majority, majority_score, read_answers, score_task
from eval.tasks import TASKS
from eval.tasks.choice import legacy_option

GOLDEN = Path(__file__).parent / "golden" / "scores"
DOCS = Path(__file__).parents[1] / "docs" / "BENCHMARKS.md"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())


def answers(task):
    return read_answers(GOLDEN / "answers" / f"{task}.jsonl")


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


# --- legacy: the released evaluators' figures ---


@pytest.mark.parametrize("task", [task for task in EXPECTED if task != "ScienceQA"])
def test_legacy_prints_what_the_released_evaluators_print(task):
    report = score_task(answers(task), QuestionSet(GOLDEN, task)).legacy_report
    figures = dict(line.split(": ") for line in EXPECTED[task]["printed"] if ": " in line)
    assert set(report) == set(figures)
    for name, printed in figures.items():
        number = printed.split()[0]
        decimals = 0 if name == "Samples" else 2
        assert f"{report[name]:.{decimals}f}" == number.rstrip("%"), name


def test_legacy_scienceqa_per_question():
    score = score_task(answers("ScienceQA"), QuestionSet(GOLDEN, "ScienceQA"))
    assert score.legacy_report == {
        "Samples": EXPECTED["ScienceQA"]["count"],
        "Accuracy": EXPECTED["ScienceQA"]["accuracy"],
    }
    problems = TASKS["ScienceQA"].load_references(GOLDEN)
    texts = {row["question_id"]: row["text"] for row in answers("ScienceQA")}
    chosen = {pid: legacy_option(texts[pid], problems[pid]) if pid in texts else -1 for pid in problems}
    assert chosen == EXPECTED["ScienceQA"]["predicted_index"]
    for pid, index in chosen.items():
        assert score.per_question[pid]["legacy"] == (index == problems[pid].answer)


def test_legacy_textvqa_per_question():
    score = score_task(answers("TextVQA"), QuestionSet(GOLDEN, "TextVQA"))
    assert {key: scores["legacy"] for key, scores in score.per_question.items()} == EXPECTED["TextVQA"]["per_question"]


def test_command_line_legacy_figures(capsys):
    main(["--data", str(GOLDEN), "--answers", str(GOLDEN / "answers"), "--scoring", "legacy"])
    printed = json.loads(capsys.readouterr().out)
    assert list(printed) == list(TASKS)
    for task, accuracy in printed.items():
        lines = EXPECTED[task].get("printed", [f"Accuracy: {EXPECTED[task].get('accuracy', 0):.2f}%"])
        assert f"Accuracy: {accuracy:.2f}%" in lines


def test_legacy_imagenet_goes_by_position_official_by_id():
    rows = answers("ImageNet")
    turned = rows[1:] + rows[:1]
    straight, shifted = (score_task(some, QuestionSet(GOLDEN, "ImageNet")).accuracy for some in (rows, turned))
    assert straight["official"] == shifted["official"]
    right = [record["answer"] for record in json.loads((GOLDEN / "Instructions/ImageNet/test.json").read_text())]
    by_position = [b in a["text"] or a["text"] in b for a, b in zip(turned, right, strict=True)]
    assert shifted["legacy"] == pytest.approx(100 * sum(by_position) / 80)
    assert shifted["legacy"] < straight["legacy"]


# --- official: by id, over all questions ---


@pytest.mark.parametrize(("task", "file"), [("VizWiz", "val"), ("VQAv2", "val"), ("OCR-VQA", "test")])
def test_official_counts_missing_answers_as_wrong(task, file):
    questions = json.loads((GOLDEN / "Instructions" / task / f"{file}.json").read_text())
    given = {row["question_id"]: row["text"].strip().lower() for row in answers(task)}
    right = sum(given.get(record["question_id"]) == record["answer"].strip().lower() for record in questions)
    score = score_task(answers(task), QuestionSet(GOLDEN, task))
    assert score.accuracy["official"] == pytest.approx(100 * right / len(questions))
    assert (score.n, score.missing) == (80, 5)
    missing = next(key for key in score.per_question if key not in given)
    assert score.per_question[missing] == {"official": 0, "legacy": None, "lenient": 0}


def test_gqa_counts_balanced_questions_only():
    questions = json.loads((GOLDEN / "cl_dataset/GQA/testdev_balanced_questions.json").read_text())
    balanced = {key: record["answer"] for key, record in questions.items() if record["isBalanced"]}
    given = {row["question_id"]: row["text"].rstrip(".").lower() for row in answers("GQA")}
    right = sum(given.get(key) == answer.rstrip(".").lower() for key, answer in balanced.items())
    score = score_task(answers("GQA"), QuestionSet(GOLDEN, "GQA"))
    assert set(score.per_question) == set(balanced)
    assert score.accuracy["official"] == pytest.approx(100 * right / len(balanced))
    assert score.missing == len(set(balanced) - set(given))


def test_accuracies_are_the_means_of_the_questions():
    for task in TASKS:
        score = score_task(answers(task), QuestionSet(GOLDEN, task))
        for mode, accuracy in score.accuracy.items():
            counted = [scores[mode] for scores in score.per_question.values() if scores[mode] is not None]
            assert accuracy == pytest.approx(100 * np.mean(counted)), (task, mode)


def test_format_rate_is_over_all_questions():
    score = score_task(answers("ScienceQA"), QuestionSet(GOLDEN, "ScienceQA"))
    problems = json.loads((GOLDEN / "cl_dataset/ScienceQA/problems.json").read_text())
    letters = [
        row["text"] in list("ABCDE"[: len(problems[row["question_id"]]["choices"])]) for row in answers("ScienceQA")
    ]
    assert score.format_rate == pytest.approx(100 * sum(letters) / 80)


def test_number_and_text_ids_are_the_same():
    rows = [{**row, "question_id": str(row["question_id"])} for row in answers("TextVQA")]
    questions = QuestionSet(GOLDEN, "TextVQA")
    assert score_task(rows, questions) == score_task(answers("TextVQA"), questions)


def reason(task, given, reference):
    """Which documented slip of a released evaluator an answer meets; `given` is None without an answer."""
    if given is None:
        return "leaves out questions without an answer"
    if task == "ScienceQA":
        lone = [word for word in given.split() if len(word) == 1]
        return "takes the first lone word character of running text for an option" if lone and " " in given else None
    if task == "ImageNet" and (given in reference or reference in given):
        return "right if either text is a part of the other, so also the empty one"
    if task == "ImageNet" and given.lower() == reference.lower():
        return "minds upper and lower case"
    if task == "GQA" and reference.endswith("."):
        return "takes the final full stop off the answer, not off the reference"
    if task in ("VizWiz", "VQAv2", "OCR-VQA") and given.startswith(" ") and given.strip() == reference:
        return "minds a space in front"
    if task == "Grounding" and given.endswith("."):
        return "does not mind a character behind the box"
    if task == "Grounding":
        numbers, right = ([float(n) for n in text.strip("[]").split(",")] for text in (given, reference))
        width, height = (min(numbers[i + 2], right[i + 2]) - max(numbers[i], right[i]) for i in (0, 1))
        areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (numbers, right)]
        wrong = width * height / (sum(areas) - width * height) <= 0.5
        return "the same, to the answer's advantage" if wrong else (
            "drops the last digit of y2, and another box comes out"
        )  # fmt: skip
    return None


def test_official_differs_from_legacy_exactly_as_the_docs_say():
    found = Counter()
    for task in TASKS:
        references = TASKS[task].load_references(GOLDEN)
        given = {str(row["question_id"]): row["text"] for row in answers(task)}
        for key, scores in score_task(answers(task), QuestionSet(GOLDEN, task)).per_question.items():
            if scores["official"] != scores["legacy"]:
                said = {0: "no", 1: "yes", None: "not counted"}
                why = reason(task, given.get(key), getattr(references[key], "answer", None))
                found[task, why, f"{said[scores['official']]} / {said[scores['legacy']]}"] += 1
    rows = [line.strip("|").split("|") for line in DOCS.read_text().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in row] for row in rows]
    documented = {(task, why, right): int(n) for task, why, n, right in (c for c in cells if c[0] in TASKS)}
    assert found == documented


def test_the_scorings_of_ones_own_benchmark(tmp_path):
    """A stated option with its reason, boxes with small numbers, and ten people's answers, from file to score."""
    scorings = {"Sci": "choice", "Box": "box", "Vqa": "vqav2", "Open": "open"}
    write(tmp_path / "benchmark.yaml", {"tasks": {task: {"scoring": name} for task, name in scorings.items()}})
    option, box = {"answer": "B", "choices": ["x", "y", "z"]}, {"answer_bbox": "[0.0, 0.2, 0.5, 0.6]", "size": [40, 30]}
    people = [["red,white"] * 9 + ["red"], ["2"] * 10, ["yes"] * 10]
    ten = [{"answer": answers[0], "answers": answers} for answers in people]
    reasons = ["The answer is B. BECAUSE: y is the largest, and A is not.", "The answer is B.\nBECAUSE: A is wrong."]
    cases = {
        "Sci": ([option] * 4, [*reasons, "The answer is B.", "B"], [1, 1, 1, 1], [1, 1, 1, 1]),
        "Box": ([box, box, {"answer_bbox": "[7.8125e-05, 0.2, 0.5, 0.6]"}],
                ["[7.8125e-05, 0.2, 0.5, 0.6]", "[1e-05,0.2,0.5,0.6]", "[0.0, 0.2, 0.5, 0.6]"], [1, 1, 1], [1, 1, 1]),
        "Vqa": (ten, ["red white", "two", "Yes"], [1, 0, 0], [1, 1, 1]),
        "Open": (ten, ["red white", "two", "Yes"], [0, 1, 1], [0.3, 1, 1]),
    }  # fmt: skip
    for task, (references, texts, official, lenient) in cases.items():
        write(tmp_path / task / "test.json", [{"question_id": i, "text": "q", **r} for i, r in enumerate(references)])
        rows = [{"question_id": i, "text": text} for i, text in enumerate(texts)]
        score = score_task(rows, QuestionSet(tmp_path, task))
        assert [given["official"] for given in score.per_question.values()] == official, task
        assert [given["lenient"] for given in score.per_question.values()] == pytest.approx(lenient), task


# --- wrong input ---


@pytest.mark.parametrize("task", TASKS)
def test_doubled_and_unknown_ids_are_errors(task):
    rows = answers(task)
    with pytest.raises(ValueError, match=f"{task}: question_id {rows[3]['question_id']} is answered 2 times"):
        score_task([*rows[:-1], rows[3]], QuestionSet(GOLDEN, task))
    with pytest.raises(ValueError, match=f"{task}: answer to unknown question_id nobody"):
        score_task([*rows[:-1], {"question_id": "nobody", "text": ""}], QuestionSet(GOLDEN, task))


def test_legacy_treats_odd_ids_as_the_released_evaluators_do():
    stranger = {"question_id": "nobody", "text": "A"}
    # Read into a dictionary: strangers are passed over, the last of doubled answers counts.
    rows = answers("ScienceQA")
    wrong_first = [{**rows[0], "text": "no letter"}, stranger, *rows]
    assert legacy_accuracy(wrong_first, QuestionSet(GOLDEN, "ScienceQA")) == EXPECTED["ScienceQA"]["accuracy"]
    # By position: ids do not matter at all.
    nameless = [{**row, "question_id": "nobody"} for row in answers("ImageNet")]
    accuracy = legacy_accuracy(nameless, QuestionSet(GOLDEN, "ImageNet"))
    assert f"Accuracy: {accuracy:.2f}%" in EXPECTED["ImageNet"]["printed"]
    # Looked up row by row: a stranger stops them.
    with pytest.raises(ValueError, match="unknown question_id nobody"):
        legacy_accuracy([stranger], QuestionSet(GOLDEN, "VizWiz"))


def test_no_answers_is_an_error():
    with pytest.raises(ValueError, match="VizWiz: no answers"):
        score_task([], QuestionSet(GOLDEN, "VizWiz"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("VizWiz.jsonl", '{"question_id": "VizWiz-0", "text": "x"}\n{"question', "line 2: not valid JSON"),
        ("VizWiz.jsonl", '{"question_id": "VizWiz-0"}\n', "line 1: 'text'"),
        ("VisWiz.jsonl", "", "task 'VisWiz' is not known"),
        ("readme.txt", "", "no <Task>.jsonl"),
    ],
)
def test_broken_answer_folders_end_with_a_message(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(SystemExit, match=message):
        main(["--data", str(GOLDEN), "--answers", str(tmp_path)])


def test_answers_may_hold_any_character(tmp_path):
    row = {"question_id": "VizWiz-0", "text": "one\u2028two\x85three"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_answers(tmp_path / "a.jsonl") == [row]


def test_coin_spelling_of_ocrvqa(tmp_path, capsys):
    shutil.copytree(GOLDEN / "Instructions/OCR-VQA", tmp_path / "Instructions/OCRVQA")
    shutil.copy(GOLDEN / "answers/OCR-VQA.jsonl", tmp_path / "OCRVQA.jsonl")
    main(["--data", str(tmp_path), "--answers", str(tmp_path), "--scoring", "legacy"])
    assert json.loads(capsys.readouterr().out) == {"OCR-VQA": 46.67}


# --- the question-only baseline ---


def turns(*pairs):
    """One training record from (question, answer) pairs."""
    speech = [(who, said) for pair in pairs for who, said in zip(("human", "gpt"), pair, strict=True)]
    shown = {"image": "a.png"} if any("<image>" in said for _, said in speech) else {}
    return {"id": "x", "conversations": [{"from": who, "value": said} for who, said in speech], **shown}


@pytest.mark.parametrize("instruction", ["", "\nAnswer briefly."])
def test_majority_against_brute_force(tmp_path, instruction):
    """The instruction stands in a record's first turn alone, and in every test question."""
    generator = np.random.default_rng(1)
    questions, words = [f"what is it {i}?" for i in range(8)], ["red", "blue", "green", "two"]
    seen = [(str(generator.choice(questions[:6])), str(generator.choice(words))) for _ in range(90)]
    records = [
        turns((f"<image>\n{q1}{instruction}", a1), (q2, a2))
        for (q1, a1), (q2, a2) in zip(seen[::2], seen[1::2], strict=True)
    ]
    test = [
        {
            "question_id": str(i),
            "text": str(generator.choice(questions)) + instruction,
            "answer": str(generator.choice(words)),
        }
        for i in range(60)
    ]
    write(tmp_path / "Instructions/VQAv2/train.json", records)
    write(tmp_path / "Instructions/VQAv2/val.json", test)

    expected = []
    for record in test:
        same = [answer for question, answer in seen if question + instruction == record["text"]]
        pool = same or [answer for _, answer in seen]
        best = max(Counter(pool).values())
        expected.append(next(answer for answer in pool if pool.count(answer) == best))
    right = sum(given == record["answer"] for given, record in zip(expected, test, strict=True))
    assert 0 < right < 60
    assert [row["text"] for row in majority(QuestionSet(tmp_path, "VQAv2")).rows] == expected
    assert majority_score(QuestionSet(tmp_path, "VQAv2"))[0] == pytest.approx(100 * right / 60)


@pytest.mark.parametrize(
    ("place", "first", "later", "test"),
    [
        ("last line", "<image>\nWhat is it?\nAnswer briefly.", "Which colour?", "Which colour?\nAnswer briefly."),
        (
            "last line",
            "What is it?\nAnswer briefly.",
            "Which?\nA. cat\nB. dog",
            "Which?\nA. cat\nB. dog\nAnswer briefly.",
        ),
        ("last line", "What is it?\nBe brief.", "Which?\nAnswer briefly.", "Which?\nAnswer briefly."),  # its own
        ("last line", "<image>\nWhat is it?", "Which colour?", "Which colour?"),  # no instruction but the question
        ("first line", "<image>\nName it.\nThe left one", "The right one", "Name it.\nThe right one"),
        ("before colon", "<image>\nGive the box: ear", "the nose", "Give the box: the nose"),
        ("before colon", "Describe the region: [0, 0, 1, 1]", "Give the box: nose", "Give the box: nose"),  # its own
        ("before colon", "<image>\nGive the box", "the nose", "the nose"),
    ],
)
def test_later_turns_have_the_instruction_of_the_first(tmp_path, place, first, later, test):
    """Five later turns say "red", as many first turns of other records as make "blue" the answer to all the rest."""
    write(tmp_path / "benchmark.yaml", {"tasks": {"T": {"scoring": "open", "instruction": place}}})
    others = [turns((f"{first.partition('What')[0]}Which {i}", "blue")) for i in range(30)]
    write(tmp_path / "T/train.json", [turns((first, "blue"), (later, "red"))] * 5 + others)
    write(tmp_path / "T/test.json", [{"question_id": "0", "text": test, "answer": "red"}])
    (row,) = majority(QuestionSet(tmp_path, "T")).rows
    assert row == {"question_id": "0", "prompt": test, "text": "red"}
    assert majority_score(QuestionSet(tmp_path, "T"))[0] == 100


def test_majority_box_is_the_median(tmp_path):
    boxes = [[0.1, 0.2, 0.5, 0.6], [0.3, 0.1, 0.9, 0.7], [0.2, 0.2, 0.8, 0.9], [0.0, 0.0, 0.1, 0.1]]
    texts = ["the cat", "the cat", "the cat", "the dog"]
    pairs = zip(texts, boxes, strict=True)
    write(
        tmp_path / "Instructions/Grounding/train.json",
        [turns((f"<image>\n{q}", str(box))) for q, box in pairs],
    )
    questions = [{"question_id": q, "text": q, "answer_bbox": "[0, 0, 1, 1]"} for q in ("the cat", "the cow")]
    write(tmp_path / "Instructions/Grounding/test.json", questions)
    given = [json.loads(row["text"]) for row in majority(QuestionSet(tmp_path, "Grounding")).rows]
    np.testing.assert_allclose(given, [np.median(boxes[:3], axis=0), np.median(boxes, axis=0)], atol=1e-4)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"id": "x"}, r"(?s)train\.json.*record 0 .*has no conversations"),
        ({"conversations": [{"from": "gpt", "value": "x"}]}, r"(?s)train\.json.*record 0: roles are .*must alternate"),
    ],
)
def test_broken_training_records_are_named(tmp_path, record, message):
    write(tmp_path / "Instructions/VQAv2/train.json", [record])
    with pytest.raises(ValueError, match=message):
        majority_score(QuestionSet(tmp_path, "VQAv2"))[0]
