"""TextVQA: read the text in a picture; ten annotators, scored by their consensus."""

from __future__ import annotations

from data.answers import Answer
from data.references import TextVQAFiles
from eval.tasks.base import OpenQuestionTask
from eval.tasks.words import consensus


class TextVQA(TextVQAFiles, OpenQuestionTask):
    """A few words; every reading is of the ten annotators' answers."""

    max_words = 5

    def legacy(self, text: str, reference: Answer) -> float:
        return consensus(text, reference.annotators)
