"""ScienceQA: multiple choice, the answer is an option letter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.tasks.base import AnnotatedTask, Root, field, last_answers_by_id, one_of, read_json
from eval.tasks.choice import LETTERS, Choice, Problem

_SPLIT_NAMES = {"test": "test", "dev": "val"}


class ScienceQA(AnnotatedTask, Choice):
    """References: problems.json for the pids of pid_splits.json, the whole split."""

    legacy_missing = 0.0  # alone among the released evaluators this one counts missing answers as wrong

    def annotation_files(self, data_root: Root, split: str = "test") -> list[Path]:
        one_of(split, _SPLIT_NAMES, "split")
        return [self.annotation(data_root, name) for name in ("pid_splits.json", "problems.json")]

    def annotations(self, data_root: Root, split: str = "test") -> tuple[dict[str, Problem], dict[str, str]]:
        splits, file = self.annotation_files(data_root, split)
        pids = field(read_json(splits, dict), _SPLIT_NAMES[split], list, str(splits))
        problems = read_json(file, dict)
        references, broken = {}, {}
        for pid in map(str, pids):
            try:
                references[pid] = annotated_problem(problems, pid, str(file))
            except ValueError as error:
                broken[pid] = str(error)
        return references, broken

    def legacy_scores(self, rows: Sequence[Mapping[str, Any]], references: Mapping[str, Problem]) -> list[float | None]:
        return last_answers_by_id(self, rows, references)

    def legacy_accuracy(self, scores: Sequence[float | None], references: Mapping[str, Problem]) -> float:
        return sum(score for score in scores if score is not None) / len(references)

    def legacy_report(
        self,
        rows: Sequence[Mapping[str, Any]],
        scores: Sequence[float | None],
        references: Mapping[str, Problem],
    ) -> dict[str, float]:
        """Unrounded: the released evaluator writes its accuracy to a JSON file."""
        return {"Samples": len(references), "Accuracy": 100 * self.legacy_accuracy(scores, references)}


def annotated_problem(problems: Mapping[str, Any], pid: str, file: str) -> Problem:
    """An entry of problems.json; ValueError naming file and problem for a broken one."""
    where = f"{file}, problem {pid}"
    record = field(problems, pid, dict, where)
    choices, answer = field(record, "choices", list, where), field(record, "answer", int, where)
    if not 0 <= answer < len(choices) <= len(LETTERS):
        raise ValueError(f"{where}: answer {answer} of {len(choices)} choices; 1 to {len(LETTERS)} can be asked")
    return Problem(tuple(map(str, choices)), answer)
