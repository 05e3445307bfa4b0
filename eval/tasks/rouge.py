"""Free text, scored by how much of it a reference has in the same order."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from data.references import TextFiles
from eval.tasks.base import Task


@cache
def _scorer():
    from rouge_score.rouge_scorer import RougeScorer  # brings nltk along, which no other task asks for

    return RougeScorer(["rougeL"], use_stemmer=True)


def rouge_l(text: str, references: Sequence[str]) -> float:
    """ROUGE-L's F measure of words without their endings, against the nearest of the references: as the evaluation of
    Super-NaturalInstructions (arXiv 2204.07705) has it. Words are Latin letters and digits; others score 0."""
    return max(_scorer().score(reference, text)["rougeL"].fmeasure for reference in references)


class RougeL(TextFiles, Task):
    """Any text, in the official and in every other reading; the form that is asked for is to say something."""

    def official(self, text: str, reference: tuple[str, ...]) -> float:
        return rouge_l(text, reference)

    def legacy(self, text: str, reference: tuple[str, ...]) -> float:
        return rouge_l(text, reference)

    def lenient(self, text: str, reference: tuple[str, ...]) -> float:
        return rouge_l(text, reference)

    def right_answer(self, reference: tuple[str, ...]) -> str:
        return " | ".join(reference)

    def has_form(self, text: str, reference: tuple[str, ...]) -> bool:
        return bool(text.strip())
