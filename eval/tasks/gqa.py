"""GQA: compositional questions on scenes, one word or phrase."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from data.answers import GQAAnswer
from data.references import GQAFiles
from eval.tasks.base import Task, last_answers_by_id, printed
from eval.tasks.words import forgiving, is_phrase


class GQA(GQAFiles, Task):
    """One word or phrase, in lower case and without a final full stop; only balanced questions count."""

    def counts(self, reference: GQAAnswer) -> bool:
        return reference.balanced

    def official(self, text: str, reference: GQAAnswer) -> float:
        return float(gqa_form(text) == gqa_form(reference.answer))

    def legacy(self, text: str, reference: GQAAnswer) -> float:
        """Only the prediction is put into GQA's form."""
        return float(gqa_form(text) == reference.answer)

    def lenient(self, text: str, reference: GQAAnswer) -> float:
        return float(forgiving(text, reference.answer) or self.official(text, reference))

    def has_form(self, text: str, reference: GQAAnswer) -> bool:
        return is_phrase(text, max_words=3)

    def legacy_scores(
        self, rows: Sequence[Mapping[str, Any]], references: Mapping[str, GQAAnswer]
    ) -> list[float | None]:
        return last_answers_by_id(self, rows, references)

    def legacy_report(
        self,
        rows: Sequence[Mapping[str, Any]],
        scores: Sequence[float | None],
        references: Mapping[str, GQAAnswer],
    ) -> dict[str, float]:
        """Accuracy, its two halves (open questions are those of structural type query), and the distance
        between the distributions of given and right answers; no samples are printed."""
        counted = [
            (gqa_form(row["text"]), references[str(row["question_id"])], score)
            for row, score in zip(rows, scores, strict=True)
            if score is not None
        ]
        halves = {
            name: [score for _, question, score in counted if question.open == is_open]
            for name, is_open in (("Binary", False), ("Open", True))
        }
        figures = {name: printed(self.legacy_accuracy(half, references)) for name, half in halves.items()}
        figures["Accuracy"] = printed(self.legacy_accuracy(scores, references))
        distance = answer_distance([(prediction, question) for prediction, question, _ in counted])
        return figures | {"Distribution": float(f"{distance:.2f}")}


def gqa_form(text: str) -> str:
    """GQA's prediction form: no final full stops, lower case."""
    return text.rstrip(".").lower()


def answer_distance(answered: Sequence[tuple[str, GQAAnswer]]) -> float:
    """GQA's distribution score: chi-square between given and right answers within each question group,
    averaged over groups by their size, in hundredths; lower is better."""
    given, right = defaultdict(Counter), defaultdict(Counter)
    for prediction, question in answered:
        if question.group is not None:
            given[question.group][prediction] += 1
            right[question.group][question.answer] += 1
    weighted = sum(
        counts.total() * sum((given[group][answer] - n) ** 2 / n for answer, n in counts.items())
        for group, counts in right.items()
    )
    total = sum(counts.total() for counts in right.values())
    return weighted / total / 100 if total else 0.0
