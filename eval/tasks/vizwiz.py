"""VizWiz: questions of blind people on their own pictures, some unanswerable."""

from __future__ import annotations

from eval.tasks.base import Answer, OpenQuestionTask
from eval.tasks.words import is_phrase


class VizWiz(OpenQuestionTask):
    """A word or phrase: consensus where ten people answered, else exact without regard to case."""

    name = "VizWiz"
    eval_file = "val.json"

    def has_form(self, text: str, reference: Answer) -> bool:
        return is_phrase(text, max_words=3)
