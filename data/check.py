"""Checks a benchmark before anything is trained on it: every record and picture, of training and of evaluation.

    python -m data.check --root DIR [--benchmark coin|FILE] [--instructions original diverse 10type] [--json FILE]

Prints a line a file: records beside their known number (copies that differ in it exist: no problem by itself),
pictures, problems by kind; then the first problems of each file with their remedies, and where to get what is missing.
Exits with 1 if there is a problem. A benchmark that passes is noted in DIR/.checked-*.json, so that training does not
open every picture again while no file of records changes.
"""

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data.benchmark import COIN, INSTRUCTION_SETS, Benchmark, TaskSpec, open_benchmark
from eval.tasks import task_of
from llava.dataset import SHOWN_PROBLEMS, DataError, Loaded, Problem, read_questions, read_samples


@dataclass
class FileReport:
    """What the check found in one file. `known`: how many records the benchmark's description says it has."""

    task: str
    split: str
    file: Path
    records: int = 0
    pictures: int = 0
    known: int | None = None
    problems: list[Problem] = field(default_factory=list)

    def kinds(self) -> dict[str, int]:
        """Problems by kind."""
        return dict(Counter(problem.kind for problem in self.problems))


@dataclass
class Report:
    """A check of one instruction set."""

    benchmark: Benchmark
    instructions: str
    files: list[FileReport]
    seconds: float

    @property
    def ok(self) -> bool:
        return not any(file.problems for file in self.files)

    @property
    def records(self) -> int:
        return sum(file.records for file in self.files)

    def text(self) -> str:
        """For the terminal."""
        rate = self.records / max(self.seconds, 1e-9)
        lines = [
            f"{self.benchmark.name}, {self.instructions} instructions, {self.benchmark.root}: {self.records:,} records "
            f"in {self.seconds:.1f} s ({rate:,.0f} a second)",
            f"{'task':12s}{'split':7s}{'records':>9s}{'known':>9s}{'pictures':>10s}  problems",
        ]
        for file in self.files:
            known = "-" if file.known is None else f"{file.known:,}"
            kinds = ", ".join(f"{count} {kind}" for kind, count in file.kinds().items()) or "none"
            differs = "" if file.known in (None, file.records) else f"; {file.records - file.known:+,} records"
            lines.append(
                f"{file.task:12s}{file.split:7s}{file.records:9,}{known:>9s}{file.pictures:10,}  {kinds}{differs}"
            )
        for file in self.files:
            if file.problems:
                lines += ["", f"{file.file}:", *[f"  {problem.text}" for problem in file.problems[:SHOWN_PROBLEMS]]]
                if len(file.problems) > SHOWN_PROBLEMS:
                    lines.append(f"  and {len(file.problems) - SHOWN_PROBLEMS} more")
                if source := self.benchmark.tasks[file.task].source:
                    lines.append(f"  get it: {source}")
        return "\n".join(lines)

    def as_json(self) -> dict:
        """All of it, the first problems of each file included."""
        return {
            "benchmark": self.benchmark.name,
            "root": str(self.benchmark.root),
            "instructions": self.instructions,
            "ok": self.ok,
            "records": self.records,
            "seconds": round(self.seconds, 2),
            "files": [
                {
                    "task": file.task,
                    "split": file.split,
                    "file": str(file.file),
                    "records": file.records,
                    "known": file.known,
                    "pictures": file.pictures,
                    "problems": file.kinds(),
                    "first": [problem.text for problem in file.problems[:SHOWN_PROBLEMS]],
                }
                for file in self.files
            ],
        }


def check(benchmark: Benchmark, instructions: str, tasks: Sequence[str] = ()) -> Report:
    """Checks the named tasks, or all. Raises ValueError for a task or instruction set that there is not."""
    start, files = time.monotonic(), []
    for name in tasks or benchmark.tasks:
        spec = benchmark.task(name)
        try:
            folder = benchmark.folder(instructions, name)
        except FileNotFoundError as error:
            folder = benchmark.root / benchmark.instructions[instructions] / spec.folders[0]
            files.append(FileReport(name, "all", folder, problems=[Problem(0, "missing file", str(error))]))
            continue
        files.append(_check_file(benchmark, spec, "train", folder / spec.train))
        files.append(_check_file(benchmark, spec, "test", folder / spec.test))
        files[-1].problems += _references(benchmark, instructions, spec)
    return Report(benchmark, instructions, files, time.monotonic() - start)


def _check_file(benchmark: Benchmark, spec: TaskSpec, split: str, path: Path) -> FileReport:
    report = FileReport(spec.name, split, path, known=spec.records.get(split))
    try:
        loaded = (read_samples if split == "train" else read_questions)(path, benchmark.image_root)
    except DataError as error:
        report.problems = [Problem(0, "unreadable file", problem) for problem in error.problems]
        return report
    report.records = len(loaded.usable) + len(loaded.problems)
    report.pictures = len({item.image for item in loaded.usable if item.image})
    report.problems = loaded.problems + (_doubled(loaded) if split == "train" else [])
    return report


def _doubled(loaded: Loaded) -> list[Problem]:
    first: dict[str, int] = {}
    earlier = [(sample, first.setdefault(sample.id, sample.record)) for sample in loaded.usable]
    return [
        Problem(s.record, "duplicate id", f"record {s.record} (id {s.id!r}): record {i} has this id too; remove one")
        for s, i in earlier
        if i != s.record
    ]


def _references(benchmark: Benchmark, instructions: str, spec: TaskSpec) -> list[Problem]:
    try:
        task_of(benchmark, spec.name).load_references(benchmark, instructions)
    except (ValueError, OSError) as error:
        return [Problem(0, "annotations", str(error))]
    return []


def check_benchmark(root: Path | str, instructions: str, tasks: Sequence[str], unchecked: bool = False) -> Report:
    """Checks what a run needs, and notes that it passed; a note that holds is not checked again.

    Raises ValueError with the report's text if there is a problem, unless the run wants to go on `unchecked`.
    """
    benchmark = open_benchmark(root)
    if (told := _told(benchmark, instructions)) and set(tasks) <= set(told["tasks"]):
        files = [FileReport(**{**row, "file": Path(row["file"])}) for row in told["files"] if row["task"] in tasks]
        return Report(benchmark, instructions, files, 0.0)
    report = check(benchmark, instructions, tasks)
    if report.ok:
        _note(report, tasks)
    elif not unchecked:
        raise ValueError(
            f"{report.text()}\n\nNothing was trained. --unchecked true goes on without the records that cannot be used."
        )
    return report


def is_checked(root: Path | str, instructions: str, task: str) -> bool:
    """Whether a check of this task passed and no file of records has changed since."""
    told = _told(open_benchmark(root), instructions)
    return told is not None and task in told["tasks"]


def _fingerprint(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _note_file(benchmark: Benchmark, instructions: str) -> Path:
    return benchmark.root / f".checked-{instructions}.json"


def _note(report: Report, tasks: Sequence[str]) -> None:
    rows = [
        {key: value for key, value in {**vars(file), "file": str(file.file)}.items() if key != "problems"}
        for file in report.files
    ]
    seen = {str(path): _fingerprint(path) for path in (report.benchmark.file, *(file.file for file in report.files))}
    path = _note_file(report.benchmark, report.instructions)
    if not os.access(path.parent, os.W_OK):
        print(f"{path.parent} cannot be written to: the next run checks it again")
        return
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps({"tasks": list(tasks), "seen": seen, "files": rows}) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _told(benchmark: Benchmark, instructions: str) -> dict | None:
    path = _note_file(benchmark, instructions)
    if not path.is_file():
        return None
    told = json.loads(path.read_text(encoding="utf-8"))
    holds = all(Path(name).is_file() and _fingerprint(Path(name)) == seen for name, seen in told["seen"].items())
    return told if holds else None


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; exits with 1 if there is a problem."""
    parser = argparse.ArgumentParser(prog="python -m data.check", description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, required=True, help="folder of the benchmark")
    parser.add_argument("--benchmark", help="coin, or a YAML file; default: benchmark.yaml in the root, else coin")
    parser.add_argument("--instructions", nargs="+", choices=INSTRUCTION_SETS, default=["original"])
    parser.add_argument("--tasks", nargs="+", default=[])
    parser.add_argument("--json", type=Path, help="write the reports there, too")
    options = parser.parse_args(arguments)
    try:
        file = COIN if options.benchmark == "coin" else options.benchmark and Path(options.benchmark)
        benchmark = open_benchmark(options.root, file)
        reports = [check(benchmark, which, options.tasks) for which in options.instructions]
    except (ValueError, OSError) as error:
        sys.exit(f"data.check: {error}")
    for report in reports:
        print(report.text())
        if report.ok and benchmark.file == open_benchmark(options.root).file:
            _note(report, options.tasks or list(benchmark.tasks))
    if options.json:
        options.json.write_text(json.dumps([report.as_json() for report in reports], indent=1) + "\n", encoding="utf-8")
    sys.exit(0 if all(report.ok for report in reports) else 1)


if __name__ == "__main__":
    main()
