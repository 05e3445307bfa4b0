"""References: what the answers to a task's questions are compared with, by the name under `scoring` in a description.

They stand in the question file, or in official annotation files beside the pictures. eval/tasks/ has the scorers.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data.answers import RULES, Answer, GQAAnswer, Options, Region, RuledAnswer
from data.benchmark import Benchmark, TaskSpec, image_root, open_benchmark, task_folder
from data.boxes import exact_box
from data.jsonfile import field, one_of, read_json_of
from data.records import Problem, questions_of

Root = Path | str | Benchmark
SPLITS = ("test", "dev")
ANNOTATORS = 10
SCIENCEQA_SPLITS = {"test": "test", "dev": "val"}
GQA_NAMES = {"test": "testdev_balanced_questions.json", "dev": "dev_balanced_questions.json"}
TEXTVQA_NAMES = {"test": "TextVQA_0.5.1_val.json", "dev": "TextVQA_0.5.1_dev.json"}
LETTERS = "ABCDE"


class Asked(NamedTuple):
    """A question of the file: its record's number there, the record, and what its answer is compared with."""

    position: int
    record: Mapping[str, Any]
    reference: Any


@dataclass(frozen=True)
class References:
    """What the answers to a question file are scored against.

    asked: by question id (as text) in the file's order, the questions that can be scored. annotated: the references
    that the released evaluator loads, which an annotation file may hold for questions that are never asked. problems:
    why the other records cannot be scored. ids: of all questions, those with problems too.
    """

    path: Path
    asked: dict[str, Asked]
    annotated: dict[str, Any]
    problems: list[Problem]
    ids: frozenset[str]

    def whole(self) -> "References":
        """Return these references. Raises ValueError naming the file and the first record with a problem, if any."""
        if self.problems:
            others = f" (and {len(self.problems) - 1} more records)" if len(self.problems) > 1 else ""
            raise ValueError(f"{self.path}, {self.problems[0].text}{others}")
        return self


class TaskFiles(ABC):
    """The files of a task, and its references. Subclasses say how a reference is read from a question's record."""

    def __init__(self, spec: TaskSpec):
        self.spec, self.name = spec, spec.name

    def folder(self, root: Root, instructions: str = "original") -> Path:
        """The task's folder below the instruction set; raises as `Benchmark.folder` does."""
        return task_folder(root, instructions, self.name)

    def question_file(self, root: Root, instructions: str = "original", split: str = "test") -> Path:
        """The file with the questions of `split`, dev or the one that is evaluated."""
        name = self.spec.dev if one_of(split, SPLITS, "split") == "dev" else self.spec.test
        return self.folder(root, instructions) / name

    def train_file(self, root: Root, instructions: str = "original") -> Path:
        """The task's training file."""
        return self.folder(root, instructions) / self.spec.train

    def annotation(self, root: Root, name: str) -> Path:
        """An official annotation file of the task, which lies with its pictures."""
        return image_root(root) / self.spec.folders[0] / name

    def annotation_files(self, root: Root, split: str = "test") -> list[Path]:
        """The official annotation files that the references are read from; none if they stand in the question file."""
        return []

    def read_questions(
        self, root: Root, instructions: str = "original", split: str = "test"
    ) -> tuple[dict[str, tuple[int, Mapping[str, Any]]], list[Problem]]:
        """(record number, record) by question id (as text) in file order, and what is wrong with other records.

        Raises FileNotFoundError or ValueError for a file that is no list of records.
        """
        problems: list[Problem] = []
        records = read_json_of(self.question_file(root, instructions, split), list)
        questions = {str(one.question_id): (one.index, records[one.index]) for one in questions_of(records, problems)}
        return questions, problems

    def read_references(self, root: Root, instructions: str = "original", split: str = "test") -> References:
        """The questions of a file with their references, and what is wrong with those that cannot be scored.

        Raises FileNotFoundError or ValueError for files that cannot be read at all.
        """
        questions, problems = self.read_questions(root, instructions, split)
        asked = {}
        for question_id, (position, record) in questions.items():
            try:
                reference = self.reference_of(record, f"record {position}, question_id {question_id}")
                asked[question_id] = Asked(position, record, reference)
            except ValueError as error:
                problems.append(Problem(position, "annotations", str(error)))
        annotated = {question_id: question.reference for question_id, question in asked.items()}
        path = self.question_file(root, instructions, split)
        return References(path, asked, annotated, sorted(problems), frozenset(questions))

    def load_references(self, root: Root, instructions: str = "original", split: str = "test") -> dict[str, Any]:
        """References by question id (as text), in file order; ValueError names a record that cannot be used."""
        return self.read_references(root, instructions, split).whole().annotated

    def check_questions(self, root: Root, instructions: str = "original", split: str = "test") -> list[Problem]:
        """Every question whose reference is missing or broken, for a check before anything is trained.

        A problem has the record's number in the question file; its text names record, question id and remedy. A file
        that cannot be read at all is one problem of record 0. What is wrong with a record as a question (its id or
        text) is not in the list: whoever reads the questions says that.
        """
        try:
            problems = self.read_references(root, instructions, split).problems
        except (ValueError, OSError) as error:
            return [Problem(0, "annotations", str(error))]
        return [problem for problem in problems if problem.kind == "annotations"]

    @abstractmethod
    def reference_of(self, record: Mapping[str, Any], where: str) -> Any:
        """The reference in a question's record; ValueError, beginning with `where`, for one that cannot be used."""


class AnnotatedFiles(TaskFiles):
    """Tasks whose references stand in official annotation files. A question that is never asked counts nowhere."""

    @abstractmethod
    def annotations(self, root: Root, split: str = "test") -> tuple[dict[str, Any], dict[str, str]]:
        """References by question id (as text), in file order, and what is wrong with other entries, by id.

        Raises FileNotFoundError or ValueError for a file that cannot be read at all.
        """

    def reference_of(self, record: Mapping[str, Any], where: str) -> Any:
        raise ValueError(f"{where}: references of {self.name} stand in its annotation files, not in the record")

    def load_references(self, root: Root, instructions: str = "original", split: str = "test") -> dict[str, Any]:
        """References of all annotated questions, asked or not, as the released evaluators load them."""
        references, broken = self.annotations(root, split)
        for problem in broken.values():
            raise ValueError(problem)
        return references

    def read_references(self, root: Root, instructions: str = "original", split: str = "test") -> References:
        """As for other tasks. Without a question file (answers are scored alone) all annotated questions are asked."""
        references, broken = self.annotations(root, split)
        files = self.annotation_files(root, split)
        try:
            questions, problems = self.read_questions(root, instructions, split)
            path = self.question_file(root, instructions, split)
        except FileNotFoundError:
            questions = {key: (position, {}) for position, key in enumerate([*references, *broken])}
            problems, path = [], files[0]
        asked = {}
        for question_id, (position, record) in questions.items():
            if question_id in references:
                asked[question_id] = Asked(position, record, references[question_id])
                continue
            names = " and ".join(str(file) for file in files)
            unknown = f"{names}: no entry for it; take the files of one release, or remove the question"
            text = f"record {position}, question_id {question_id}: {broken.get(question_id, unknown)}"
            problems.append(Problem(position, "annotations", text))
        return References(path, asked, references, sorted(problems), frozenset([*questions, *references]))


# --- open questions ---


class OpenFiles(TaskFiles):
    """References in the question file: `answer`, and optionally `answers`, a list of ten."""

    def reference_of(self, record: Mapping[str, Any], where: str) -> Answer:
        annotators = annotator_answers(record, where) if "answers" in record else ()
        return Answer(field(record, "answer", str, where), annotators)


class TextFiles(TaskFiles):
    """References in the question file: `answers`, texts of which each is right, or `answer` alone."""

    def reference_of(self, record: Mapping[str, Any], where: str) -> tuple[str, ...]:
        answers = field(record, "answers" if "answers" in record else "answer", (list, str), where)
        answers = [answers] if isinstance(answers, str) else answers
        if not answers or not all(isinstance(one, str) for one in answers):
            raise ValueError(f"{where}: 'answers' must hold texts, one at least")
        return tuple(answers)


class RuledFiles(TaskFiles):
    """References in the question file: `answer`, and `rule`, one of RULES."""

    def reference_of(self, record: Mapping[str, Any], where: str) -> RuledAnswer:
        rule = one_of(field(record, "rule", str, where), RULES, f"{where}: 'rule'")
        return RuledAnswer(field(record, "answer", str, where), rule)


def annotator_answers(record: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """The ten annotators' answers of a record; ValueError naming the record if there are not ten texts."""
    answers = field(record, "answers", list, where)
    if len(answers) != ANNOTATORS or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"{where}: 'answers' must hold {ANNOTATORS} texts; consensus is defined on {ANNOTATORS}")
    return tuple(answers)


class TextVQAFiles(AnnotatedFiles):
    """References: the benchmark's annotation file; the question file's single answer is not used."""

    def annotation_files(self, root: Root, split: str = "test") -> list[Path]:
        return [self.annotation(root, TEXTVQA_NAMES[one_of(split, TEXTVQA_NAMES, "split")])]

    def annotations(self, root: Root, split: str = "test") -> tuple[dict[str, Answer], dict[str, str]]:
        (path,) = self.annotation_files(root, split)
        references: dict[str, Answer] = {}
        broken: dict[str, str] = {}
        for position, record in enumerate(field(read_json_of(path, dict), "data", list, str(path))):
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


class GQAFiles(AnnotatedFiles):
    """References: GQA's own question file, a dictionary by question id; only balanced questions count."""

    def annotation_files(self, root: Root, split: str = "test") -> list[Path]:
        return [self.annotation(root, GQA_NAMES[one_of(split, GQA_NAMES, "split")])]

    def annotations(self, root: Root, split: str = "test") -> tuple[dict[str, GQAAnswer], dict[str, str]]:
        (path,) = self.annotation_files(root, split)
        references, broken = {}, {}
        for question_id, record in read_json_of(path, dict).items():
            try:
                references[question_id] = _gqa_answer(record, f"{path}, question {question_id}")
            except ValueError as error:
                broken[question_id] = str(error)
        return references, broken


def _gqa_answer(record: Mapping[str, Any], where: str) -> GQAAnswer:
    types = field(record, "types", dict, where)
    groups = record.get("groups")
    return GQAAnswer(
        answer=field(record, "answer", str, where),
        balanced=field(record, "isBalanced", bool, where),
        open=field(types, "structural", str, where) == "query",
        group=groups.get("global") if isinstance(groups, Mapping) else None,
    )


# --- multiple choice ---


class ChoiceFiles(TaskFiles):
    """References in the question file: `answer`, a letter, and optionally `choices`, the options' texts."""

    def reference_of(self, record: Mapping[str, Any], where: str) -> Options:
        letter = field(record, "answer", str, where)
        choices = field(record, "choices", list, where) if "choices" in record else [""] * len(LETTERS)
        if letter not in tuple(LETTERS[: len(choices)]):
            raise ValueError(f"{where}: answer '{letter}' is no letter of its {len(choices)} options")
        return Options(tuple(map(str, choices)), LETTERS.index(letter))


class ScienceQAFiles(AnnotatedFiles):
    """References: problems.json for the pids of pid_splits.json, the whole split."""

    def annotation_files(self, root: Root, split: str = "test") -> list[Path]:
        one_of(split, SCIENCEQA_SPLITS, "split")
        return [self.annotation(root, name) for name in ("pid_splits.json", "problems.json")]

    def annotations(self, root: Root, split: str = "test") -> tuple[dict[str, Options], dict[str, str]]:
        splits, file = self.annotation_files(root, split)
        pids = field(read_json_of(splits, dict), SCIENCEQA_SPLITS[split], list, str(splits))
        problems = read_json_of(file, dict)
        references, broken = {}, {}
        for pid in map(str, pids):
            try:
                references[pid] = _scienceqa_options(problems, pid, str(file))
            except ValueError as error:
                broken[pid] = str(error)
        return references, broken


def _scienceqa_options(problems: Mapping[str, Any], pid: str, file: str) -> Options:
    where = f"{file}, problem {pid}"
    record = field(problems, pid, dict, where)
    choices, answer = field(record, "choices", list, where), field(record, "answer", int, where)
    if not 0 <= answer < len(choices) <= len(LETTERS):
        raise ValueError(f"{where}: answer {answer} of {len(choices)} choices; 1 to {len(LETTERS)} can be asked")
    return Options(tuple(map(str, choices)), answer)


# --- boxes ---


class BoxFiles(TaskFiles):
    """References in the question file: `answer_bbox`, in fractions of the padded square or within a `box_frame` [x, y]
    (llava/boxes.py), and optionally `size`."""

    def reference_of(self, record: Mapping[str, Any], where: str) -> Region:
        answer = field(record, "answer_bbox", str, where)
        if exact_box(answer) is None:
            raise ValueError(f"{where}: answer_bbox '{answer}' is not [x1, y1, x2, y2]; correct the record")
        size = field(record, "size", list, where) if "size" in record else [1]
        if not size or not all(isinstance(side, int | float) for side in size):
            raise ValueError(f"{where}: size {size} is not [width, height] in pixels; correct the record")
        frame = field(record, "box_frame", list, where) if "box_frame" in record else [1, 1]
        if len(frame) != 2 or not all(isinstance(side, int | float) and side > 0 for side in frame):
            raise ValueError(f"{where}: box_frame {frame} is not the largest [x, y]; correct the record")
        # The size multiplies both boxes and cancels but for rounding: it may be left out.
        return Region(answer, max(size), (frame[0], frame[1]))


# --- by the name under `scoring` ---

FILES: dict[str, type[TaskFiles]] = {
    "scienceqa": ScienceQAFiles,
    "textvqa": TextVQAFiles,
    "imagenet": OpenFiles,
    "gqa": GQAFiles,
    "vizwiz": OpenFiles,
    "grounding": BoxFiles,
    "vqav2": OpenFiles,
    "ocrvqa": OpenFiles,
    # for benchmarks of one's own
    "open": OpenFiles,
    "choice": ChoiceFiles,
    "box": BoxFiles,
    "rouge": TextFiles,
    "exact": TextFiles,
    "caption": TextFiles,
    "mllm_dcl": RuledFiles,
}


def files_of(root: Root, name: str) -> TaskFiles:
    """The files of a task, by its name or its folder's. Raises ValueError for an unknown task or scoring."""
    benchmark = open_benchmark(root)
    spec = benchmark.task(name)
    if spec.scoring not in FILES:
        raise ValueError(
            f"{benchmark.file}: scoring '{spec.scoring}' of task {spec.name} is not one of {', '.join(FILES)}"
        )
    return FILES[spec.scoring](spec)
