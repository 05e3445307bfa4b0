"""OCR-VQA: title, author, genre and more of a book from its cover."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from data.answers import Answer
from eval.tasks.base import OpenQuestionTask


class OCRVQA(OpenQuestionTask):
    """A phrase from a book's cover, without regard to case; titles and subtitles are long."""

    def legacy(self, text: str, reference: Answer) -> float:
        """Whatever mentions "Unanswerable" is wrong, even if the reference says so."""
        return 0.0 if "Unanswerable" in text else super().legacy(text, reference)

    def legacy_report(
        self,
        rows: Sequence[Mapping[str, Any]],
        scores: Sequence[float | None],
        references: Mapping[str, Answer],
    ) -> dict[str, float]:
        """The released evaluator prints the length of a list it never fills as the number of samples."""
        return super().legacy_report(rows, scores, references) | {"Samples": 0}
