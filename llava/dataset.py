"""Training records as ready tensors, one by one and in batches. Reading and validating them: data/records.py."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from data.columns import Columns, TrainingColumns, training_columns
from data.records import DataError, Problem, Sample
from llava.backbone import Backbone
from llava.conversation import IGNORE, cut_fault

TEXT_KEYS = ("input_ids", "labels", "attention_mask")  # of a batch; the other keys are of its pictures


class _Part(NamedTuple):
    """Records of one file, below an image root; `pictures`: how many positions each of its pictures takes."""

    columns: TrainingColumns
    root: Path
    max_length: int
    pictures: np.ndarray


class InstructionDataset(Dataset):
    """Records as ready tensors: `input_ids`, `labels` and, where there is a picture, what the backbone makes of it.

    The text was tokenised once, with one placeholder for a picture; an item repeats it and ends at `max_length` tokens.
    The picture is read and processed when the item is asked for.

    `columns` are those of a file of records, with `rows`, those to use (None: all), below `image_root`. `dropped` holds
    what is wrong with those that `max_length` leaves out.
    """

    def __init__(
        self,
        columns: TrainingColumns,
        backbone: Backbone,
        max_length: int,
        image_root: Path | str = "",
        rows: np.ndarray | None = None,
    ):
        self.backbone, root = backbone, Path(image_root)
        rows = np.arange(len(columns)) if rows is None else rows
        pictures = backbone.picture_tokens(root, columns.names)
        self.dropped = unusable(backbone, columns, rows, root, max_length)
        gone = {problem.record for problem in self.dropped}
        if gone:
            rows = rows[[record not in gone for record in columns.record[rows].tolist()]]
        # (part, row) of the records, in order: those of other datasets may stand behind
        self._parts = [_Part(columns, root, max_length, pictures)]
        self._part, self._row = np.zeros(len(rows), np.int16), np.asarray(rows, np.int32)

    @classmethod
    def of_samples(
        cls, samples: Sequence[Sample], backbone: Backbone, max_length: int, source: str = "samples"
    ) -> "InstructionDataset":
        """That of validated samples. Raises DataError, naming `source`, for those whose answers the tokenizer or
        `max_length` takes away."""
        columns = training_columns(samples, "last line", backbone.vocabulary)
        dataset = cls(columns, backbone, max_length)
        if problems := [*columns.problems, *dataset.dropped]:
            raise DataError(source, [problem.text for problem in problems])
        return dataset

    def joined(self, others: "Sequence[tuple[InstructionDataset, Sequence[int]]]") -> "InstructionDataset":
        """Return this dataset with records of others behind its own; all were made with the same processor."""
        whole = object.__new__(InstructionDataset)
        vars(whole).update(vars(self))
        parts, part, row = list(self._parts), [self._part], [self._row]
        for other, chosen in others:
            chosen = np.asarray(chosen, np.int64)
            part.append(other._part[chosen] + np.int16(len(parts)))
            row.append(other._row[chosen])
            parts += other._parts
        whole._parts, whole._part, whole._row = parts, np.concatenate(part), np.concatenate(row)
        return whole

    @property
    def modality_lengths(self) -> list[int]:
        """Words of every sample, negative without a picture: what `llava.sampler` groups by."""
        lengths = np.zeros(len(self), np.int32)
        for number, part in enumerate(self._parts):
            own = self._part == number
            lengths[own] = part.columns.words[self._row[own]]
        return lengths.tolist()

    def picture(self, index: int) -> Path | None:
        """The path of a record's picture."""
        part = self._parts[self._part[index]]
        name = part.columns.image(int(self._row[index]))
        return None if name is None else part.root / name

    def digest(self) -> str:
        """SHA-256 of what is trained on: the records' tokens, pictures' names and lengths in words, in their order."""
        counts = np.unique(np.concatenate([part.pictures for part in self._parts]))
        alike = int(counts[0]) if len(counts) == 1 else None  # of one number of positions nothing else is told
        found = hashlib.sha256(repr((alike, [part.max_length for part in self._parts])).encode())
        for array in (self._part, self._row):
            found.update(array.tobytes())
        for columns, _, _, pictures in self._parts:
            names = columns.names
            own = [columns.ids, columns.ends, columns.supervised, columns.words, columns.picture]
            for array in (*own, names.content, names.ends, *([pictures] if alike is None else [])):
                found.update(np.ascontiguousarray(array))
        return found.hexdigest()

    def name(self, index: int) -> str:
        """What an error message calls a record."""
        return self._parts[self._part[index]].columns.name(int(self._row[index]))

    def __len__(self) -> int:
        return len(self._row)

    def length(self, index: int) -> int:
        """How many tokens a record has, its picture's included."""
        part, row = self._parts[self._part[index]], int(self._row[index])
        begin, end = part.columns.span(row)
        return min(part.max_length, end - begin + self._more(part, row))

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        part, row = self._parts[self._part[index]], int(self._row[index])
        columns, more, path = part.columns, self._more(part, row), self.picture(index)
        begin = columns.span(row)[0]
        end = begin + self.length(index) - more
        ids = torch.from_numpy(columns.ids[begin:end].astype(np.int64))
        supervised = torch.from_numpy(columns.supervised[begin:end].copy())
        labels = torch.where(supervised, ids, IGNORE)
        if path is None:
            return {"input_ids": ids, "labels": labels}
        repeats = torch.where(ids == self.backbone.placeholder, more + 1, 1)
        item = {"input_ids": ids.repeat_interleave(repeats), "labels": labels.repeat_interleave(repeats)}
        try:
            picture = self.backbone.picture(path)
            check_tokens(self.backbone, picture, more + 1, path)
        except OSError as error:
            raise OSError(f"{self.name(index)}: {error}") from error
        return item | picture

    @staticmethod
    def _more(part: _Part, row: int) -> int:
        """How many positions a record's picture takes beyond its placeholder's one."""
        place = int(part.columns.picture[row])
        return int(part.pictures[place]) - 1 if place >= 0 else 0


def check_tokens(backbone: Backbone, picture: dict[str, torch.Tensor], tokens: int, path: Path) -> None:
    """Raise OSError naming the file unless a picture takes as many tokens as its record leaves it."""
    if (found := backbone.tokens_of(picture)) not in (None, tokens):
        raise OSError(
            f"{path} takes {found} tokens and took {tokens} when it was looked at: start again, or put it back"
        )


def unusable(
    backbone: Backbone, columns: TrainingColumns, rows: np.ndarray, root: Path, max_length: int
) -> list[Problem]:
    """What makes these rows unusable on a base, each of them once: a picture that the base cannot take, and a picture
    or a whole answer that `max_length` cuts off. Pictures are below `root`."""
    found = picture_problems(backbone, columns, rows, root)
    told = {problem.record for problem in found}
    cut = cut_problems(columns, rows, backbone.picture_tokens(root, columns.names), max_length)
    return sorted([*found, *(problem for problem in cut if problem.record not in told)])


def picture_problems(backbone: Backbone, columns: Columns, rows: np.ndarray, root: Path) -> list[Problem]:
    """Those of these rows whose picture the base cannot take."""
    faults = backbone.picture_faults(root, columns.names)
    return [
        Problem(
            int(columns.record[row]), "picture", f"{columns.name(row)}: {root / columns.image(row)}: {faults[place]}"
        )
        for row, place in zip(rows.tolist(), columns.picture[rows].tolist(), strict=True)
        if place in faults
    ]


def cut_problems(columns: TrainingColumns, rows: np.ndarray, pictures: np.ndarray, max_length: int) -> list[Problem]:
    """What `max_length` makes unusable of these rows: those whose picture or whole answer it cuts off. `pictures`: how
    many positions each picture of the columns takes."""
    placed, answer, shown = columns.placed[rows], columns.answer[rows], columns.picture[rows]
    taken = np.append(pictures, 1)[shown]  # the last for those without
    room = max_length - (taken - 1)
    found = []
    for place in np.flatnonzero((placed >= room) | (answer >= room)).tolist():
        row, at = int(rows[place]), int(placed[place])
        fault = cut_fault(max_length, int(taken[place]), at if at >= 0 else None, int(answer[place]))
        found.append(Problem(int(columns.record[row]), "too long", f"{columns.name(row)}: {fault}"))
    return found


@dataclass(frozen=True)
class Collator:
    """Pads items to the longest of their batch, on the right; pictures are put together for the items that have one."""

    backbone: Backbone

    def __call__(self, items: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Return `input_ids`, `labels`, `attention_mask` `[items, longest]`, and the pictures if there are any."""
        lengths = torch.tensor([len(item["input_ids"]) for item in items])
        batch = {
            "input_ids": pad_sequence(
                [item["input_ids"] for item in items], True, self.backbone.tokenizer.pad_token_id
            ),
            "labels": pad_sequence([item["labels"] for item in items], True, IGNORE),
            "attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long(),
        }
        pictures = [{key: item[key] for key in item if key not in TEXT_KEYS} for item in items]
        shown = [picture for picture in pictures if picture]
        if not shown:
            return batch
        return batch | self.backbone.beside_ids(batch["input_ids"]) | self.backbone.stack(shown)


def shows_pictures(batch: dict[str, torch.Tensor]) -> bool:
    """Whether a collated batch holds pictures."""
    return not batch.keys() <= set(TEXT_KEYS)
