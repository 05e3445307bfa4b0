"""MLLM-DCL (Zhao et al., arXiv 2506.05453): each record says by which rule of the released evaluators it is compared.

    part      the reference stands somewhere in the answer                     medicine
    word      the same; of a reference of one word, at the edge of a word      remote sensing, driving
    whole     the answer is the reference                                      science
    states    the share of the reference's parts, between commas, that the answer has among its own      maps
    choice    the answer without blanks and full stops is the reference        finance

All without regard to case. The released evaluators also call any answer with "Unanswerable" in it wrong.
"""

from __future__ import annotations

from collections.abc import Callable

from data.answers import RuledAnswer
from data.references import RuledFiles
from eval.tasks.base import Task
from eval.tasks.words import forgiving


def at_the_edge_of_a_word(said: str, wanted: str) -> bool:
    """Whether one side of `wanted` in `said` is a blank, or a full stop or comma follows; anywhere, if `said` has no
    blanks or `wanted` has some."""
    if " " in wanted:
        return wanted in said
    wanted = wanted.replace(".", "")
    if " " not in said:
        return wanted in said
    return any(form in said for form in (f" {wanted}", f"{wanted} ", f"{wanted}.", f"{wanted},"))


def states(said: str, wanted: str) -> float:
    """Share of `wanted`'s parts that are parts of `said`, blanks around a part included."""
    parts, found = wanted.split(","), said.split(",")
    return sum(part in found for part in parts) / len(parts)


COMPARE: dict[str, Callable[[str, str], float]] = {
    "part": lambda said, wanted: float(wanted in said),
    "word": lambda said, wanted: float(at_the_edge_of_a_word(said, wanted)),
    "whole": lambda said, wanted: float(said == wanted),
    "states": states,
    "choice": lambda said, wanted: float(said.replace(" ", "").replace(".", "") == wanted),
}


class MLLMDCL(RuledFiles, Task):
    """A text, compared by the rule of its record; lenient forgives punctuation and articles."""

    def official(self, text: str, reference: RuledAnswer) -> float:
        return COMPARE[reference.rule](text.strip().lower(), reference.answer.lower())

    def legacy(self, text: str, reference: RuledAnswer) -> float:
        return 0.0 if "Unanswerable" in text else self.official(text, reference)

    def lenient(self, text: str, reference: RuledAnswer) -> float:
        return max(self.official(text, reference), float(forgiving(text, reference.answer)))

    def has_form(self, text: str, reference: RuledAnswer) -> bool:
        return bool(text.strip())
