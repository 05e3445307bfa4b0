"""Checks a benchmark before anything is trained on it: every record and picture, of training and of evaluation.

    python -m data.check --root DIR [--benchmark coin|FILE] [--instructions original diverse 10type] [--json FILE]

Prints a line a file: records beside their known number (copies that differ in it exist: no problem by itself),
pictures, problems by kind; then notes, the first problems of each file with their remedies, and where to get what is
missing. Exits with 1 if there is a problem. llava/check.py also checks what a base model makes of the records.

Records are kept, ready to be used, and what is whole is noted, in data.cache.cache_folder(): neither is read again
until a file changes. Pictures that have changed are looked at again by these commands alone.
"""

import argparse
import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from data.benchmark import COIN, INSTRUCTION_SETS, Benchmark, open_benchmark
from data.cache import cache_folder, replace_whole
from data.columns import Columns, Encoder
from data.preprocess import Prepared, RecordFile, open_records, silent_problems
from data.records import SHOWN_PROBLEMS, DataError, Problem
from data.references import files_of

VERSION = 3  # of what is checked: notes of another one do not count
MANY_INSTRUCTIONS = 1_000  # different ones of a file: more are likely no instructions


@dataclass
class FileReport:
    """What the check found in one file. `known`: how many records the benchmark's description says it has. `notes`:
    what is no problem by itself."""

    task: str
    split: str
    file: Path
    records: int = 0
    pictures: int = 0
    known: int | None = None
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

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
        lines += [f"note: {file.file}: {note}" for file in self.files for note in file.notes]
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
                    "notes": file.notes,
                    "first": [problem.text for problem in file.problems[:SHOWN_PROBLEMS]],
                }
                for file in self.files
            ],
        }


class Reader(Protocol):
    """What a run makes of the records, beyond what the data alone say; llava/check.py has the one of a base model.

    encoder: tokenises them. grouping: whether every prompt needs an instruction. digest: what tells readers apart.
    """

    encoder: Encoder
    grouping: bool
    digest: str

    def problems(self, task: str, columns: Columns, rows: np.ndarray, image_root: Path) -> list[Problem]:
        """Return what makes training or test records of these rows unusable."""


def check(benchmark: Benchmark, instructions: str, tasks: Sequence[str] = (), reader: Reader | None = None) -> Report:
    """Checks the named tasks, or all; with a `reader`, also what it cannot use. Every picture that has changed since it
    was looked at is looked at again. Raises ValueError for a task or instruction set that there is not."""
    start, files = time.monotonic(), []
    sources: dict[RecordFile, FileReport] = {}
    for name in tasks or benchmark.tasks:
        spec = benchmark.task(name)
        try:
            folder = benchmark.folder(instructions, name)
        except FileNotFoundError as error:
            folder = benchmark.root / benchmark.instructions[instructions] / spec.folders[0]
            files.append(FileReport(spec.name, "all", folder, problems=[Problem(0, "missing file", str(error))]))
            continue
        for split, path in (("train", folder / spec.train), ("test", folder / spec.test)):
            files.append(FileReport(spec.name, split, path, known=spec.records.get(split)))
            sources[RecordFile(path, split, spec.instruction)] = files[-1]
    prepared = open_records(list(sources), benchmark.image_root, reader and reader.encoder, thorough=True)
    for source, report in sources.items():
        _report(benchmark, report, prepared[source], reader)
        if report.split == "test" and isinstance(prepared[source], Prepared):
            report.problems += files_of(benchmark, report.task).check_questions(benchmark, instructions)
            report.problems.sort()
    return Report(benchmark, instructions, files, time.monotonic() - start)


def _report(benchmark: Benchmark, report: FileReport, found: Prepared | DataError, reader: Reader | None) -> None:
    if isinstance(found, DataError):
        report.problems = [Problem(0, "unreadable file", problem) for problem in found.problems]
        return
    columns, rows = found.columns, found.rows
    report.records, report.pictures = columns.told["records"], len(columns.names) - len(found.faults)
    report.problems = list(found.problems)
    if reader is not None:
        report.problems += reader.problems(report.task, columns, rows, benchmark.image_root)
    silent = silent_problems(found, rows)
    if silent and reader is not None and reader.grouping:
        report.problems += silent
    elif silent:
        report.notes.append(f"{len(silent):,} records without an instruction; --grouping true refuses them")
    report.problems.sort()
    if (distinct := len(columns.instructions)) > MANY_INSTRUCTIONS:
        report.notes.append(
            f"{distinct:,} different instructions in {report.records:,} records: they are compared pair by pair where "
            "tasks are grouped; is `instruction` in the benchmark's description right?"
        )


def check_benchmark(
    root: Path | str, instructions: str, tasks: Sequence[str], unchecked: bool = False, reader: Reader | None = None
) -> Report:
    """Checks what a run needs, and notes that it passed; a note that holds is not checked again.

    Raises ValueError with the report's text if there is a problem, unless the run wants to go on `unchecked`.
    """
    benchmark = open_benchmark(root)
    tasks = [benchmark.task(name).name for name in tasks or benchmark.tasks]
    files = _noted(_note_file(benchmark, instructions, reader))
    if set(tasks) <= {file.task for file in files}:
        return Report(benchmark, instructions, [file for file in files if file.task in tasks], 0.0)
    report = check(benchmark, instructions, tasks, reader)
    _note(report, reader)
    if not report.ok and not unchecked:
        raise ValueError(
            f"{report.text()}\n\nNothing was trained. --unchecked true goes on without the records that cannot be used."
        )
    return report


def _note_file(benchmark: Benchmark, instructions: str, reader: Reader | None) -> Path:
    parts = [str(VERSION), str(benchmark.root.resolve()), str(benchmark.file.resolve()), instructions]
    if reader is not None:
        parts.append(reader.digest)
    name = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    return cache_folder() / "checked" / f"{name}.json"


def _fingerprint(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _note(report: Report, reader: Reader | None) -> None:
    """Note that the benchmark passed, or forget that it did."""
    benchmark = report.benchmark
    path = _note_file(benchmark, report.instructions, reader)
    if not report.ok:
        path.unlink(missing_ok=True)
        return
    rows = [
        {key: value for key, value in {**vars(file), "file": str(file.file)}.items() if key != "problems"}
        for file in report.files
    ]
    tasks = dict.fromkeys(file.task for file in report.files)
    annotations = [found for name in tasks for found in files_of(benchmark, name).annotation_files(benchmark)]
    files = (benchmark.file, *(file.file for file in report.files), *annotations)
    seen = {str(found.resolve()): _fingerprint(found) for found in files}
    text = json.dumps({"seen": seen, "files": rows}) + "\n"
    replace_whole(path, lambda new: new.write_text(text, encoding="utf-8"))


def _noted(path: Path) -> list[FileReport]:
    """The files that passed, none if the note is not there, broken, or of files that have changed since."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        holds = all(_fingerprint(Path(name)) == seen for name, seen in told["seen"].items())
        files = [FileReport(**{**row, "file": Path(row["file"])}) for row in told["files"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
    return files if holds else []


def command(prog: str) -> argparse.ArgumentParser:
    """The command line of a check, which `execute` follows."""
    parser = argparse.ArgumentParser(prog=f"python -m {prog}", description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, required=True, help="folder of the benchmark")
    parser.add_argument("--benchmark", help="coin, or a YAML file; default: benchmark.yaml in the root, else coin")
    parser.add_argument("--instructions", nargs="+", choices=INSTRUCTION_SETS, default=["original"])
    parser.add_argument("--tasks", nargs="+", default=[])
    parser.add_argument("--json", type=Path, help="write the reports there, too")
    return parser


def execute(options: argparse.Namespace, reader_of: Callable[[list[str]], Reader | None]) -> None:
    """Check what `options` name, with the reader of these tasks; exits with 1 if there is a problem."""
    try:
        file = COIN if options.benchmark == "coin" else options.benchmark and Path(options.benchmark)
        if not options.root.is_dir():
            raise FileNotFoundError(f"{options.root} is no folder: correct --root")
        benchmark = open_benchmark(options.root, file)
        tasks = [benchmark.task(name).name for name in options.tasks or benchmark.tasks]
        reader = reader_of(tasks)
        reports = [check(benchmark, which, tasks, reader) for which in options.instructions]
    except (ValueError, OSError) as error:
        sys.exit(f"check: {error}")
    for report in reports:
        print(report.text())
        if benchmark.file == open_benchmark(options.root).file:
            _note(report, reader)
    if options.json:
        options.json.write_text(json.dumps([report.as_json() for report in reports], indent=1) + "\n", encoding="utf-8")
    sys.exit(0 if all(report.ok for report in reports) else 1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    execute(command("data.check").parse_args(arguments), lambda tasks: None)


if __name__ == "__main__":
    main()
