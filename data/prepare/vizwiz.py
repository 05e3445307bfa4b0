"""VizWiz: train.json and val.json, lists of {image, question, answers: [{answer, ...}]}; pictures in VizWiz/<split>/.

The answer is the most frequent of the ten, which may be "unanswerable". A picture has one question and names it.
"""

from collections.abc import Iterator
from pathlib import Path

from data.prepare.source import Record, Source, annotators, most_frequent, text

ANNOTATIONS = ()


def read(source: Source) -> tuple[list[Record], list[Record]]:
    """(training, validation) records; the latter hold all ten answers."""
    return list(_questions(source, "train")), list(_questions(source, "val"))


def _questions(source: Source, split: str) -> Iterator[Record]:
    for where, _, entry in source.entries(f"{split}.json", list):
        image, question = text(entry, "image", where), text(entry, "question", where)
        answers = annotators(entry, where)
        answer = most_frequent(answers)
        if source.answered(question, answer):
            extras = {"answer": answer, "answers": answers}
            yield Record(Path(image).stem, f"VizWiz/{split}/{image}", [(question, answer)], extras)
