"""VQAv2: v2_OpenEnded_mscoco_<split>_questions.json and v2_mscoco_<split>_annotations.json of train2014 and val2014.

Pictures in COCO2014/<split>/COCO_<split>_<image id, 12 digits>.jpg. The answer is `multiple_choice_answer`, the most
frequent of the ten. Training: one record for all questions of a picture.
"""

from collections.abc import Collection, Iterator

from data.jsonfile import field
from data.prepare.source import Record, Source, annotators, by_picture, text

ANNOTATIONS = ()


def read(source: Source) -> tuple[list[Record], list[Record]]:
    """(training, validation) records; the latter hold all ten answers."""
    train = by_picture(_questions(source, "train2014", drop={"answers"}))
    return train, list(_questions(source, "val2014"))


def _questions(source: Source, split: str, drop: Collection[str] = ()) -> Iterator[Record]:
    given = _answers(source, split, drop)
    for where, _, entry in source.entries(f"v2_OpenEnded_mscoco_{split}_questions.json", list, at="questions"):
        question_id, image_id = field(entry, "question_id", int, where), field(entry, "image_id", int, where)
        if question_id not in given:
            raise ValueError(f"{where}: question_id {question_id} has no annotation; take both files of one release")
        question, extras = text(entry, "question", where), given[question_id]
        if source.answered(question, extras["answer"]):
            image = f"COCO2014/{split}/COCO_{split}_{image_id:012}.jpg"
            yield Record(question_id, image, [(question, extras["answer"])], extras)


def _answers(source: Source, split: str, drop: Collection[str]) -> dict[int, dict]:
    """`answer`, and `answers` unless it is dropped, by question id."""
    given = {}
    for where, _, entry in source.entries(f"v2_mscoco_{split}_annotations.json", list, at="annotations", drop=drop):
        extras = {"answer": text(entry, "multiple_choice_answer", where)}
        if "answers" not in drop:
            extras["answers"] = annotators(entry, where)
        given[field(entry, "question_id", int, where)] = extras
    return given
