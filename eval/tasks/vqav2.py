"""VQAv2: open questions on everyday pictures: yes/no, counts, colours, things."""

from __future__ import annotations

from eval.tasks.base import Answer, OpenQuestionTask
from eval.tasks.words import is_phrase


class VQAv2(OpenQuestionTask):
    """A word or phrase: consensus where ten people answered, else exact without regard to case."""

    name = "VQAv2"
    eval_file = "val.json"
    max_new_tokens = 1024

    def has_form(self, text: str, reference: Answer) -> bool:
        return is_phrase(text, max_words=3)
