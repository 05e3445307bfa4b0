"""VizWiz: questions of blind people on their own pictures, some unanswerable."""

from __future__ import annotations

from eval.tasks.base import OpenQuestionTask


class VizWiz(OpenQuestionTask):
    """A word or phrase: consensus where ten people answered, else exact without regard to case."""

    max_words = 3
