"""The training records of a run: of every task, of every stage, and the instructions in them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.benchmark import image_root, open_benchmark, train_file
from data.preprocess import Prepared, RecordFile, faults_of, open_records
from data.records import DataError
from llaca import hosts, ranks
from llaca.config import Recipe
from llaca.stream import Stage, ordered
from llava.backbone import Backbone
from llava.backbones import open_backbone
from llava.boxes import check_boxes
from llava.dataset import InstructionDataset


@dataclass
class TaskRecords:
    """The training records of one task: those `rows` of a file's columns that a run uses. `dropped`: how many of the
    others cannot be used."""

    task: str
    prepared: Prepared
    rows: np.ndarray
    dropped: int

    @property
    def source(self) -> Path:
        return self.prepared.source.path

    def wordings(self, grouping: bool) -> list[str]:
        """The distinct instructions. Raises DataError for a record without one, where tasks are grouped by them."""
        return self.prepared.wordings(self.rows, grouping)


def load_stream(recipe: Recipe) -> dict[str, TaskRecords]:
    """The training records of every task, with what is left out of an unchecked one.

    All are validated, tokenised and their pictures looked at before anything is trained (raises DataError), by the
    first process of every host, unless that has been done before; all map the same files.
    """
    stream, benchmark = recipe.stream, open_benchmark(recipe.stream.data_root)
    backbone = open_backbone(recipe.model.base, recipe.model.options)
    check_boxes(benchmark, backbone)
    vocabulary = backbone.vocabulary
    sources = {
        task: RecordFile(train_file(benchmark, stream.instructions, task), "train", benchmark.task(task).instruction)
        for task in ordered(stream.tasks, stream.order)
    }
    files, faults, first = list(sources.values()), None, ranks.first_of_host()
    found = hosts.together(lambda: open_records(files, benchmark.image_root, vocabulary) if first else {})
    if first:
        faults = faults_of(found.values())
    faults = ranks.agreed(faults, "which pictures are whole")
    if not first:
        found = open_records(files, benchmark.image_root, vocabulary, faults=faults)
    records = {}
    for task in stream.tasks:
        one = found[sources[task]]
        if isinstance(one, DataError):
            raise one
        rows = one.usable(stream.unchecked)
        if not len(rows):
            raise DataError(one.source.path, ["no record can be used"])
        dropped = one.columns.told["records"] - len(rows)
        records[task] = TaskRecords(task, one, rows[: stream.max_train_samples or None], dropped)
    return records


def stage_wordings(recipe: Recipe, stages: list[Stage], records: dict[str, TaskRecords]) -> dict[str, list[str]]:
    """The instructions of every stage by its name. Raises DataError as `TaskRecords.wordings` does."""
    own = {task: one.wordings(recipe.method.grouping) for task, one in records.items()}
    return {stage.name: sorted({text for task in stage.tasks for text in own[task]}) for stage in stages}


def stage_datasets(
    recipe: Recipe, stages: list[Stage], records: dict[str, TaskRecords], backbone: Backbone
) -> dict[str, InstructionDataset]:
    """The training set of every stage by its task. Raises DataError for records that the maximum length makes unusable,
    unless the run is unchecked."""
    root, made = image_root(recipe.stream.data_root), {}

    def dataset(task: str, max_length: int) -> InstructionDataset:
        own = records[task]
        found = InstructionDataset(own.prepared.columns, backbone, max_length, root, own.rows)
        if found.dropped and not recipe.stream.unchecked:
            raise DataError(own.source, [problem.text for problem in found.dropped])
        return found

    for stage in stages:
        if len(stage.tasks) == 1:
            made[stage.task] = dataset(stage.task, recipe.for_stage(stage.tasks).max_length)
        else:
            first, *others = (dataset(task, recipe.train.max_length) for task in stage.tasks)
            made[stage.task] = first.joined([(other, range(len(other))) for other in others])
    return made
