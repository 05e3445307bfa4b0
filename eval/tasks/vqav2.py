"""VQAv2: open questions on everyday pictures: yes/no, counts, colours, things."""

from __future__ import annotations

from eval.tasks.base import OpenQuestionTask


class VQAv2(OpenQuestionTask):
    """A word or phrase: consensus where ten people answered, else exact without regard to case."""

    max_words = 3
