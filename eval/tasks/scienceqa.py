"""ScienceQA: multiple choice, the answer is an option letter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from data.answers import Options
from data.references import ScienceQAFiles
from eval.tasks.base import last_answers_by_id
from eval.tasks.choice import MultipleChoice


class ScienceQA(ScienceQAFiles, MultipleChoice):
    """An option letter; legacy divides by the whole split."""

    legacy_missing = 0.0  # alone among the released evaluators this one counts missing answers as wrong

    def legacy_scores(self, rows: Sequence[Mapping[str, Any]], references: Mapping[str, Options]) -> list[float | None]:
        return last_answers_by_id(self, rows, references)

    def legacy_accuracy(self, scores: Sequence[float | None], references: Mapping[str, Options]) -> float:
        return sum(score for score in scores if score is not None) / len(references)

    def legacy_report(
        self,
        rows: Sequence[Mapping[str, Any]],
        scores: Sequence[float | None],
        references: Mapping[str, Options],
    ) -> dict[str, float]:
        """Unrounded: the released evaluator writes its accuracy to a JSON file."""
        return {"Samples": len(references), "Accuracy": 100 * self.legacy_accuracy(scores, references)}
