"""Scores of answer files: every answer read once, scored three ways.

    python -m eval.score --data DIR [--answers DIR] [--instructions diverse] [--split dev] [--scoring legacy]

prints one JSON object {task: accuracy in percent} for the files <Task>.jsonl found in the answers folder; without one,
of the question-only majority baseline, which every table shows. Rows are {question_id, prompt, text}.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data.benchmark import INSTRUCTION_SETS, image_root, open_benchmark
from data.jsonfile import field
from data.records import IMAGE, Loaded, Problem, instruction_of, picture_fault, read_list, samples_of
from data.references import SPLITS
from eval.tasks import MODES, task_of

Turns = list[tuple[str, str]]  # (question, answer) of one record
MIN_COUNT = 5  # training answers that make a question text a guide of its own


class QuestionSet(NamedTuple):
    """The questions of one task that are scored: `split` of it in an instruction set of a benchmark's folder.

    `limit` counts only the first records of the file, for runs that answer no more; 0: all. `unchecked` leaves out
    what cannot be used, as such a run does in training, and counts it.
    """

    data_root: Path | str
    task: str
    instructions: str = "original"
    split: str = "test"
    limit: int = 0
    unchecked: bool = False


@dataclass(frozen=True)
class TaskScore:
    """Scores of one task's answers. Accuracies and rates in percent, per-question scores in [0, 1].

    `n` questions are counted, `missing` of them have no answer: wrong for official and lenient; for legacy
    None unless the released evaluator counts it. `format_rate` is the share of the n questions answered in
    the form the task asks for. `legacy_report` holds the figures the released evaluator prints. `left_out` records
    of the question file cannot be scored and count nowhere.
    """

    task: str
    accuracy: dict[str, float]
    n: int
    missing: int
    format_rate: float
    per_question: dict[str, dict[str, float | None]]
    legacy_report: dict[str, float]
    left_out: int


def percent(share: float) -> float:
    """A share in percent, without the noise of binary fractions (63.75, not 63.74999999999999)."""
    return round(100 * share, 10)


def read_answers(path: Path) -> list[dict[str, Any]]:
    """Rows of an answer file, one JSON object a line; ValueError naming file and line of a bad one."""
    rows = []
    # Not splitlines(): an answer may hold other characters that Unicode calls line ends.
    for number, line in enumerate(path.read_text(encoding="utf-8").rstrip("\n").split("\n"), start=1):
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not valid JSON ({error}); answer these questions again") from error
        field(row, "question_id", (str, int), where)
        field(row, "text", str, where)
        rows.append(row)
    return rows


def check_ids(task_name: str, rows: Sequence[Mapping[str, Any]], known: Collection[str]) -> None:
    """ValueError if a question is answered twice or an answer belongs to no question."""
    ids = Counter(str(row["question_id"]) for row in rows)
    doubled = [question_id for question_id, count in ids.items() if count > 1]
    if doubled:
        raise ValueError(f"{task_name}: question_id {doubled[0]} is answered {ids[doubled[0]]} times; answer it once")
    unknown = [question_id for question_id in ids if question_id not in known]
    if unknown:
        raise ValueError(f"{task_name}: answer to unknown question_id {unknown[0]}; wrong split or data?")


def score_task(rows: Sequence[Mapping[str, Any]], questions: QuestionSet) -> TaskScore:
    """Score one task's answers in every mode.

    `rows` hold question_id (text or number, compared as text) and text. A question counts if it is in the question
    file. Raises ValueError if there are no rows, for doubled or unknown ids and for broken references,
    FileNotFoundError if the data are not there.
    """
    task, limit = task_of(questions.data_root, questions.task), questions.limit
    found = task.read_references(questions.data_root, questions.instructions, questions.split)
    if not questions.unchecked:
        found.whole()
    if not rows:
        raise ValueError(f"{task.name}: no answers to score")
    check_ids(task.name, rows, found.ids)

    asked = {key: a.reference for key, a in found.asked.items() if not limit or a.position < limit}
    counted = {question_id: reference for question_id, reference in asked.items() if task.counts(reference)}
    if not counted:
        raise ValueError(f"{found.path}: no question of it can be scored; correct the file or its annotations")
    released = asked if limit else found.annotated  # what the released evaluator would load
    rows = [row for row in rows if str(row["question_id"]) in released]
    legacy = task.legacy_scores(rows, released) if not task.joint else [None] * len(rows)
    unanswered = {"official": 0.0, "legacy": task.legacy_missing, "lenient": 0.0}
    per_question: dict[str, dict[str, float | None]] = {question_id: dict(unanswered) for question_id in counted}
    given = {str(row["question_id"]): (row["text"], score) for row, score in zip(rows, legacy, strict=True)}
    answered = [question_id for question_id in given if question_id in counted]
    texts, references = [given[key][0] for key in answered], [counted[key] for key in answered]
    official = task.official_scores(texts, references, [counted[key] for key in counted if key not in given])
    in_form = 0
    for question_id, text, reference, score in zip(answered, texts, references, official, strict=True):
        in_form += task.has_form(text, reference)
        others = (score, score) if task.joint else (given[question_id][1], task.lenient(text, reference))
        per_question[question_id] = {"official": score, "legacy": others[0], "lenient": others[1]}

    n = len(counted)
    share = {mode: sum(scores[mode] for scores in per_question.values()) / n for mode in ("official", "lenient")}
    share["legacy"] = share["official"] if task.joint else task.legacy_accuracy(legacy, released)
    return TaskScore(
        task=task.name,
        accuracy={mode: percent(share[mode]) for mode in MODES},
        n=n,
        missing=n - len(answered),
        format_rate=percent(in_form / n),
        per_question=per_question,
        legacy_report={} if task.joint else task.legacy_report(rows, legacy, released),
        left_out=sum(not limit or fault.record < limit for fault in found.problems),
    )


def legacy_accuracy(rows: Sequence[Mapping[str, Any]], questions: QuestionSet) -> float:
    """The accuracy the released evaluator prints for these rows, doubled and unknown ids treated its way."""
    task = task_of(questions.data_root, questions.task)
    references = task.load_references(questions.data_root, questions.instructions, questions.split)
    return task.legacy_report(rows, task.legacy_scores(rows, references), references)["Accuracy"]


# --- the question-only baseline ---


def question_text(prompt: str) -> str:
    """A prompt without the image token."""
    return prompt.replace(IMAGE, "").strip()


@dataclass(frozen=True)
class Majority:
    """Answer rows of the baseline, and what of the training file it could not use: records, and answers of others."""

    rows: list[dict[str, str]]
    records_left_out: int
    answers_left_out: int


def training_turns(path: Path, images: Path, unchecked: bool) -> tuple[list[Turns], int]:
    """(question, answer) of every turn, record by record, and how many records an `unchecked` run leaves out, those
    that break the schema or whose picture is missing. Else DataError names what is wrong with which record."""
    problems: list[Problem] = []
    samples = list(samples_of(read_list(path), problems))
    if not unchecked:
        return [list(sample.turns) for sample in Loaded(samples, problems).whole(path)], 0
    names = {sample.image for sample in samples if sample.image is not None}
    gone = {name for name in names if picture_fault(images, name, look=False)}
    usable = [list(sample.turns) for sample in samples if sample.image not in gone]
    return usable, len(problems) + len(samples) - len(usable)


def instruction_around(question: str, place: str) -> tuple[str, str]:
    """The instruction of a question as it stands (before, behind) what is asked; empty if it is all of the text.

    `place` as in `data.records.instruction_of`.
    """
    if place == "first line":
        line, newline, asked = question.partition("\n")
        return (line + newline, "") if asked.strip() else ("", "")
    others, _, line = question.rpartition("\n")
    if place == "last line":
        return ("", question[len(others.rstrip()) :]) if others.strip() else ("", "")
    asked = line.partition(":")[2].lstrip()
    return (line[: len(line) - len(asked)], "") if asked else ("", "")


def instruction_in(question: str, place: str) -> str:
    """The question's instruction, as grouping compares it; empty if there is none."""
    try:
        return instruction_of(question, place)
    except ValueError:
        return ""


def with_instructions(records: Sequence[Turns], place: str, tests: Iterable[str]) -> Iterable[tuple[str, str]]:
    """(question, answer) of all turns, every question with its instruction, as the `tests` have theirs.

    The instruction of a record's first question holds for its later ones, except for those that bring one of the
    file's instructions, or of the tests', themselves.
    """
    firsts = [question_text(turns[0][0]) for turns in records]
    known = {instruction_in(first, place) for first in firsts if any(instruction_around(first, place))}
    known |= {instruction_in(text, place) for text in tests}
    for first, turns in zip(firsts, records, strict=True):
        before, behind = instruction_around(first, place)
        yield first, turns[0][1]
        for question, answer in turns[1:]:
            later = question_text(question)
            own = instruction_in(later, place) in known
            yield later if own else f"{before}{later}{behind}", answer


def backoff(question: str) -> tuple[str, str, str]:
    """What a question is known by, from the whole text to nothing: text, its first three words, ''."""
    return question, " ".join(question.split()[:3]), ""


def majority(asked_of: QuestionSet) -> Majority:
    """Answers of the baseline that never sees a picture.

    The most frequent training answer to the same question text; where the text occurs fewer than MIN_COUNT times,
    to questions with the same first three words; else of the whole task. Boxes by their median; training answers
    that are no box are left out. Unless unchecked, ValueError names the first record that cannot be used.
    """
    data_root, name, instructions, split, _, unchecked = asked_of
    task = task_of(data_root, name)
    path = task.train_file(data_root, instructions)
    records, left_out = training_turns(path, image_root(data_root), unchecked)
    asked, faults = task.read_questions(data_root, instructions, split)
    if faults and not unchecked:
        raise ValueError(f"{task.question_file(data_root, instructions, split)}, {faults[0].text}")
    questions = {key: question_text(record["text"]) for key, (_, record) in asked.items()}
    answers: dict[str, list[str]] = defaultdict(list)
    unusable = 0
    for question, answer in with_instructions(records, task.spec.instruction, questions.values()):
        if not task.can_be_constant(answer):
            unusable += 1
            continue
        for key in backoff(question):
            answers[key].append(answer)
    constant = {key: task.best_constant(given) for key, given in answers.items() if len(given) >= MIN_COUNT or not key}
    rows = [
        {
            "question_id": question_id,
            "prompt": asked[question_id][1]["text"],
            "text": next((constant[key] for key in backoff(question) if key in constant), ""),
        }
        for question_id, question in questions.items()
    ]
    return Majority(rows, left_out, unusable)


def majority_score(questions: QuestionSet, scoring: str = "official") -> tuple[float, Majority]:
    """Accuracy in percent of the question-only majority baseline, and its answers. Raises as `score_task` does."""
    found = majority(questions)
    return score_task(found.rows, questions).accuracy[scoring], found


# --- command line ---


def score_folder(answers: Path, data_root: Path, instructions: str, split: str, scoring: str) -> dict[str, float]:
    """Accuracy in percent of every <Task>.jsonl in a folder, in the benchmark's order.

    Raises FileNotFoundError if there is none, ValueError for a .jsonl file that is no task's.
    """
    tasks, files = open_benchmark(data_root).tasks, {}
    for path in sorted(answers.glob("*.jsonl")):
        name = task_of(data_root, path.stem).name
        if name in files:
            raise ValueError(f"{path}: {files[name].name} holds answers of the same task; keep one")
        files[name] = path
    if not files:
        raise FileNotFoundError(f"{answers}: no <Task>.jsonl in it; tasks are {', '.join(tasks)}")
    scores = {}
    for name in (name for name in tasks if name in files):
        rows = read_answers(files[name])
        questions = QuestionSet(data_root, name, instructions, split)
        if scoring == "legacy":
            scores[name] = legacy_accuracy(rows, questions)
        else:
            scores[name] = score_task(rows, questions).accuracy[scoring]
    return scores


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the scores of a folder of answers as one JSON object; a wrong input ends with its message."""
    parser = argparse.ArgumentParser(prog="python -m eval.score", description="Score a folder of answer files.")
    parser.add_argument("--data", type=Path, required=True, help="data root: Instructions*/ and cl_dataset/")
    parser.add_argument("--answers", type=Path, help="folder with <Task>.jsonl files; without: the majority baseline")
    parser.add_argument("--instructions", choices=INSTRUCTION_SETS, default="original")
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--scoring", choices=MODES, default="official")
    options = parser.parse_args(arguments)
    try:
        where = (options.instructions, options.split)
        if options.answers is None:
            sets = {task: QuestionSet(options.data, task, *where) for task in open_benchmark(options.data).tasks}
            scores = {task: majority_score(questions, options.scoring)[0] for task, questions in sets.items()}
        else:
            scores = score_folder(options.answers, options.data, *where, options.scoring)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"eval.score: {error}") from error
    print(json.dumps(scores, indent=1))


if __name__ == "__main__":
    main()
