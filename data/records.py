"""LLaVA JSON files: every record is read and validated before anything is trained.

A training file is a list of `{id?, image?, conversations: [{from: human, value}, {from: gpt, value}, ...]}`, a test
file a list of `{question_id, image?, text, ...}`; image paths are relative to one image root. JSON lines are read, too.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from data.jsonfile import read_json
from data.pictures import shown, verify_image

IMAGE = "<image>"
SHOWN_PROBLEMS = 20


class DataError(ValueError):
    """A data file that cannot be used: names the file, its first broken records and the remedy for each."""

    def __init__(self, path: str | Path, problems: Sequence[str]):
        self.path, self.problems = Path(path), list(problems)
        lines = [f"  {problem}" for problem in self.problems[:SHOWN_PROBLEMS]]
        if len(self.problems) > SHOWN_PROBLEMS:
            lines.append(f"  and {len(self.problems) - SHOWN_PROBLEMS} more")
        super().__init__("\n".join([f"{path}: {len(self.problems)} problem(s), nothing was trained", *lines]))


class Problem(NamedTuple):
    """What keeps a record from being used: its number, a kind to count by, and a text with the remedy."""

    record: int
    kind: str
    text: str


class Loaded(NamedTuple):
    """A file's usable records, and what is wrong with the others."""

    usable: list
    problems: list[Problem]

    def whole(self, path: str | Path) -> list:
        """The records, all of them. Raises DataError if there is a problem."""
        if self.problems:
            raise DataError(path, [problem.text for problem in self.problems])
        return self.usable


@dataclass(frozen=True)
class Sample:
    """One validated training record; `words` is its length in whitespace-separated words, as grouping counts it.

    `image` is the picture's path relative to the image root, or, from `load_samples`, its whole path.
    """

    record: int
    id: str
    turns: tuple[tuple[str, str], ...]
    image: str | None
    words: int

    @property
    def name(self) -> str:
        """What an error message calls the record."""
        return f"record {self.record} (id {shown(self.id)})"


@dataclass(frozen=True)
class Question:
    """One validated test record; `text` holds `<image>` where there is a picture, `asked` is the text of the file.

    `image` as in Sample.
    """

    index: int
    question_id: str | int
    text: str
    asked: str
    image: str | None

    @property
    def name(self) -> str:
        """What an error message calls the record."""
        return f"record {self.index} (question_id {shown(self.question_id)})"


class Fault(ValueError):
    """What is wrong with one record, and the remedy."""

    def __init__(self, text: str, kind: str = "schema"):
        super().__init__(text)
        self.kind = kind


def instruction_of(prompt: str, place: str = "last line") -> str:
    """The instruction within one prompt, the same for a training turn (with `<image>`) and a test text (without).

    `place`, from the benchmark's description: the "last line", the "first line" (ImageNet), or, of the last line, what
    stands "before colon" (Grounding). Empty lines, the image mark and a trailing period do not count. (The released
    code takes the whole text of an ImageNet test prompt, which is the same for one-line prompts and misses its group
    for longer ones.) Raises ValueError if nothing is left.
    """
    lines = [line for line in map(str.strip, prompt.replace(IMAGE, "\n").splitlines()) if line]
    if lines:
        line = lines[0 if place == "first line" else -1]
        instruction = (line.split(":")[0] if place == "before colon" else line).rstrip(" .")
        if instruction:
            return instruction
    raise ValueError(f"no instruction in the prompt {shown(prompt)}")


def read_list(path: str | Path) -> list:
    """Return the records of a file. Raises DataError for a file that is no list of records."""
    try:
        records = read_json(path)
    except (ValueError, OSError) as error:
        text = str(error)
        raise DataError(path, [text.removeprefix(str(path)).removeprefix(": ").strip()]) from error
    if not isinstance(records, list) or not records:
        raise DataError(path, ["not a list of records, or an empty one; the file must be a JSON array of objects"])
    return records


def samples_of(records: Sequence, problems: list[Problem]) -> Iterator[Sample]:
    """Yield the training records that follow the schema; what is wrong with the others goes into `problems`."""
    return _built(records, "id", sample_of, problems)


def questions_of(records: Sequence, problems: list[Problem]) -> Iterator[Question]:
    """Yield the test records that follow the schema, as `samples_of` does. A question whose id an earlier one has is
    not usable."""
    first: dict[str, int] = {}
    for question in _built(records, "question_id", question_of, problems):
        earlier = first.setdefault(str(question.question_id), question.index)
        if earlier == question.index:
            yield question
        else:
            problems.append(
                Problem(
                    question.index,
                    "duplicate id",
                    f"{question.name}: record {earlier} has this id too; give it another",
                )
            )


def load_samples(path: str | Path, image_root: str | Path) -> list[Sample]:
    """Read, validate and look at all of a training file. Raises DataError listing what is wrong with which record."""
    return _load(path, Path(image_root), samples_of)


def load_questions(path: str | Path, image_root: str | Path) -> list[Question]:
    """Read a test file as `load_samples` does."""
    return _load(path, Path(image_root), questions_of)


def _load(path: str | Path, root: Path, read: Callable) -> list:
    problems: list[Problem] = []
    items, faults = list(read(read_list(path), problems)), {}
    for item in items:
        if item.image is not None and item.image not in faults:
            faults[item.image] = picture_fault(root, item.image)
    for item in items:
        if fault := faults.get(item.image):
            number = item.record if isinstance(item, Sample) else item.index
            problems.append(Problem(number, fault.kind, f"{item.name}: {fault}"))
    whole = Loaded(items, sorted(problems)).whole(path)
    return [type(item)(**{**vars(item), "image": item.image and root / item.image}) for item in whole]


def picture_fault(root: Path, name: str, look: bool = True) -> Fault | None:
    """Return what is wrong with the picture `name` below the image root, if anything; `look`: decode it."""
    path = root / name
    try:
        if not path.is_file():
            return Fault(f"image {path} does not exist; add the file or correct the image root", "missing image")
        if look:
            verify_image(path)
    except OSError as error:
        return Fault(f"image {error}", "unreadable image")
    return None


def _built(records: Sequence, id_key: str, build: Callable[[int, dict], object], problems: list[Problem]) -> Iterator:
    for index, record in enumerate(records):
        try:
            if not isinstance(record, dict):
                raise Fault("is not an object; see the schema at the top of data/records.py")
            yield build(index, record)
        except Fault as fault:
            name = f" ({id_key} {shown(record[id_key])})" if isinstance(record, dict) and id_key in record else ""
            problems.append(Problem(index, fault.kind, f"record {index}{name}: {fault}"))


def sample_of(index: int, record: dict) -> Sample:
    """Validate one training record. Raises Fault."""
    values, image = _values(record), _image(record)
    questions, answers = values[::2], values[1::2]
    for number, question in enumerate(questions):
        if not question.strip():
            raise Fault(f"question {number + 1} is empty; give the human turn a text")
    for number, answer in enumerate(answers):
        if not answer.strip():
            raise Fault(f"answer {number + 1} is empty; give the gpt turn a text or remove the pair")
        if IMAGE in answer:
            raise Fault(f"answer {number + 1} holds {IMAGE}; only a question can show the picture")
    showing = [number for number, question in enumerate(questions) if IMAGE in question]
    if showing and image is None:
        raise Fault(f"question {showing[0] + 1} holds {IMAGE} but there is no image; add one or remove {IMAGE}")
    if len(showing) > 1:
        raise Fault(f"{len(showing)} questions hold {IMAGE}; a record has one picture, shown once")
    if image is not None and not showing:
        questions[0] = f"{IMAGE}\n{questions[0]}"
    words = sum(len(value.split()) for value in values)
    name = record.get("id")  # nothing joins training records by it
    name = str(index if name is None else name).encode("utf-8", "replace").decode()
    return Sample(index, name, tuple(zip(questions, answers, strict=True)), image, words)


def question_of(index: int, record: dict) -> Question:
    """Validate one test record. Raises Fault."""
    question_id, text, image = record.get("question_id"), record.get("text"), _image(record)
    if isinstance(question_id, bool) or not isinstance(question_id, str | int):
        raise Fault("has no question_id; every question needs a string or a whole number of its own")
    if not isinstance(text, str) or not text.replace(IMAGE, "").strip():
        raise Fault("has no text; a question needs one")
    _whole_characters(json.dumps(record, ensure_ascii=False), "the record")
    # ScienceQA's files mark the place of a picture in the text even where the record has none.
    plain = text.replace(IMAGE, "").strip() if IMAGE in text else text
    return Question(index, question_id, f"{IMAGE}\n{plain}" if image else plain, text, image)


def _image(record: dict) -> str | None:
    """Return the picture's path inside the image root; paths may not lead out of it."""
    name = record.get("image")
    if name is None:
        return None
    if not isinstance(name, str) or not name:
        raise Fault(f"image is {shown(name)}; give a path relative to the image root, or leave the key out")
    if name.startswith("data:") or len(name) > 1024:
        raise Fault(f"image {shown(name)} is the picture itself, not its path; save it as a file and name that")
    relative = os.path.normpath(name)
    if os.path.isabs(relative) or relative.split(os.sep)[0] == os.pardir:
        raise Fault(f"image {shown(name)} leads out of the image root; give a path inside it", "outside root")
    if "\0" in name or any(len(part.encode("utf-8", "replace")) > 255 for part in relative.split(os.sep)):
        raise Fault(f"image {shown(name)} cannot be the name of a file; give a path relative to the image root")
    _whole_characters(name, "image")
    return relative


def _values(record: dict) -> list[str]:
    """Return the texts of a conversation, of which every second one is an answer."""
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise Fault("has no conversations; add a list of human and gpt turns")
    roles = [turn.get("from") if isinstance(turn, dict) else None for turn in turns]
    if len(turns) % 2 or any(role != ("human", "gpt")[number % 2] for number, role in enumerate(roles)):
        raise Fault(f"roles are {shown(roles)}; human and gpt must alternate, human first and gpt last")
    values = [turn.get("value") for turn in turns]
    if not all(isinstance(value, str) for value in values):
        raise Fault("a turn has no text under 'value'; every value must be a string")
    for number, value in enumerate(values):
        _whole_characters(value, f"{('question', 'answer')[number % 2]} {number // 2 + 1}")
    return values


def _whole_characters(text: str, what: str) -> None:
    """Raise Fault for half of a surrogate pair, which JSON can hold and UTF-8 cannot."""
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise Fault(
            f"{what} holds {half}, half of a character; write the whole character, or take it out", "broken character"
        ) from error
