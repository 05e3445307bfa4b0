"""VQAv2: open questions on everyday pictures: yes/no, counts, colours, things."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from eval.tasks.base import OpenQuestionTask
from eval.tasks.words import CONTRACTIONS, agreement, plain_words, without_punctuation


class VQAv2(OpenQuestionTask):
    """A word or phrase: consensus where ten people answered, else exact without regard to case."""

    max_words = 3

    @staticmethod
    def consensus(prediction: str, answers: Sequence[str]) -> float:
        """The rule of the VQA API (vqaEval.py, github.com/GT-Vision-Lab/VQA): only where the ten answers are not all
        the same are they, and the prediction, put into the normal form. So "Yes" is wrong where all ten say "yes"."""
        prediction, *answers = (on_one_line(text) for text in (prediction, *answers))
        if len(set(answers)) > 1:
            prediction, *answers = (vqa_form(text) for text in (prediction, *answers))
        return agreement([answer == prediction for answer in answers])


def on_one_line(text: str) -> str:
    """A text without line ends, tabs and surrounding space."""
    return text.replace("\n", " ").replace("\t", " ").strip()


@lru_cache(maxsize=100_000)
def vqa_form(text: str) -> str:
    """The VQA API's normal form of a text on one line."""
    return plain_words(without_punctuation(text), CONTRACTIONS)
