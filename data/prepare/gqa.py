"""GQA: train_balanced_questions.json and testdev_balanced_questions.json; pictures in GQA/images/<imageId>.jpg.

The files map question ids to {imageId, question, answer, ...}. Training: one record for all questions of a picture,
72,140 as in CoIN. `answer` is the short one ("yes"), not `fullAnswer`.
"""

from collections.abc import Iterator

from data.prepare.source import Record, Source, by_picture, text

ANNOTATIONS = ("testdev_balanced_questions.json",)
UNUSED = {"annotations", "entailed", "equivalent", "fullAnswer", "groups", "semantic", "semanticStr", "types"}


def read(source: Source) -> tuple[list[Record], list[Record]]:
    """(training, testdev) records."""
    train = by_picture(_questions(source, "train_balanced_questions.json"))
    return train, list(_questions(source, "testdev_balanced_questions.json"))


def _questions(source: Source, name: str) -> Iterator[Record]:
    for where, question_id, entry in source.entries(name, dict, drop=UNUSED):
        question, answer = text(entry, "question", where), text(entry, "answer", where)
        image = f"GQA/images/{text(entry, 'imageId', where)}.jpg"
        if source.answered(question, answer):
            yield Record(question_id, image, [(question, answer)], {"answer": answer})
