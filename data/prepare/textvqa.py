"""TextVQA: TextVQA_0.5.1_{train,val}.json; pictures of both in TextVQA/train_images/<image_id>.jpg.

With TextVQA_Rosetta_OCR_v0.2_{train,val}.json beside them the question is followed by what that OCR read, as in
LLaVA-1.5 and CoIN: "Reference OCR token: " and the tokens with ", " between them, none if it read nothing.
The training answer is the most frequent of the ten.
"""

from collections.abc import Iterator

from data.jsonfile import field
from data.prepare.source import Record, Source, most_frequent, text
from data.references import annotator_answers

ANNOTATIONS = ("TextVQA_0.5.1_val.json",)
OCR = "TextVQA_Rosetta_OCR_v0.2_{}.json"


def read(source: Source) -> tuple[list[Record], list[Record]]:
    """(training, validation) records. Raises FileNotFoundError if only one split has its OCR file."""
    with_ocr = any((source.folder / OCR.format(split)).is_file() for split in ("train", "val"))
    if not with_ocr:
        source.notes.append(f"prompts have no 'Reference OCR token' line: no {OCR.format('{train,val}')} in the source")
    return list(_questions(source, "train", with_ocr)), list(_questions(source, "val", with_ocr))


def _questions(source: Source, split: str, with_ocr: bool) -> Iterator[Record]:
    tokens = _tokens(source, split) if with_ocr else {}
    for where, _, entry in source.entries(f"TextVQA_0.5.1_{split}.json", list, at="data"):
        question_id, image_id = field(entry, "question_id", int, where), text(entry, "image_id", where)
        question, answers = text(entry, "question", where), annotator_answers(entry, where)
        answer = most_frequent(answers)
        if not source.answered(question, answer):
            continue
        if with_ocr:
            if image_id not in tokens:
                raise ValueError(
                    f"{where}: image_id {image_id} is not in {OCR.format(split)}; take both of one release"
                )
            question += f"\nReference OCR token: {', '.join(tokens[image_id])}"
        image = f"TextVQA/train_images/{image_id}.jpg"
        yield Record(question_id, image, [(question, answer)], {"answer": answer})


def _tokens(source: Source, split: str) -> dict[str, list[str]]:
    """The words that Rosetta read, by image id."""
    return {
        text(entry, "image_id", where): list(map(str, field(entry, "ocr_tokens", list, where)))
        for where, _, entry in source.entries(OCR.format(split), list, at="data", drop={"ocr_info"})
    }
