"""Records as columns: validated and tokenised once, in a file that every process maps into memory and none copies.

A file of records and an encoder make one column file, named by the checksum of both. It holds no absolute path, no
maximum length and no number of image tokens, so that recipes, runs and processes share it. Pictures are only named in
it: whether they are there is looked at where they are (data/preprocess.py).
"""

import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from data.records import Problem, Question, Sample, instruction_of

BATCH = 2_000  # records that are tokenised at once
VERSION = 1  # of the files' content: those of another are made anew


@dataclass(frozen=True)
class Tokenised:
    """A conversation's tokens, one placeholder for its picture. `answers`: [begin, end) of each answer's tokens."""

    ids: list[int]
    answers: list[tuple[int, int]]


class Encoder(Protocol):
    """What a model makes of texts. It can be pickled: processes of their own encode large files.

    image: the id of a picture's placeholder, None where the model takes no pictures. digest: what tells encoders apart.
    """

    image: int | None
    digest: str

    def conversations(self, turns: Sequence[Sequence[tuple[str, str]]]) -> list[Tokenised | ValueError]:
        """Return the tokens of conversations; a ValueError in the place of one that cannot be expressed."""

    def questions(self, texts: Sequence[str]) -> list[list[int] | ValueError]:
        """Return the ids that ask for an answer to each text; a ValueError in the place of one that cannot be asked."""


class Texts(Sequence[str]):
    """A column of texts: UTF-8 bytes and where each text ends."""

    def __init__(self, content: np.ndarray, ends: np.ndarray):
        self.content, self.ends = content, ends

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Texts":
        """The column of these texts."""
        encoded = [text.encode("utf-8") for text in texts]
        ends = np.cumsum([len(text) for text in encoded], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        begin = int(self.ends[index - 1]) if index else 0
        return self.content[begin : int(self.ends[index])].tobytes().decode("utf-8")


@dataclass
class Columns:
    """What the records of one file have in common: n records, their tokens and pictures.

    ids: int32 [tokens], one placeholder for a picture; ends: int64 [n], where a record's tokens end. record: int32 [n],
    its number in the file. picture: int32 [n], its picture's place in `names`, -1 without. instruction: int32 [n], the
    place of its instruction in `instructions`, -1 where its prompt has none. ids and ends are empty where there was no
    encoder. told: `records` in the file, and `problems` [number, kind, text] of those that are not here.
    """

    ids: np.ndarray
    ends: np.ndarray
    record: np.ndarray
    picture: np.ndarray
    names: Texts
    instruction: np.ndarray
    instructions: Texts
    told: dict[str, Any]

    def __len__(self) -> int:
        return len(self.record)

    @property
    def problems(self) -> list[Problem]:
        """What is wrong with the records that are not here."""
        return [Problem(*problem) for problem in self.told["problems"]]

    def span(self, row: int) -> tuple[int, int]:
        """Where the record's tokens begin and end."""
        return int(self.ends[row - 1]) if row else 0, int(self.ends[row])

    def wordings(self, rows: np.ndarray) -> list[str]:
        """The distinct instructions of these rows, sorted; those without one have no say."""
        return sorted(self.instructions[place] for place in np.unique(self.instruction[rows]).tolist() if place >= 0)

    def pictures(self, rows: np.ndarray) -> list[str]:
        """The pictures of these rows, relative to the image root, each once, in order."""
        shown = self.picture[rows]
        return [self.names[place] for place in dict.fromkeys(shown[shown >= 0].tolist())]

    def image(self, row: int) -> str | None:
        """The picture's path relative to the image root."""
        return self.names[int(self.picture[row])] if self.picture[row] >= 0 else None


@dataclass
class TrainingColumns(Columns):
    """supervised: bool [tokens]. answer: int32 [n], the position of the record's first supervised token, placed: that
    of its placeholder, -1 without. words: int32 [n], whitespace-separated words, negative without a picture (what
    batches are grouped by). own_ids: the records' own ids."""

    supervised: np.ndarray
    answer: np.ndarray
    placed: np.ndarray
    words: np.ndarray
    own_ids: Texts

    def name(self, row: int) -> str:
        """What an error message calls the record."""
        return Sample(int(self.record[row]), self.own_ids[row], (), None, 0).name


@dataclass
class QuestionColumns(Columns):
    """question_ids: as JSON, since a number and a text differ. asked: the texts of the file."""

    question_ids: Texts
    asked: Texts

    def question_id(self, row: int) -> str | int:
        """The question's id as the file has it."""
        return json.loads(self.question_ids[row])

    def name(self, row: int) -> str:
        """What an error message calls the record."""
        return Question(int(self.record[row]), self.question_id(row), "", "", None).name


class _Builder:
    """Collects the columns that training and test files share."""

    def __init__(self, place: str, encoder: Encoder | None):
        self.place, self.encoder = place, encoder
        self.ids: list[np.ndarray] = []
        self.lengths: list[int] = []
        self.record: list[int] = []
        self.picture: list[int] = []
        self.names: dict[str, int] = {}
        self.instruction: list[int] = []
        self.instructions: dict[str, int] = {}

    def add(self, number: int, prompt: str, image: str | None, ids: list[int]) -> None:
        self.record.append(number)
        self.picture.append(-1 if image is None else self.names.setdefault(image, len(self.names)))
        self.ids.append(np.array(ids, np.int32))
        self.lengths.append(len(ids))
        try:
            own = instruction_of(prompt, self.place)
        except ValueError:
            self.instruction.append(-1)
        else:
            self.instruction.append(self.instructions.setdefault(own, len(self.instructions)))

    def common(self, records: int, problems: list[Problem]) -> dict[str, Any]:
        return {
            "ids": np.concatenate(self.ids) if self.ids else np.zeros(0, np.int32),
            "ends": np.cumsum(self.lengths, dtype=np.int64) if self.encoder else np.zeros(0, np.int64),
            "record": np.array(self.record, np.int32),
            "picture": np.array(self.picture, np.int32),
            "names": Texts.of(self.names),
            "instruction": np.array(self.instruction, np.int32),
            "instructions": Texts.of(self.instructions),
            "told": {"records": records, "problems": [list(problem) for problem in sorted(problems)]},
        }


def training_columns(
    samples: Iterable[Sample],
    place: str,
    encoder: Encoder | None,
    problems: list[Problem] | None = None,
    records: int | None = None,
) -> TrainingColumns:
    """The columns of training records. A sample that `encoder` cannot express goes into `problems`, which `samples`
    may fill as it is read; `records`: how many the file has. `place`: as in instruction_of."""
    problems = [] if problems is None else problems
    builder, supervised = _Builder(place, encoder), []
    answer, placed, words, own_ids = [], [], [], []
    for batch in _batches(samples):
        for sample, tokens in zip(batch, _tokenised(batch, encoder), strict=True):
            if isinstance(tokens, ValueError):
                problems.append(Problem(sample.record, "tokens", f"{sample.name}: {tokens}"))
                continue
            image = None if sample.image is None else str(sample.image)
            builder.add(sample.record, sample.turns[0][0], image, tokens.ids)
            mask = np.zeros(len(tokens.ids), bool)
            for begin, end in tokens.answers:
                mask[begin:end] = True
            supervised.append(mask)
            answer.append(tokens.answers[0][0] if tokens.answers else 0)
            placed.append(tokens.ids.index(encoder.image) if tokens.ids and sample.image else -1)
            words.append(sample.words if sample.image else -sample.words)
            own_ids.append(sample.id)
    return TrainingColumns(
        supervised=np.concatenate(supervised) if supervised else np.zeros(0, bool),
        answer=np.array(answer, np.int32),
        placed=np.array(placed, np.int32),
        words=np.array(words, np.int32),
        own_ids=Texts.of(own_ids),
        **builder.common(len(words) + len(problems) if records is None else records, problems),
    )


def _tokenised(batch: list[Sample], encoder: Encoder | None) -> list[Tokenised | ValueError]:
    if encoder is None:
        return [Tokenised([], [])] * len(batch)
    return encoder.conversations([sample.turns for sample in batch])


def question_columns(
    questions: Iterable[Question],
    place: str,
    encoder: Encoder | None,
    problems: list[Problem] | None = None,
    records: int | None = None,
) -> QuestionColumns:
    """The columns of test records; as `training_columns`."""
    problems = [] if problems is None else problems
    builder, question_ids, asked = _Builder(place, encoder), [], []
    for batch in _batches(questions):
        tokens = encoder.questions([question.text for question in batch]) if encoder else [[]] * len(batch)
        for question, ids in zip(batch, tokens, strict=True):
            if isinstance(ids, ValueError):
                problems.append(Problem(question.index, "tokens", f"{question.name}: {ids}"))
                continue
            image = None if question.image is None else str(question.image)
            builder.add(question.index, question.text, image, ids)
            question_ids.append(json.dumps(question.question_id))
            asked.append(question.asked)
    return QuestionColumns(
        question_ids=Texts.of(question_ids),
        asked=Texts.of(asked),
        **builder.common(len(asked) + len(problems) if records is None else records, problems),
    )


def _batches(items: Iterable) -> Iterator[list]:
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def save(columns: Columns, path: Path) -> None:
    """Write the columns into one file."""
    arrays = {}
    for key, value in vars(columns).items():
        if isinstance(value, Texts):
            arrays[key], arrays[f"{key}.ends"] = value.content, value.ends
        elif key != "told":
            arrays[key] = value
    save_file(arrays, path, metadata={"told": json.dumps(columns.told, ensure_ascii=False)})


def load(path: Path, kind: type[Columns]) -> Columns:
    """The columns in a file of `save`, mapped into memory: what is not looked at takes none."""
    with safe_open(path, framework="pt") as file:
        # torch maps the file; numpy's reader would copy it
        arrays = {key: file.get_tensor(key).numpy() for key in file.keys()}  # noqa: SIM118
        told = json.loads(file.metadata()["told"])
    texts = {key for key in arrays if f"{key}.ends" in arrays}
    found = {key: Texts(arrays[key], arrays[f"{key}.ends"]) for key in texts}
    plain = {key: value for key, value in arrays.items() if key not in texts and not key.endswith(".ends")}
    return kind(**plain, **found, told=told)


def rows_before(columns: Columns, number: int) -> int:
    """How many of the records have a number in the file below `number`."""
    return bisect_right(columns.record, number - 1)
