"""The questions of a run's test sets: read and tokenised once for all runs of a table (data/preprocess.py)."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.benchmark import open_benchmark
from data.preprocess import Prepared, RecordFile, open_records
from data.records import DataError
from eval.tasks import task_of
from llaca.config import Recipe
from llaca.stream import ordered
from llava.backbone import BaseOptions
from llava.backbones import open_backbone
from llava.boxes import check_boxes
from llava.conversation import repeated


@dataclass(frozen=True, eq=False)
class Questions:
    """The questions of one test set that are asked, by their numbers from 0; `rows` are those of the file's columns."""

    prepared: Prepared
    rows: np.ndarray
    image_root: Path
    placeholder: int | None  # the id that stands for a picture
    lengths: np.ndarray  # how many positions each picture of the columns takes

    def __len__(self) -> int:
        return len(self.rows)

    def question_id(self, number: int) -> str | int:
        """The id as the file has it."""
        return self.prepared.columns.question_id(int(self.rows[number]))

    def text(self, number: int) -> str:
        """The prompt as the file has it."""
        return self.prepared.columns.asked[int(self.rows[number])]

    def name(self, number: int) -> str:
        """What an error message calls the question."""
        return f"{self.prepared.source.path}: {self.prepared.columns.name(int(self.rows[number]))}"

    def picture(self, number: int) -> Path | None:
        """The path of its picture."""
        name = self.prepared.columns.image(int(self.rows[number]))
        return None if name is None else self.image_root / name

    @property
    def shown(self) -> list[int | None]:
        """A number for the picture of every question, None without."""
        return [place if place >= 0 else None for place in self.prepared.columns.picture[self.rows].tolist()]

    def ids(self, number: int) -> list[int]:
        """The token ids that ask it."""
        columns, row = self.prepared.columns, int(self.rows[number])
        begin, end = columns.span(row)
        ids, place = columns.ids[begin:end].tolist(), int(columns.picture[row])
        return repeated(ids, self.placeholder, int(self.lengths[place])) if place >= 0 else ids

    @property
    def pictures(self) -> list[Path]:
        """The paths of all pictures, each once."""
        return [self.image_root / name for name in self.prepared.columns.pictures(self.rows)]

    def wordings(self, grouping: bool) -> list[str]:
        """The distinct instructions. Raises DataError for a question without one, where tasks are grouped by them."""
        return self.prepared.wordings(self.rows, grouping)


def run_questions(recipe: Recipe, split: str) -> Mapping[str, Questions]:
    """The questions of every task of the recipe's stream, in training order. Runs that ask the same share them.

    Raises DataError for a question that cannot be asked, unless the recipe goes on unchecked.
    """
    stream, root = recipe.stream, recipe.stream.data_root
    tasks = tuple(ordered(stream.tasks, stream.order))
    files = [task_of(root, task).question_file(root, stream.instructions, split) for task in tasks]
    changed = tuple((file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file())
    model, limit = recipe.model, stream.max_test_samples
    wanted = Wanted(root, tasks, tuple(files), model.base, model.options, stream.unchecked, limit)
    return _questions(wanted, changed)


class Wanted(NamedTuple):
    """What tells questions apart: the files of tasks, the base that is asked them, and which of them are asked."""

    data_root: str
    tasks: tuple[str, ...]
    files: tuple[Path, ...]
    base: str
    options: BaseOptions
    unchecked: bool
    limit: int


@lru_cache
def _questions(wanted: Wanted, _changed: tuple) -> dict[str, Questions]:
    benchmark, tasks = open_benchmark(wanted.data_root), wanted.tasks
    backbone = open_backbone(wanted.base, wanted.options)
    check_boxes(benchmark, backbone)
    places = [benchmark.task(task).instruction for task in tasks]
    sources = [RecordFile(file, "test", place) for file, place in zip(wanted.files, places, strict=True)]
    found, asked = open_records(sources, benchmark.image_root, backbone.vocabulary), {}
    for task, source in zip(tasks, sources, strict=True):
        one = found[source]
        if isinstance(one, DataError):
            raise one
        rows = one.usable(wanted.unchecked)
        # of the file's questions, those that cannot be used among them
        rows = one.first(rows, wanted.limit)
        lengths = backbone.picture_tokens(benchmark.image_root, one.columns.names)
        asked[task] = Questions(one, rows, benchmark.image_root, backbone.placeholder, lengths)
    return asked
