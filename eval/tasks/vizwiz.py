"""VizWiz: questions of blind people on their own pictures, some unanswerable."""

from __future__ import annotations

from collections.abc import Sequence

from eval.tasks.base import OpenQuestionTask
from eval.tasks.vqav2 import on_one_line
from eval.tasks.words import CONTRACTIONS, agreement, plain_words, without_punctuation

# Part of the metric: the VizWiz API's table holds typographic apostrophes, with these exceptions.
_STRAIGHT_BEFORE = {"couldn'tve", "hadn'tve"}
_STRAIGHT_AFTER = {"ain't", "aren't", "can't", "could've", "couldn't", "we've", "where's", "who've"}
_CONTRACTIONS = {
    short if short in _STRAIGHT_BEFORE else short.replace("'", "’"): (
        word if word in _STRAIGHT_AFTER else word.replace("'", "’")
    )
    for short, word in CONTRACTIONS.items()
}


class VizWiz(OpenQuestionTask):
    """A word or phrase: consensus where ten people answered, else exact without regard to case."""

    max_words = 3

    @staticmethod
    def consensus(prediction: str, answers: Sequence[str]) -> float:
        """The rule of the VizWiz API (vqaEval.py, vizwiz.org): the prediction is put into the normal form, the ten
        answers are taken as they are. So no prediction can be right where all ten say "a dog"."""
        said = plain_words(without_punctuation(on_one_line(prediction)), _CONTRACTIONS)
        return agreement([answer == said for answer in answers])
