"""What a run answered, question by question: its texts, pictures, right answers, and every stage's answer and score."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from eval.runs import EvaluatedRun
from eval.score import read_answers
from eval.scored import output_folder
from eval.tasks import MODES, task_of


@dataclass(frozen=True)
class Answered:
    """The questions of a test set that are scored, in the file's order, and the answers to them.

    right: what would be right, for a reader. answers and scores: by the stage whose parameters answered; a score is
    {mode: [0, 1]}, None where the released evaluators do not count the question.
    """

    task: str
    ids: list[str]
    texts: list[str]
    pictures: list[Path | None]
    right: list[str]
    answers: dict[str, list[str]]
    scores: dict[str, dict[str, list[float | None]]]


def answered(run: EvaluatedRun, task: str, holders: Iterable[str]) -> Answered:
    """A test set with the answers of these stages' parameters. `eval.report` has scored the run before.

    Raises FileNotFoundError where answers or scores are missing, ValueError for a broken file.
    """
    asked, stream = run.questions[task], run.recipe.stream
    rule = task_of(stream.data_root, task)
    known = rule.read_references(stream.data_root, stream.instructions, run.split).asked
    places = {str(asked.question_id(number)): number for number in range(len(asked))}
    ids = [key for key, entry in known.items() if key in places and rule.counts(entry.reference)]
    answers, scores = {}, {}
    for holder in holders:
        rows = {str(row["question_id"]): row["text"] for row in read_answers(run.answer_file(holder, task))}
        answers[holder] = [rows.get(key, "") for key in ids]
        path = output_folder(run) / "scores" / holder / f"{task}.csv"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there: score the run first, by bash eval_all.sh --run {run.name}")
        frame = pd.read_csv(path, dtype={"question_id": str}).set_index("question_id").reindex(ids)
        scores[holder] = {mode: [None if pd.isna(value) else float(value) for value in frame[mode]] for mode in MODES}
    return Answered(
        task,
        ids,
        [asked.text(places[key]) for key in ids],
        [asked.picture(places[key]) for key in ids],
        [rule.right_answer(known[key].reference) for key in ids],
        answers,
        scores,
    )
