"""GQA: compositional questions on scenes, one word or phrase."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.tasks.base import AnnotatedTask, Root, field, last_answers_by_id, one_of, printed, read_json
from eval.tasks.words import forgiving, is_phrase

_ANNOTATIONS = {"test": "testdev_balanced_questions.json", "dev": "dev_balanced_questions.json"}


@dataclass(frozen=True)
class Question:
    """A question's answer, and what the released evaluator groups its figures by; without a `group`
    a question takes no part in the distribution score."""

    answer: str
    balanced: bool
    open: bool
    group: str | None


class GQA(AnnotatedTask):
    """References: GQA's own question file, a dictionary by question id; only balanced questions count."""

    def annotation_files(self, data_root: Root, split: str = "test") -> list[Path]:
        return [self.annotation(data_root, _ANNOTATIONS[one_of(split, _ANNOTATIONS, "split")])]

    def annotations(self, data_root: Root, split: str = "test") -> tuple[dict[str, Question], dict[str, str]]:
        (path,) = self.annotation_files(data_root, split)
        references, broken = {}, {}
        for question_id, record in read_json(path, dict).items():
            try:
                references[question_id] = annotated_question(record, f"{path}, question {question_id}")
            except ValueError as error:
                broken[question_id] = str(error)
        return references, broken

    def counts(self, reference: Question) -> bool:
        return reference.balanced

    def official(self, text: str, reference: Question) -> float:
        return float(gqa_form(text) == gqa_form(reference.answer))

    def legacy(self, text: str, reference: Question) -> float:
        """Only the prediction is put into GQA's form."""
        return float(gqa_form(text) == reference.answer)

    def lenient(self, text: str, reference: Question) -> float:
        return float(forgiving(text, reference.answer) or self.official(text, reference))

    def has_form(self, text: str, reference: Question) -> bool:
        return is_phrase(text, max_words=3)

    def legacy_scores(
        self, rows: Sequence[Mapping[str, Any]], references: Mapping[str, Question]
    ) -> list[float | None]:
        return last_answers_by_id(self, rows, references)

    def legacy_report(
        self,
        rows: Sequence[Mapping[str, Any]],
        scores: Sequence[float | None],
        references: Mapping[str, Question],
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


def annotated_question(record: Mapping[str, Any], where: str) -> Question:
    """An entry of GQA's question file; ValueError, beginning with `where`, for a broken one."""
    types = field(record, "types", dict, where)
    groups = record.get("groups")
    return Question(
        answer=field(record, "answer", str, where),
        balanced=field(record, "isBalanced", bool, where),
        open=field(types, "structural", str, where) == "query",
        group=groups.get("global") if isinstance(groups, Mapping) else None,
    )


def gqa_form(text: str) -> str:
    """GQA's prediction form: no final full stops, lower case."""
    return text.rstrip(".").lower()


def answer_distance(answered: Sequence[tuple[str, Question]]) -> float:
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
