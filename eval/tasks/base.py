"""What a task is: where its questions and references lie, and three readings of one answer.

Every answer gets three scores between 0 and 1 in one pass:

- official: the benchmark's own metric, answers joined by question id, a missing answer counted as wrong;
- legacy:   what the released evaluators count, their slips included, to repeat published figures;
- lenient:  the form of the answer forgiven, only its content judged.

The gap between official and lenient is forgetting of the answer's form, not of the task.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data import jsonfile
from data.benchmark import Benchmark, TaskSpec, image_root, task_folder
from data.records import questions_of
from eval.tasks.words import ANNOTATORS, consensus, forgiving, is_phrase, lenient_consensus, same

Root = Path | str | Benchmark
MODES = ("official", "legacy", "lenient")
SPLITS = ("test", "dev")


def read_json(path: Path, kind: type) -> Any:
    """Parse a JSON file whose top level must be a `kind` (list or dict).

    Raises FileNotFoundError or ValueError naming the file, as `data.jsonfile.read_json` does.
    """
    content = jsonfile.read_json(path)
    if not isinstance(content, kind) or not content:
        raise ValueError(f"{path}: expected a JSON {kind.__name__} with at least one entry")
    return content


def field(record: Mapping[str, Any], key: str, kind: type | tuple[type, ...], where: str) -> Any:
    """`record[key]`, which must be there and be a `kind`; `where` names file and record in the ValueError.

    True and false are no numbers here.
    """
    value = record.get(key) if isinstance(record, Mapping) else None
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{where}: '{key}' is missing or of the wrong type; correct the record")
    return value


def one_of(value: str, known: Mapping[str, Any] | Sequence[str], what: str) -> str:
    """`value`, which must be one of `known`; ValueError listing them otherwise."""
    if value not in known:
        raise ValueError(f"{what} '{value}' is not known; choose one of {', '.join(known)}")
    return value


def printed(share: float) -> float:
    """A share as the released evaluators print it: percent, two decimals."""
    return float(f"{100 * share:.2f}")


class Fault(NamedTuple):
    """What keeps a question from being scored: its record's number in the question file, a kind, a text with remedy.

    kind: "schema" for a record that is no question, "annotations" for a question whose reference cannot be used.
    """

    record: int
    kind: str
    text: str


class Asked(NamedTuple):
    """A question of the file: its record's number there, the record, and what its answer is compared with."""

    position: int
    record: Mapping[str, Any]
    reference: Any


@dataclass(frozen=True)
class References:
    """What the answers to a question file are scored against.

    asked: by question id (as text) in the file's order, the questions that can be scored. annotated: the references
    that the released evaluator loads, which an annotation file may hold for questions that are never asked. faults:
    why the other records cannot be scored. ids: of all questions, those with faults too.
    """

    path: Path
    asked: dict[str, Asked]
    annotated: dict[str, Any]
    faults: list[Fault]
    ids: frozenset[str]

    def whole(self) -> References:
        """Return these references. Raises ValueError naming the file and the first record with a fault, if any."""
        if self.faults:
            others = f" (and {len(self.faults) - 1} more records)" if len(self.faults) > 1 else ""
            raise ValueError(f"{self.path}, {self.faults[0].text}{others}")
        return self


class Task(ABC):
    """One task: subclasses say how references are loaded and how an answer is scored against one."""

    legacy_missing: float | None = None  # most released evaluators do not notice a missing answer

    def __init__(self, spec: TaskSpec):
        self.spec, self.name = spec, spec.name

    # --- where things lie ---

    def folder(self, data_root: Root, instructions: str = "original") -> Path:
        """The task's folder below the instruction set; raises as `Benchmark.folder` does."""
        return task_folder(data_root, instructions, self.name)

    def question_file(self, data_root: Root, instructions: str = "original", split: str = "test") -> Path:
        """The file with the questions of `split`, dev or the one that is evaluated."""
        name = self.spec.dev if one_of(split, SPLITS, "split") == "dev" else self.spec.test
        return self.folder(data_root, instructions) / name

    def train_file(self, data_root: Root, instructions: str = "original") -> Path:
        """The task's training file."""
        return self.folder(data_root, instructions) / self.spec.train

    def annotation(self, data_root: Root, name: str) -> Path:
        """An official annotation file of the task, which lies with its pictures."""
        return image_root(data_root) / self.spec.folders[0] / name

    def annotation_files(self, data_root: Root, split: str = "test") -> list[Path]:
        """The official annotation files that the references are read from; none if they stand in the question file."""
        return []

    # --- questions and references ---

    def read_questions(
        self, data_root: Root, instructions: str = "original", split: str = "test"
    ) -> tuple[dict[str, tuple[int, Mapping[str, Any]]], list[Fault]]:
        """(record number, record) by question id (as text) in file order, and what is wrong with other records.

        Raises FileNotFoundError or ValueError for a file that is no list of records.
        """
        records, problems = read_json(self.question_file(data_root, instructions, split), list), []
        questions = {str(one.question_id): (one.index, records[one.index]) for one in questions_of(records, problems)}
        faults = [Fault(problem.record, "schema", problem.text) for problem in problems]
        return questions, faults

    def read_references(self, data_root: Root, instructions: str = "original", split: str = "test") -> References:
        """The questions of a file with their references, and the faults of those that cannot be scored.

        Raises FileNotFoundError or ValueError for files that cannot be read at all.
        """
        questions, faults = self.read_questions(data_root, instructions, split)
        asked = {}
        for question_id, (position, record) in questions.items():
            try:
                reference = self.reference_of(record, f"record {position}, question_id {question_id}")
                asked[question_id] = Asked(position, record, reference)
            except ValueError as error:
                faults.append(Fault(position, "annotations", str(error)))
        annotated = {question_id: question.reference for question_id, question in asked.items()}
        path = self.question_file(data_root, instructions, split)
        return References(path, asked, annotated, sorted(faults), frozenset(questions))

    def load_references(self, data_root: Root, instructions: str = "original", split: str = "test") -> dict[str, Any]:
        """References by question id (as text), in file order; ValueError names a record that cannot be used."""
        return self.read_references(data_root, instructions, split).whole().annotated

    def check_questions(self, data_root: Root, instructions: str = "original", split: str = "test") -> list[Fault]:
        """Every question whose reference is missing or broken, for a check before anything is trained.

        A fault has the record's number in the question file; its text names record, question id and remedy. A file
        that cannot be read at all is one fault of record 0. What is wrong with a record as a question (its id or
        text) is not in the list: whoever reads the questions says that.
        """
        try:
            faults = self.read_references(data_root, instructions, split).faults
        except (ValueError, OSError) as error:
            return [Fault(0, "annotations", str(error))]
        return [fault for fault in faults if fault.kind == "annotations"]

    # --- what a subclass says ---

    @abstractmethod
    def reference_of(self, record: Mapping[str, Any], where: str) -> Any:
        """The reference in a question's record; ValueError, beginning with `where`, for one that cannot be used."""

    @abstractmethod
    def official(self, text: str, reference: Any) -> float:
        """Score of one answer in [0, 1] by the benchmark's own rule."""

    @abstractmethod
    def legacy(self, text: str, reference: Any) -> float:
        """Score of one answer in [0, 1] by the released evaluator."""

    @abstractmethod
    def lenient(self, text: str, reference: Any) -> float:
        """Score of one answer in [0, 1] with its form forgiven; never below official."""

    @abstractmethod
    def has_form(self, text: str, reference: Any) -> bool:
        """Whether the answer has the form the task asks for, right or wrong."""

    def counts(self, reference: Any) -> bool:
        """Whether the benchmark counts this question at all."""
        return True

    # --- the released evaluators ---

    def legacy_scores(self, rows: Sequence[Mapping[str, Any]], references: Mapping[str, Any]) -> list[float | None]:
        """One legacy score per answer row; None where the released evaluator does not count the row.

        Here, as in most of them, every row counts, joined by id; ValueError for an id without reference.
        """
        scores: list[float | None] = []
        for row in rows:
            question_id = str(row["question_id"])
            if question_id not in references:
                raise ValueError(f"{self.name}: answer to unknown question_id {question_id}; wrong split or data?")
            scores.append(self.legacy(row["text"], references[question_id]))
        return scores

    def legacy_accuracy(self, scores: Sequence[float | None], references: Mapping[str, Any]) -> float:
        """Share in [0, 1]: the mean over the answers present."""
        counted = [score for score in scores if score is not None]
        return sum(counted) / len(counted) if counted else 0.0

    def legacy_report(
        self,
        rows: Sequence[Mapping[str, Any]],
        scores: Sequence[float | None],
        references: Mapping[str, Any],
    ) -> dict[str, float]:
        """The figures the released evaluator prints, rounded as it prints them."""
        return {
            "Samples": sum(score is not None for score in scores),
            "Accuracy": printed(self.legacy_accuracy(scores, references)),
        }

    # --- the question-only baseline ---

    def can_be_constant(self, answer: str) -> bool:
        """Whether a training answer is of the kind that `best_constant` chooses from."""
        return True

    def best_constant(self, answers: Sequence[str]) -> str:
        """The one answer to give to all of these: the most frequent, the first seen of equals."""
        return Counter(answers).most_common(1)[0][0]


class AnnotatedTask(Task):
    """Tasks whose references stand in official annotation files. A question that is never asked counts nowhere."""

    @abstractmethod
    def annotations(self, data_root: Root, split: str = "test") -> tuple[dict[str, Any], dict[str, str]]:
        """References by question id (as text), in file order, and what is wrong with other entries, by id.

        Raises FileNotFoundError or ValueError for a file that cannot be read at all.
        """

    def reference_of(self, record: Mapping[str, Any], where: str) -> Any:
        raise ValueError(f"{where}: references of {self.name} stand in its annotation files, not in the record")

    def load_references(self, data_root: Root, instructions: str = "original", split: str = "test") -> dict[str, Any]:
        """References of all annotated questions, asked or not, as the released evaluators load them."""
        references, broken = self.annotations(data_root, split)
        for problem in broken.values():
            raise ValueError(problem)
        return references

    def read_references(self, data_root: Root, instructions: str = "original", split: str = "test") -> References:
        """As for other tasks. Without a question file (answers are scored alone) all annotated questions are asked."""
        references, broken = self.annotations(data_root, split)
        files = self.annotation_files(data_root, split)
        try:
            questions, faults = self.read_questions(data_root, instructions, split)
            path = self.question_file(data_root, instructions, split)
        except FileNotFoundError:
            questions = {key: (position, {}) for position, key in enumerate([*references, *broken])}
            faults, path = [], files[0]
        asked = {}
        for question_id, (position, record) in questions.items():
            if question_id in references:
                asked[question_id] = Asked(position, record, references[question_id])
                continue
            names = " and ".join(str(file) for file in files)
            unknown = f"{names}: no entry for it; take the files of one release, or remove the question"
            text = f"record {position}, question_id {question_id}: {broken.get(question_id, unknown)}"
            faults.append(Fault(position, "annotations", text))
        return References(path, asked, references, sorted(faults), frozenset([*questions, *references]))


def last_answers_by_id(
    task: Task, rows: Sequence[Mapping[str, Any]], references: Mapping[str, Any]
) -> list[float | None]:
    """Legacy scores of evaluators that read answers into a dictionary: the last of doubled ids counts,
    ids without a reference are passed over."""
    last = {str(row["question_id"]): position for position, row in enumerate(rows)}
    scores: list[float | None] = []
    for position, row in enumerate(rows):
        question_id = str(row["question_id"])
        reference = references.get(question_id)
        counted = reference is not None and last[question_id] == position and task.counts(reference)
        scores.append(task.legacy(row["text"], reference) if counted else None)
    return scores


@dataclass(frozen=True)
class Answer:
    """Reference of an open question: the file's single answer, and the ten annotators' where they exist."""

    answer: str
    annotators: tuple[str, ...] = ()


class OpenQuestionTask(Task):
    """Tasks whose references stand in the question file: `answer`, and optionally `answers`, a list of ten.

    official: with ten answers their `consensus`, here TextVQA's, else the whole answer compared without regard to case.
    lenient: the consensus of normal forms, whatever the benchmark's own rule is.
    """

    max_words = 15  # of an answer in the form that is asked for
    consensus = staticmethod(consensus)

    def reference_of(self, record: Mapping[str, Any], where: str) -> Answer:
        annotators = annotator_answers(record, where) if "answers" in record else ()
        return Answer(field(record, "answer", str, where), annotators)

    def official(self, text: str, reference: Answer) -> float:
        if reference.annotators:
            return self.consensus(text, reference.annotators)
        return float(same(text, reference.answer))

    def legacy(self, text: str, reference: Answer) -> float:
        return float(text.upper() == reference.answer.upper())

    def lenient(self, text: str, reference: Answer) -> float:
        if reference.annotators:
            return max(self.official(text, reference), lenient_consensus(text, reference.annotators))
        return float(forgiving(text, reference.answer))

    def has_form(self, text: str, reference: Answer) -> bool:
        return is_phrase(text, self.max_words)


def annotator_answers(record: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """The ten annotators' answers of a record; ValueError naming the record if there are not ten texts."""
    answers = field(record, "answers", list, where)
    if len(answers) != ANNOTATORS or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"{where}: 'answers' must hold {ANNOTATORS} texts; consensus is defined on {ANNOTATORS}")
    return tuple(answers)
