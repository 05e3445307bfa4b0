"""ImageNet: name the object in the picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from data.answers import Answer
from eval.tasks.base import OpenQuestionTask


class ImageNet(OpenQuestionTask):
    """An object's name, without regard to case."""

    max_words = 5

    def legacy(self, text: str, reference: Answer) -> float:
        """Right if either is part of the other: so is the empty answer, and "cat" for a catamaran."""
        return float(reference.answer in text or text in reference.answer)

    def legacy_scores(self, rows: Sequence[Mapping[str, Any]], references: Mapping[str, Answer]) -> list[float | None]:
        """The released evaluator joins by position and never looks at the ids."""
        if len(rows) > len(references):
            raise ValueError(f"{self.name}: {len(rows)} answers to {len(references)} questions; wrong split or data?")
        pairs = zip(rows, references.values(), strict=False)
        return [self.legacy(row["text"], reference) for row, reference in pairs]
