"""TextVQA: read the text in a picture; ten annotators, scored by their consensus."""

from __future__ import annotations

from eval.tasks.base import Answer, OpenQuestionTask, Root, annotator_answers, field, one_of, read_json
from eval.tasks.words import consensus

_ANNOTATIONS = {"test": "TextVQA_0.5.1_val.json", "dev": "TextVQA_0.5.1_dev.json"}


class TextVQA(OpenQuestionTask):
    """References: the benchmark's annotation file; the question file's single answer is not used."""

    max_words = 5

    def load_references(
        self, data_root: Root, instructions: str = "original", split: str = "test"
    ) -> dict[str, Answer]:
        path = self.annotation(data_root, _ANNOTATIONS[one_of(split, _ANNOTATIONS, "split")])
        references: dict[str, Answer] = {}
        for position, record in enumerate(field(read_json(path, dict), "data", list, str(path))):
            where = f"{path}, record {position}"
            question_id = str(field(record, "question_id", (str, int), where))
            if question_id in references:
                raise ValueError(f"{where}: question_id {question_id} occurs twice; ids must be unique")
            annotators = annotator_answers(record, where)
            references[question_id] = Answer(annotators[0], annotators)
        return references

    def legacy(self, text: str, reference: Answer) -> float:
        return consensus(text, reference.annotators)
