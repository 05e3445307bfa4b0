"""ScienceQA: multiple choice, the answer is an option letter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eval.tasks.base import Root, field, last_answers_by_id, one_of, read_json
from eval.tasks.choice import LETTERS, Choice, Problem

_SPLIT_NAMES = {"test": "test", "dev": "val"}


class ScienceQA(Choice):
    """References: problems.json for the pids of pid_splits.json, the whole split."""

    legacy_missing = 0.0  # alone among the released evaluators this one counts missing answers as wrong

    def load_references(
        self, data_root: Root, instructions: str = "original", split: str = "test"
    ) -> dict[str, Problem]:
        splits, key = self.annotation(data_root, "pid_splits.json"), _SPLIT_NAMES[one_of(split, _SPLIT_NAMES, "split")]
        pids = field(read_json(splits, dict), key, list, str(splits))
        file = self.annotation(data_root, "problems.json")
        problems = read_json(file, dict)
        references = {}
        for pid in map(str, pids):
            where = f"{file}, problem {pid}"
            record = field(problems, pid, dict, where)
            choices, answer = field(record, "choices", list, where), field(record, "answer", int, where)
            if not 0 <= answer < len(choices) <= len(LETTERS):
                raise ValueError(
                    f"{where}: answer {answer} of {len(choices)} choices; 1 to {len(LETTERS)} can be asked"
                )
            references[pid] = Problem(tuple(choices), answer)
        return references

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
