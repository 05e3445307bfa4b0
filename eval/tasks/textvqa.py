"""TextVQA: read the text in a picture; ten annotators, scored by their consensus."""

from __future__ import annotations

from pathlib import Path

from eval.tasks.base import AnnotatedTask, Answer, OpenQuestionTask, Root, annotator_answers, field, one_of, read_json
from eval.tasks.words import consensus

_ANNOTATIONS = {"test": "TextVQA_0.5.1_val.json", "dev": "TextVQA_0.5.1_dev.json"}


class TextVQA(AnnotatedTask, OpenQuestionTask):
    """References: the benchmark's annotation file; the question file's single answer is not used."""

    max_words = 5

    def annotation_files(self, data_root: Root, split: str = "test") -> list[Path]:
        return [self.annotation(data_root, _ANNOTATIONS[one_of(split, _ANNOTATIONS, "split")])]

    def annotations(self, data_root: Root, split: str = "test") -> tuple[dict[str, Answer], dict[str, str]]:
        (path,) = self.annotation_files(data_root, split)
        references: dict[str, Answer] = {}
        broken: dict[str, str] = {}
        for position, record in enumerate(field(read_json(path, dict), "data", list, str(path))):
            where = question_id = f"{path}, record {position}"
            try:
                question_id = str(field(record, "question_id", (str, int), where))
                if question_id in references or question_id in broken:
                    raise ValueError(f"{where}: question_id {question_id} occurs twice; ids must be unique")
                annotators = annotator_answers(record, where)
                references[question_id] = Answer(annotators[0], annotators)
            except ValueError as error:
                references.pop(question_id, None)
                broken[question_id] = str(error)
        return references, broken

    def legacy(self, text: str, reference: Answer) -> float:
        return consensus(text, reference.annotators)
