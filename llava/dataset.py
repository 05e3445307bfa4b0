"""Training records as ready tensors, one by one and in batches. Reading and validating them: data/records.py."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from data.columns import TrainingColumns, training_columns
from data.pictures import load_image
from data.records import DataError, Problem, Sample
from llava.conversation import IGNORE, IMAGE, Vocabulary, cut_fault
from llava.image import to_pixels


class InstructionDataset(Dataset):
    """Records as ready tensors: `input_ids`, `labels` and, where there is a picture, `pixel_values`.

    The text was tokenised once, with one placeholder for a picture; an item repeats it `image_tokens` times and ends
    at `max_length` tokens. `features` maps an image path to what takes the place of its pixels (see `llava.features`);
    without it the picture is read and processed when the item is asked for.

    `records` are validated samples, or the columns of a file of them with `rows`, those to use (None: all), below
    `image_root`. `dropped` holds what is wrong with those that `max_length` leaves out.
    """

    def __init__(
        self,
        records: Sequence[Sample] | TrainingColumns,
        processor,
        image_tokens: int,
        max_length: int,
        features: Callable[[Path], torch.Tensor] | None = None,
        source: str | Path = "samples",
        image_root: Path | str = "",
        rows: np.ndarray | None = None,
        leave_out: bool = False,
    ):
        """Raises DataError, naming `source`, for records whose answers the tokenizer or `max_length` takes away;
        with `leave_out` the second kind is left out and noted in `dropped`."""
        self.image_tokens, self.features, self.root = image_tokens, features, Path(image_root)
        self.image_processor = processor.image_processor
        self.image_id = processor.tokenizer.convert_tokens_to_ids(IMAGE)
        columns = records
        if not isinstance(columns, TrainingColumns):
            columns = training_columns(records, "last line", Vocabulary.of(processor.tokenizer))
            if columns.problems:
                raise DataError(source, [problem.text for problem in columns.problems])
        rows = np.arange(len(columns)) if rows is None else rows
        self.dropped = cut_problems(columns, rows, image_tokens, max_length)
        if self.dropped and not leave_out:
            raise DataError(source, [problem.text for problem in self.dropped])
        gone = {problem.record for problem in self.dropped}
        if gone:
            rows = rows[[record not in gone for record in columns.record[rows].tolist()]]
        # (columns, number of the part) of the records, in order: those of other datasets may stand behind
        self._parts: list[tuple[TrainingColumns, Path, int]] = [(columns, self.root, max_length)]
        self._part, self._row = np.zeros(len(rows), np.int16), np.asarray(rows, np.int32)

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
        for number, (columns, *_) in enumerate(self._parts):
            own = self._part == number
            lengths[own] = columns.words[self._row[own]]
        return lengths.tolist()

    def picture(self, index: int) -> Path | None:
        """The path of a record's picture."""
        columns, root, _ = self._parts[self._part[index]]
        name = columns.image(int(self._row[index]))
        return None if name is None else root / name

    def digest(self) -> str:
        """SHA-256 of what is trained on: the records' tokens, pictures' names and lengths in words, in their order."""
        found = hashlib.sha256(repr((self.image_tokens, [length for *_, length in self._parts])).encode())
        for array in (self._part, self._row):
            found.update(array.tobytes())
        for columns, *_ in self._parts:
            names = columns.names
            for array in (columns.ids, columns.ends, columns.supervised, columns.words, columns.picture, names.content,
                          names.ends):  # fmt: skip
                found.update(np.ascontiguousarray(array))
        return found.hexdigest()

    def name(self, index: int) -> str:
        """What an error message calls a record."""
        return self._parts[self._part[index]][0].name(int(self._row[index]))

    def __len__(self) -> int:
        return len(self._row)

    def length(self, index: int) -> int:
        """How many tokens a record has, its picture's included."""
        columns, _, max_length = self._parts[self._part[index]]
        begin, end = columns.span(int(self._row[index]))
        return min(max_length, end - begin + (self.image_tokens - 1 if self.picture(index) else 0))

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        columns = self._parts[self._part[index]][0]
        row, path = int(self._row[index]), self.picture(index)
        begin = columns.span(row)[0]
        end = begin + self.length(index) - (self.image_tokens - 1 if path else 0)
        ids = torch.from_numpy(columns.ids[begin:end].astype(np.int64))
        supervised = torch.from_numpy(columns.supervised[begin:end].copy())
        repeats = torch.where(ids == self.image_id, self.image_tokens, 1)
        labels = torch.where(supervised, ids, IGNORE).repeat_interleave(repeats)
        item = {"input_ids": ids.repeat_interleave(repeats), "labels": labels}
        if path:
            try:
                item["pixel_values"] = self._picture(path)
            except OSError as error:
                raise OSError(f"{self.name(index)}: {error}") from error
        return item

    def _picture(self, path: Path) -> torch.Tensor:
        if self.features is not None:
            return self.features(path)
        return to_pixels(self.image_processor, [load_image(path)])[0]


def cut_problems(columns: TrainingColumns, rows: np.ndarray, image_tokens: int, max_length: int) -> list[Problem]:
    """What `max_length` makes unusable of these rows: those whose picture or whole answer it cuts off."""
    placed, answer = columns.placed[rows], columns.answer[rows]
    room = max_length - np.where(placed >= 0, image_tokens - 1, 0)
    found = []
    for row in np.asarray(rows)[(placed >= room) | (answer >= room)].tolist():
        at = int(columns.placed[row])
        fault = cut_fault(max_length, image_tokens, at if at >= 0 else None, int(columns.answer[row]))
        found.append(Problem(int(columns.record[row]), "too long", f"{columns.name(row)}: {fault}"))
    return found


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
