"""One of some texts, as it stands."""

from __future__ import annotations

from data.references import TextFiles
from eval.tasks.base import Task
from eval.tasks.words import forgiving, same


class ExactText(TextFiles, Task):
    """The whole of one of the reference texts, without regard to case; lenient forgives punctuation and articles."""

    def official(self, text: str, reference: tuple[str, ...]) -> float:
        return float(any(same(text, one) for one in reference))

    def legacy(self, text: str, reference: tuple[str, ...]) -> float:
        return self.official(text, reference)

    def lenient(self, text: str, reference: tuple[str, ...]) -> float:
        return float(any(forgiving(text, one) for one in reference))

    def right_answer(self, reference: tuple[str, ...]) -> str:
        return " | ".join(reference)

    def has_form(self, text: str, reference: tuple[str, ...]) -> bool:
        return bool(text.strip())
