"""Captions, scored by CIDEr-D against several references, over a whole test set at once.

CIDEr (Vedantam et al., arXiv 1411.5726) weighs n-grams by how rare they are among the references of all pictures: a
part of a test set scores otherwise than the whole, and an answer has no score by itself. An identical caption of one,
two or three words gets 2.5, 5 or 7.5 of the 10 that one of four words or more can reach. Scores here are shares of
those 10: a published CIDEr of 120 is 12 percent.

The scorer is pycocoevalcap's. Its tokenizer, Stanford's PTBTokenizer, needs Java; nltk's tokenizer of the same
conventions takes its place, with the same signs taken out afterwards. Of captions they differ in rare forms alone, as
e-mail addresses (tests/test_eval_caption.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from data.references import TextFiles
from eval.tasks.base import Task

HIGHEST = 10.0
LEFT_OUT = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
# The original lowers the case before it looks for -LRB-, so that brackets stay.
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}


@cache
def _tokenizer():
    from nltk.tokenize import NLTKWordTokenizer  # no other task asks for it

    return NLTKWordTokenizer()


def caption_words(text: str) -> str:
    """The words of a caption, lower case, with blanks between them."""
    tokens = _tokenizer().tokenize(" ".join(text.lower().split()))
    return " ".join(BRACKETS.get(token, token) for token in tokens if token not in LEFT_OUT)


class Caption(TextFiles, Task):
    """A sentence about a picture; the references are `answers`."""

    joint = True

    def official_scores(
        self, texts: Sequence[str], references: Sequence[tuple[str, ...]], others: Sequence[tuple[str, ...]]
    ) -> list[float]:
        """CIDEr-D / 10 of every text; `others` are the references of questions without an answer, which count as
        pictures."""
        from pycocoevalcap.cider.cider_scorer import CiderScorer

        scorer = CiderScorer()
        for text, own in (*zip(texts, references, strict=True), *(("", own) for own in others)):
            scorer += (caption_words(text), [caption_words(one) for one in own])
        _, scores = scorer.compute_score()
        return [min(1.0, float(score) / HIGHEST) for score in scores[: len(texts)]]

    def official(self, text: str, reference: tuple[str, ...]) -> float:
        raise TypeError("CIDEr scores a whole test set, not one answer")

    legacy = lenient = official

    def right_answer(self, reference: tuple[str, ...]) -> str:
        return " | ".join(reference)

    def has_form(self, text: str, reference: tuple[str, ...]) -> bool:
        return bool(text.strip())
