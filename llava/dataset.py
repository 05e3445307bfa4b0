"""LLaVA JSON files: every record is validated before anything is trained, then tokenised once and batched.

A training file is a list of `{id, image?, conversations: [{from: human, value}, {from: gpt, value}, ...]}`, a test
file a list of `{question_id, image?, text, ...}`; image paths are relative to one image root.
"""

import copy
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from tqdm import tqdm

from llava.conversation import IGNORE, IMAGE, encode
from llava.image import load_image, to_pixels, verify_image

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
    """One validated training record; `words` is its length in whitespace-separated words, as grouping counts it."""

    record: int
    id: str
    turns: tuple[tuple[str, str], ...]
    image: Path | None
    words: int


@dataclass(frozen=True)
class Question:
    """One validated test record; `text` holds `<image>` where there is a picture, `record` all the file says."""

    index: int
    question_id: str | int
    text: str
    image: Path | None
    record: dict = field(repr=False)


def read_samples(path: str | Path, image_root: str | Path, look: bool = True) -> Loaded:
    """Read a training file. `look`: open every picture; without, see only that it is there.

    Raises DataError for a file that is no list of records; what is wrong with a record is returned.
    """
    return _load(path, Path(image_root), "id", _sample, look)


def read_questions(path: str | Path, image_root: str | Path, look: bool = True) -> Loaded:
    """Read a test file as `read_samples` does. A question whose id an earlier one has is not usable."""
    loaded = _load(path, Path(image_root), "question_id", _question, look)
    first, questions, problems = {}, [], list(loaded.problems)
    for question in loaded.usable:
        earlier = first.setdefault(str(question.question_id), question.index)
        if earlier == question.index:
            questions.append(question)
        else:
            text = f"record {question.index} (question_id {question.question_id!r}): record {earlier} has this id too"
            problems.append(Problem(question.index, "duplicate id", text))
    return Loaded(questions, sorted(problems))


def load_samples(path: str | Path, image_root: str | Path) -> list[Sample]:
    """Read and validate a training file. Raises DataError listing what is wrong with which record."""
    return read_samples(path, image_root).whole(path)


def load_questions(path: str | Path, image_root: str | Path) -> list[Question]:
    """Read and validate a test file. Raises DataError as `load_samples` does, and for a question id given twice."""
    return read_questions(path, image_root).whole(path)


class InstructionDataset(Dataset):
    """Samples as ready tensors: `input_ids`, `labels` and, where there is a picture, `pixel_values`.

    The text is tokenised once, here, with one placeholder for a picture; an item repeats it `image_tokens` times.
    `features` maps an image path to what takes the place of its pixels (see `llava.features`); without it the picture
    is read and processed when the item is asked for.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        processor,
        image_tokens: int,
        max_length: int,
        features: Callable[[Path], torch.Tensor] | None = None,
        source: str | Path = "samples",
    ):
        """Raises DataError, naming `source`, for samples whose answers the tokenizer or `max_length` takes away."""
        self.samples, self.image_tokens, self.features = list(samples), image_tokens, features
        self.image_processor = processor.image_processor
        self.image_id = processor.tokenizer.convert_tokens_to_ids(IMAGE)
        self._ids, self._labels, problems = [], [], []
        for sample in tqdm(self.samples, desc="tokenise", leave=False, delay=3):
            room = max_length - (image_tokens - 1 if sample.image else 0)
            try:
                encoded = encode(processor.tokenizer, sample.turns, image_tokens=1, max_length=room)
            except ValueError as error:
                problems.append(f"record {sample.record} (id {sample.id!r}): {error}")
                continue
            self._ids.append(torch.tensor(encoded.input_ids, dtype=torch.int32))
            self._labels.append(torch.tensor(encoded.labels, dtype=torch.int32))
        if problems:
            raise DataError(source, problems)

    def joined(self, others: "Sequence[tuple[InstructionDataset, Sequence[int]]]") -> "InstructionDataset":
        """Return this dataset with records of others behind its own; all were made with the same processor."""
        whole = copy.copy(self)
        for name in ("samples", "_ids", "_labels"):
            own = getattr(self, name)
            setattr(whole, name, [*own, *(getattr(other, name)[i] for other, chosen in others for i in chosen)])
        return whole

    @property
    def modality_lengths(self) -> list[int]:
        """Words of every sample, negative without a picture: what `llava.sampler` groups by."""
        return [sample.words if sample.image else -sample.words for sample in self.samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sample, ids = self.samples[index], self._ids[index].long()
        repeats = torch.where(ids == self.image_id, self.image_tokens, 1)
        labels = self._labels[index].long().repeat_interleave(repeats)
        item = {"input_ids": ids.repeat_interleave(repeats), "labels": labels}
        if sample.image:
            item["pixel_values"] = self._picture(sample.image)
        return item

    def _picture(self, path: Path) -> torch.Tensor:
        if self.features is not None:
            return self.features(path)
        return to_pixels(self.image_processor, [load_image(path)])[0]


@dataclass(frozen=True)
class Collator:
    """Pads items to the longest of their batch, on the right; pictures are stacked for the items that have one."""

    pad_id: int

    def __call__(self, items: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Return `input_ids`, `labels`, `attention_mask` `[items, longest]`; `pixel_values` if there are pictures."""
        lengths = torch.tensor([len(item["input_ids"]) for item in items])
        batch = {
            "input_ids": pad_sequence([item["input_ids"] for item in items], True, self.pad_id),
            "labels": pad_sequence([item["labels"] for item in items], True, IGNORE),
            "attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long(),
        }
        pictures = [item["pixel_values"] for item in items if "pixel_values" in item]
        if pictures:
            batch["pixel_values"] = torch.stack(pictures)
        return batch


class _Fault(ValueError):
    """What is wrong with one record, and the remedy."""

    def __init__(self, text: str, kind: str = "schema"):
        super().__init__(text)
        self.kind = kind


def _load(
    path: str | Path, root: Path, id_key: str, build: Callable[[int, dict, Path | None], object], look: bool
) -> Loaded:
    """Return `build(index, record, image)` of every record of a JSON list."""
    built, problems, checked = [], [], {}
    for index, record in enumerate(tqdm(_read_list(path), desc=f"read {Path(path).parent.name}", leave=False, delay=3)):
        try:
            if not isinstance(record, dict):
                raise _Fault("is not an object; see the schema at the top of llava/dataset.py")
            built.append(build(index, record, _image(record, root, checked, look)))
        except _Fault as fault:
            name = f" ({id_key} {record[id_key]!r})" if isinstance(record, dict) and id_key in record else ""
            problems.append(Problem(index, fault.kind, f"record {index}{name}: {fault}"))
    return Loaded(built, problems)


def _read_list(path: str | Path) -> list:
    try:
        with open(path, encoding="utf-8") as file:
            records = json.load(file)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise DataError(path, [f"not JSON: {error.msg} at {where}; correct that line"]) from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(path, [f"cannot be read ({error}); check the path in the recipe"]) from error
    if not isinstance(records, list) or not records:
        raise DataError(path, ["not a list of records, or an empty one; the file must be a JSON array of objects"])
    return records


def _image(record: dict, root: Path, checked: dict[Path, tuple[str, str] | None], look: bool) -> Path | None:
    """Return the record's picture, opened once to see that it is one; paths may not lead out of the image root."""
    name = record.get("image")
    if name is None:
        return None
    if not isinstance(name, str) or not name:
        raise _Fault(f"image is {name!r}; give a path relative to the image root, or leave the key out")
    relative = os.path.normpath(name)
    if os.path.isabs(relative) or relative.split(os.sep)[0] == os.pardir:
        raise _Fault(f"image {name!r} leads out of the image root {root}; give a path inside it", "outside root")
    path = root / relative
    if path not in checked:
        checked[path] = _image_fault(path, look)
    if checked[path]:
        raise _Fault(*checked[path])
    return path


def _image_fault(path: Path, look: bool) -> tuple[str, str] | None:
    """Return what is wrong with a picture, and the kind of it."""
    if not path.is_file():
        return f"image {path} does not exist; add the file or correct the image root", "missing image"
    try:
        if look:
            verify_image(path)
    except OSError as error:
        return f"image {error}", "unreadable image"
    return None


def _sample(index: int, record: dict, image: Path | None) -> Sample:
    values = _values(record)
    questions, answers = values[::2], values[1::2]
    for number, question in enumerate(questions):
        if not question.strip():
            raise _Fault(f"question {number + 1} is empty; give the human turn a text")
    for number, answer in enumerate(answers):
        if not answer.strip():
            raise _Fault(f"answer {number + 1} is empty; give the gpt turn a text or remove the pair")
        if IMAGE in answer:
            raise _Fault(f"answer {number + 1} holds {IMAGE}; only a question can show the picture")
    showing = [number for number, question in enumerate(questions) if IMAGE in question]
    if showing and image is None:
        raise _Fault(f"question {showing[0] + 1} holds {IMAGE} but there is no image; add one or remove {IMAGE}")
    if len(showing) > 1:
        raise _Fault(f"{len(showing)} questions hold {IMAGE}; a record has one picture, shown once")
    if image is not None and not showing:
        questions[0] = f"{IMAGE}\n{questions[0]}"
    words = sum(len(value.split()) for value in values)
    return Sample(index, str(record.get("id", index)), tuple(zip(questions, answers, strict=True)), image, words)


def _values(record: dict) -> list[str]:
    """Return the texts of a conversation, of which every second one is an answer."""
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise _Fault("has no conversations; add a list of human and gpt turns")
    roles = [turn.get("from") if isinstance(turn, dict) else None for turn in turns]
    if len(turns) % 2 or any(role != ("human", "gpt")[number % 2] for number, role in enumerate(roles)):
        raise _Fault(f"roles are {roles}; human and gpt must alternate, human first and gpt last")
    values = [turn.get("value") for turn in turns]
    if not all(isinstance(value, str) for value in values):
        raise _Fault("a turn has no text under 'value'; every value must be a string")
    return values


def _question(index: int, record: dict, image: Path | None) -> Question:
    question_id, text = record.get("question_id"), record.get("text")
    if isinstance(question_id, bool) or not isinstance(question_id, str | int):
        raise _Fault("has no question_id; every question needs a string or a whole number of its own")
    if not isinstance(text, str) or not text.replace(IMAGE, "").strip():
        raise _Fault("has no text; a question needs one")
    # ScienceQA's files mark the place of a picture in the text even where the record has none.
    if IMAGE in text:
        text = text.replace(IMAGE, "").strip()
    return Question(index, question_id, f"{IMAGE}\n{text}" if image else text, image, record)
