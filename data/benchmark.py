"""What a benchmark is: where its files lie, which of them is evaluated, how a task's answers are read and scored.

<root>/benchmark.yaml                      says it; without one <root> holds CoIN, as data/coin.yaml describes it
<root>/<images>/                           image root, and official annotation files
<root>/<instruction set>/<Task>/           train.json, dev.json, and the evaluated test.json or val.json

docs/BENCHMARKS.md has a template for your own.
"""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from data.pictures import shown

COIN = Path(__file__).with_name("coin.yaml")
NOT_YET = {Path("data/dialog_mini"): Path(__file__).parent / "mini" / "dialogues.yaml"}  # before it is made
INSTRUCTION_SETS = ("original", "diverse", "10type")
INSTRUCTION_PLACES = ("last line", "first line", "before colon")


@dataclass(frozen=True)
class TaskSpec:
    """One task of a benchmark, as its YAML file describes it.

    scoring: a name of data.references.FILES. folders: names its folder may have, below the instruction set. test,
    train, dev: files in it. instruction: where a prompt holds what makes tasks alike, one of INSTRUCTION_PLACES
    ("before colon": of the last line). max_new_tokens: of an answer. records: known counts by split. source: where to
    get it.
    """

    name: str
    scoring: str
    folders: tuple[str, ...]
    train: str = "train.json"
    dev: str = "dev.json"
    test: str = "test.json"
    instruction: str = "last line"
    max_new_tokens: int = 128
    records: Mapping[str, int] = field(default_factory=dict)
    source: str = ""


@dataclass(frozen=True)
class Benchmark:
    """A YAML file and the folder it speaks of. `instructions`: set -> folder; `streams`: name -> tasks in order;
    `boxes`: the base model that its boxes are written for (llava/boxes.py), empty for fractions of padded squares."""

    name: str
    file: Path
    root: Path
    images: str
    instructions: Mapping[str, str]
    streams: Mapping[str, tuple[str, ...]]
    tasks: Mapping[str, TaskSpec]
    boxes: str = ""

    def task(self, name: str) -> TaskSpec:
        """The task of this name, or of a folder of this name. Raises ValueError listing the known ones."""
        for spec in self.tasks.values():
            if name in (spec.name, *spec.folders):
                return spec
        raise ValueError(f"task '{name}' is not known in {self.file}; choose from {', '.join(self.tasks)}")

    def stream(self, name: str) -> list[str]:
        """The tasks of a stream in the original order; without a name, all of them."""
        if name and name not in self.streams:
            raise ValueError(f"stream '{name}' is not in {self.file}; known: {', '.join(self.streams) or 'none'}")
        return list(self.streams[name] if name else self.tasks)

    @property
    def image_root(self) -> Path:
        """The folder that a record's `image` is relative to."""
        return self.root / self.images

    def folder(self, instructions: str, task: str) -> Path:
        """The task's folder below the instruction set. Raises ValueError or FileNotFoundError with the remedy."""
        spec = self.task(task)
        if instructions not in self.instructions:
            known = ", ".join(self.instructions)
            raise ValueError(f"instruction set '{instructions}' is not in {self.file}; choose one of {known}")
        parent = self.root / self.instructions[instructions]
        for name in spec.folders:
            if (parent / name).is_dir():
                return parent / name
        raise FileNotFoundError(
            f"{parent}: no folder {' or '.join(spec.folders)}; check the task's name and the data root"
        )


FIELD_TYPES = get_type_hints(TaskSpec)


def open_benchmark(root: "Path | str | Benchmark", file: Path | None = None) -> Benchmark:
    """The benchmark in a folder, described by `file`, by the folder's own benchmark.yaml, or as CoIN; a generated one
    that is not there yet as it will be.

    A benchmark that is open already comes back as it is. Raises ValueError naming file and key for a description that
    cannot be followed.
    """
    if isinstance(root, Benchmark):
        return root
    root = Path(root)
    own = root / "benchmark.yaml"
    file = file or (own if own.is_file() else NOT_YET.get(root, COIN))
    return _open(root, file, file.stat().st_mtime_ns)


@lru_cache
def _open(root: Path, file: Path, _changed: int) -> Benchmark:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{file}: not YAML ({error}); correct it") from error
    content = _mapping(content, file, "the file")
    known = {"name", "images", "instructions", "streams", "tasks", "boxes"}
    if unknown := sorted(content.keys() - known):
        raise ValueError(f"{file}: unknown key '{unknown[0]}'; it may hold {', '.join(sorted(known))}")
    instructions = _mapping(content.get("instructions", {"original": "."}), file, "instructions")
    for which, folder in instructions.items():
        _typed(folder, str, file, f"instructions: {which}")
    if strange := sorted(instructions.keys() - set(INSTRUCTION_SETS)):
        raise ValueError(f"{file}: instruction set '{strange[0]}' is not one of {', '.join(INSTRUCTION_SETS)}")
    tasks = {name: _task(file, name, said) for name, said in _mapping(content.get("tasks"), file, "tasks").items()}
    streams = {name: tuple(_typed(members, tuple[str, ...], file, f"streams: {name}"))
               for name, members in _mapping(content.get("streams", {}), file, "streams").items()}  # fmt: skip
    for name, members in streams.items():
        if unknown := [task for task in members if task not in tasks]:
            raise ValueError(f"{file}: stream {name} names the task '{unknown[0]}', which the file does not describe")
    name = str(_typed(content.get("name", root.name), str | int | float, file, "name"))
    images = _typed(content.get("images", "."), str, file, "images")
    boxes = _typed(content.get("boxes", ""), str, file, "boxes")
    return Benchmark(name, file, root, images, instructions, streams, tasks, boxes)


def _mapping(value: Any, file: Path, what: str) -> dict:
    if not isinstance(value, dict):
        raise ValueError(f"{file}: {what} must be a mapping, as in data/coin.yaml; it is {value!r}")
    return {str(key): item for key, item in value.items()}


WORDS = {str: "a text", int: "a whole number", tuple[str, ...]: "a list of texts", Mapping[str, int]: "a mapping of "
         "splits to whole numbers, as {train: 100}", str | int | float: "a text"}  # fmt: skip


def _typed(value: Any, kind: Any, file: Path, what: str) -> Any:
    """The value, which must be of a kind of WORDS. Raises ValueError naming file, key and what is expected."""
    if kind == tuple[str, ...]:
        fits = isinstance(value, list | tuple) and bool(value) and all(isinstance(item, str) for item in value)
    elif kind == Mapping[str, int]:
        fits = isinstance(value, dict) and all(type(number) is int for number in value.values())
    else:
        fits = isinstance(value, kind) and not isinstance(value, bool)
    if not fits:
        said = "empty" if value is None else shown(value)
        raise ValueError(f"{file}: {what} must be {WORDS[kind]}; it is {said}")
    return value


def _task(file: Path, name: str, said: Any) -> TaskSpec:
    where = f"task {name}"
    said = _mapping(said, file, where)
    known = {f.name: f for f in fields(TaskSpec) if f.name != "name"}
    if unknown := sorted(said.keys() - known.keys()):
        raise ValueError(f"{file}: {where} has an unknown key '{unknown[0]}'; it may hold {', '.join(known)}")
    values = {"folders": (name,), **said}
    if missing := [key for key, f in known.items() if f.default is f.default_factory is MISSING and key not in values]:
        raise ValueError(f"{file}: {where} lacks '{missing[0]}'")
    for key, value in values.items():
        values[key] = _typed(value, FIELD_TYPES[key], file, f"{where}: {key}")
    spec = TaskSpec(name, **{**values, "folders": tuple(values["folders"])})
    if spec.instruction not in INSTRUCTION_PLACES:
        raise ValueError(f"{file}: {where}: instruction is one of {', '.join(INSTRUCTION_PLACES)}")
    return spec


def image_root(root: Path | str | Benchmark) -> Path:
    """The folder that a record's `image` is relative to."""
    return open_benchmark(root).image_root


def task_folder(root: Path | str | Benchmark, instructions: str, task: str) -> Path:
    """The task's folder below the instruction set. Raises as `Benchmark.folder` does."""
    return open_benchmark(root).folder(instructions, task)


def train_file(root: Path | str | Benchmark, instructions: str, task: str) -> Path:
    """The task's training file."""
    return task_folder(root, instructions, task) / open_benchmark(root).task(task).train
