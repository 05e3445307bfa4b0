"""Writes records as CoIN's files: an instruction put to each, the same records in every set, a file whole or absent."""

import filecmp
import json
import os
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from data.benchmark import INSTRUCTION_SETS, Benchmark
from data.prepare.source import Record
from data.progress import progress
from data.records import IMAGE

INSTRUCTIONS = Path(__file__).parents[1] / "instructions.json"


class Choices(NamedTuple):
    """How a release becomes files: in which instruction sets, and by which `seed` a record's wording is drawn.

    synsets: a file of ImageNet's classes to take. skip_missing: leave out records whose picture is not there.
    overwrite: replace files that are there with other content.
    """

    instructions: Sequence[str] = INSTRUCTION_SETS
    seed: int = 0
    synsets: Path | None = None
    skip_missing: bool = False
    overwrite: bool = False


def prompts(task: str, questions: Sequence[str], instruction: str) -> list[str]:
    """The human turns of a record, without the image token.

    ImageNet: the instruction alone. Grounding: "<instruction>: <expression>" in every turn. The others: the instruction
    on a line of its own below the first question, which holds for the questions that follow, as in LLaVA's mix.
    """
    if task == "ImageNet":
        return [instruction]
    if task == "Grounding":
        return [f"{instruction}: {expression}" for expression in questions]
    return [f"{questions[0]}\n{instruction}", *questions[1:]]


def wording(wordings: Sequence[str], seed: int, task: str, record_id: str | int) -> str:
    """The record's wording of the instruction: a draw that depends on nothing but seed, task and record id."""
    return random.Random(f"{seed}/{task}/{record_id}").choice(wordings)


def train_row(task: str, record: Record, instruction: str) -> dict[str, Any]:
    """A record of train.json."""
    first, *more = prompts(task, [question for question, _ in record.turns], instruction)
    human = [f"{IMAGE}\n{first}" if record.image else first, *more]
    conversations = [
        {"from": speaker, "value": value}
        for question, (_, answer) in zip(human, record.turns, strict=True)
        for speaker, value in (("human", question), ("gpt", answer))
    ]
    return {"id": str(record.id), **_image(record), "conversations": conversations}


def evaluated_row(task: str, record: Record, instruction: str) -> dict[str, Any]:
    """A record of the file that is evaluated; `text` has no image token."""
    (text,) = prompts(task, [question for question, _ in record.turns], instruction)
    return {"question_id": record.id, **_image(record), "text": text, **record.extras}


def _image(record: Record) -> dict[str, str]:
    return {"image": record.image} if record.image else {}


def write_task(
    benchmark: Benchmark,
    task: str,
    records: tuple[Sequence[Record], Sequence[Record]],
    choices: Choices,
    annotations: Sequence[Path] = (),
) -> list[Path]:
    """Write the task's files of (training, evaluated) records, and copy `annotations` to where scoring reads them.

    Returns the paths. Nothing is written if a file with other content is there, unless `overwrite`: FileExistsError.
    """
    wordings = json.loads(INSTRUCTIONS.read_text(encoding="utf-8"))["instructions"][task]
    spec = benchmark.tasks[task]
    files: dict[Path, Callable[[Path], object]] = {
        benchmark.image_root / spec.folders[0] / path.name: partial(shutil.copyfile, path) for path in annotations
    }
    for which in choices.instructions:
        parent = benchmark.root / benchmark.instructions[which]
        # The folder that is read as the task's: one of its names that is there already, else its own name.
        folder = next((parent / name for name in spec.folders if (parent / name).is_dir()), parent / spec.folders[0])
        for name, own, row in zip((spec.train, spec.test), records, (train_row, evaluated_row), strict=True):
            drawn = partial(wording, wordings[which], choices.seed, task)
            rows = [partial(row, task, record, drawn(record.id)) for record in own]
            files[folder / name] = partial(_write_rows, rows, f"{which} {name}")
    write_files(files, choices.overwrite)
    return list(files)


def _write_rows(rows: Sequence[Callable[[], dict[str, Any]]], name: str, path: Path) -> None:
    """A JSON list, one record a line."""
    with path.open("w", encoding="utf-8") as file:
        for number, row in enumerate(progress(rows, desc=name, leave=False, delay=3, unit="record")):
            file.write(("[\n" if number == 0 else ",\n") + json.dumps(row()))
        file.write("\n]\n")


def write_files(files: Mapping[Path, Callable[[Path], object]], overwrite: bool) -> None:
    """Let every function write its file beside the place where it belongs, then move them all there."""
    partials = {path: path.with_name(path.name + ".partial") for path in files}
    try:
        for path, write in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            write(partials[path])
        changed = [path for path in files if not (path.is_file() and filecmp.cmp(path, partials[path], shallow=False))]
        for path in changed:
            if path.exists() and not overwrite:
                raise FileExistsError(f"{path}: is there with other content; move it away or pass --overwrite")
        for path in changed:
            os.replace(partials[path], path)
    finally:
        for path in partials.values():
            path.unlink(missing_ok=True)
