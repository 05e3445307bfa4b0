"""OCR-VQA: dataset.json, {book id: {imageURL, questions, answers, split: 1 train, 2 validation, 3 test, ...}}.

Pictures in OCR-VQA/images/<book id> with the ending of their URL, as the official loader saves them. Training: one
record for all questions of a book. Test: one record a question, called <book id>-<its number, from 0>.
"""

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from data.jsonfile import field
from data.prepare.source import Record, Source, by_picture, text

ANNOTATIONS = ()
TRAIN, VALIDATION, TEST = 1, 2, 3


def read(source: Source) -> tuple[list[Record], list[Record]]:
    """(training, test) records; the validation split is not used."""
    records: dict[int, list[Record]] = {TRAIN: [], VALIDATION: [], TEST: []}
    for where, book, entry in source.entries("dataset.json", dict, drop={"title", "authorName", "genre"}):
        split = field(entry, "split", int, where)
        if split not in records:
            raise ValueError(f"{where}: split {split} is none of 1, 2, 3; correct the record")
        if split != VALIDATION:
            records[split] += _questions(source, book, entry, where)
    return by_picture(records[TRAIN]), records[TEST]


def _questions(source: Source, book: str, entry: dict[str, Any], where: str) -> Iterator[Record]:
    questions, answers = field(entry, "questions", list, where), field(entry, "answers", list, where)
    if len(questions) != len(answers) or not all(isinstance(value, str) for value in questions + answers):
        raise ValueError(f"{where}: questions and answers must be lists of texts of one length; correct the record")
    ending = PurePosixPath(urlsplit(text(entry, "imageURL", where)).path).suffix
    if not ending:
        raise ValueError(f"{where}: the imageURL's file has no ending such as .jpg; correct the record")
    for number, pair in enumerate(zip(questions, answers, strict=True)):
        question, answer = (value.strip() for value in pair)
        if source.answered(question, answer):
            image = f"OCR-VQA/images/{book}{ending}"
            yield Record(f"{book}-{number}", image, [(question, answer)], {"answer": answer})
