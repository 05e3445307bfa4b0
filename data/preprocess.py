"""Files of records, ready to be used: validated and tokenised once into column files, their pictures looked at once.

    <cache>/records/<checksum>.safetensors      the columns of one file for one encoder (data/columns.py)
    <cache>/pictures/<image root>.json          the pictures that were looked at, with size and time of change
                                  .sets.json    the sets of them that files name, whole when they were looked at

The cache is data.cache.cache_folder(). What is there is not made again; files of some size are made by processes of
their own, one a core, whose memory goes when they are done. `python -m data.preprocess` is such a process.
"""

import gc
import hashlib
import json
import os
import pickle
import subprocess
import sys
from base64 import b64decode, b64encode
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from joblib import cpu_count
from safetensors import SafetensorError

from data.cache import cache_folder, make_once, replace_whole
from data.checksums import checksum
from data.columns import (
    VERSION,
    Columns,
    Encoder,
    QuestionColumns,
    TrainingColumns,
    load,
    question_columns,
    rows_before,
    save,
    training_columns,
)
from data.records import DataError, Fault, Problem, picture_fault, questions_of, read_list, samples_of

KINDS: dict[str, type[Columns]] = {"train": TrainingColumns, "test": QuestionColumns}
ALONE = 16 << 20  # bytes of files that this process makes by itself
LOOKED_AT = 2_000  # pictures that it looks at by itself


class RecordFile(NamedTuple):
    """A file of records. `kind`: train or test; `place`: where a prompt holds its instruction (instruction_of)."""

    path: Path
    kind: str
    place: str


@dataclass
class Prepared:
    """The columns of a file below an image root, and what is wrong with its pictures, by their names."""

    source: RecordFile
    columns: Columns
    faults: dict[str, tuple[str, str]] = field(default_factory=dict)  # name -> (what is wrong, kind)

    @property
    def rows(self) -> np.ndarray:
        """The rows of `columns` whose pictures are whole."""
        if not self.faults:
            return np.arange(len(self.columns))
        bad = [name in self.faults for name in self.columns.names] + [False]  # the last for those without a picture
        return np.flatnonzero(~np.array(bad)[self.columns.picture])

    @property
    def problems(self) -> list[Problem]:
        """What is wrong with the records that cannot be used, by their numbers."""
        whole, found = set(self.rows.tolist()) if self.faults else None, self.columns.problems
        if whole is not None:
            for row in range(len(self.columns)):
                if row not in whole:
                    text, kind = self.faults[self.columns.image(row)]
                    found.append(Problem(int(self.columns.record[row]), kind, f"{self.columns.name(row)}: {text}"))
        return sorted(found)

    def usable(self, unchecked: bool) -> np.ndarray:
        """The rows to use. Raises DataError if there is a problem, unless the run is `unchecked`."""
        if not unchecked and (problems := self.problems):
            raise DataError(self.source.path, [problem.text for problem in problems])
        return self.rows

    def wordings(self, rows: np.ndarray, grouping: bool) -> list[str]:
        """The distinct instructions of these rows. Raises DataError for a row without, where `grouping` needs it."""
        columns = self.columns
        if grouping and (problems := silent_problems(self, rows)):
            raise DataError(self.source.path, [problem.text for problem in problems])
        return columns.wordings(rows)

    def first(self, rows: np.ndarray, limit: int) -> np.ndarray:
        """Those of the rows whose records are among the first `limit` of the file; 0: all."""
        return rows[: np.searchsorted(rows, rows_before(self.columns, limit))] if limit else rows


def silent_problems(prepared: Prepared, rows: np.ndarray) -> list[Problem]:
    """Those of the rows in whose prompts there is no instruction."""
    columns, place = prepared.columns, prepared.source.place
    why = (
        f"no instruction ({place}) in the prompt; tasks are grouped by it: add it, or correct `instruction` in the "
        "benchmark's description"
    )
    return [
        Problem(int(columns.record[row]), "no instruction", f"{columns.name(row)}: {why}")
        for row in rows[columns.instruction[rows] < 0].tolist()
    ]


def columns_file(source: RecordFile, encoder: Encoder | None) -> Path:
    """Where the columns of a file are."""
    parts = [str(VERSION), source.kind, source.place, checksum(source.path), encoder.digest if encoder else ""]
    name = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    return cache_folder() / "records" / f"{name}.safetensors"


def make(source: RecordFile, encoder: Encoder | None) -> Columns:
    """Read, validate and tokenise a file. Raises DataError for a file that is no list of records."""
    problems: list[Problem] = []
    records = read_list(source.path)
    if source.kind == "train":
        return training_columns(samples_of(records, problems), source.place, encoder, problems, len(records))
    return question_columns(questions_of(records, problems), source.place, encoder, problems, len(records))


def make_columns(sources: Sequence[RecordFile], encoder: Encoder | None) -> dict[RecordFile, Columns | DataError]:
    """Return the columns of each file, made where they are not there yet; a DataError in place of a file that is no
    list of records. Raises OSError where the cache cannot be written to."""
    found: dict[RecordFile, Columns | DataError] = {}
    files: dict[RecordFile, Path] = {}  # sources of the same content have one file
    for source in sources:
        try:
            files[source] = columns_file(source, encoder)
        except OSError as error:
            found[source] = DataError(
                source.path,
                [f"cannot be read ({error.strerror}); check data_root and benchmark.yaml"],
            )
    waiting = {file: source for source, file in files.items() if not _is_whole(KINDS[source.kind], file)}
    problems: dict[Path, list[str]] = {}
    if waiting:
        sizes = {file: source.path.stat().st_size for file, source in waiting.items()}
        waiting = {file: waiting[file] for file in sorted(waiting, key=sizes.__getitem__, reverse=True)}
        jobs = [(source, encoder, file) for file, source in waiting.items()]
        if sum(sizes.values()) <= ALONE:
            faults = [_make_here(*job) for job in jobs]
        else:
            with ThreadPoolExecutor(cpu_count()) as pool:
                faults = list(pool.map(lambda job: _make_elsewhere(*job), jobs))
        problems = {file: own for file, own in zip(waiting, faults, strict=True) if own}
    for source, file in files.items():
        own = problems.get(file)
        found[source] = DataError(source.path, own) if own else load(file, KINDS[source.kind])
    return {source: found[source] for source in sources}


def _is_whole(kind: type[Columns], file: Path) -> bool:
    """Whether a column file is there and can be read; else it is made again."""
    try:
        load(file, kind)
    except (FileNotFoundError, SafetensorError, ValueError, KeyError, TypeError):
        return False
    return True


def _make_here(source: RecordFile, encoder: Encoder | None, file: Path) -> list[str]:
    try:
        make_once([file], lambda _, new: save(make(source, encoder), new), partial(_is_whole, KINDS[source.kind]))
    except DataError as error:
        return error.problems
    return []


def _make_elsewhere(source: RecordFile, encoder: Encoder | None, file: Path) -> list[str]:
    job = {"path": str(source.path), "kind": source.kind, "place": source.place, "file": str(file)}
    job["encoder"] = b64encode(pickle.dumps(encoder)).decode()
    return _worker(job, str(source.path))


def _worker(job: dict, what: str) -> list:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TOKENIZERS_PARALLELISM": "false"}
    line = [sys.executable, "-m", "data.preprocess"]
    done = subprocess.run(line, input=json.dumps(job), capture_output=True, text=True, env=environment)
    if done.returncode:
        raise OSError(f"{what} could not be prepared (status {done.returncode}): {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout)


def main() -> None:
    """A process of `make_columns` or `look`: does the job on its standard input, prints the problems as JSON."""
    gc.disable()  # what is made here are millions of small objects without cycles: looking for these takes a fifth
    job = json.load(sys.stdin)
    if "pictures" in job:
        print(json.dumps(_look_at(Path(job["root"]), job["pictures"])))
        return
    encoder = pickle.loads(b64decode(job["encoder"]))
    print(json.dumps(_make_here(RecordFile(Path(job["path"]), job["kind"], job["place"]), encoder, Path(job["file"]))))


# --- pictures ---


def look(columns: Sequence[Columns], image_root: Path, thorough: bool = False) -> dict[str, tuple[str, str]]:
    """Return what is wrong with the pictures that these columns name, by their names: (text, kind).

    A picture is decoded once; what was whole is noted with its size and time of change. Each call sees whether every
    picture is there; `thorough` also sees which have changed, and decodes those again.
    """
    note, found, waiting, fresh = _Note(image_root), {}, [], {}
    for one in columns:
        names = set(one.names)
        there = _present(image_root, names)
        # a folder that may not be listed may still be read
        absent = {name: picture_fault(image_root, name, look=False) for name in sorted(names - there)}
        missing = {name: (str(fault), fault.kind) for name, fault in absent.items() if fault}
        there |= absent.keys() - missing.keys()
        found |= missing
        whole = digest_of_names(one)
        if whole not in note.looked or thorough:
            waiting.append((whole, there, bool(missing)))
            fresh |= dict.fromkeys(note.unseen(there, thorough))
    faults = _faults(image_root, list(fresh), note) if fresh else {}
    found |= faults
    for whole, there, lacks in waiting:
        if lacks or not faults.keys().isdisjoint(there):
            note.looked.discard(whole)
        else:
            note.looked.add(whole)
    note.write()
    return found


def digest_of_names(columns: Columns) -> str:
    """What tells the pictures of two files apart."""
    names = columns.names
    return hashlib.sha256(names.content.tobytes() + names.ends.tobytes()).hexdigest()


def _faults(root: Path, names: list[str], note: "_Note") -> dict[str, tuple[str, str]]:
    """Decode the pictures, with all cores where they are many; note those that are whole, return the others."""
    if len(names) <= LOOKED_AT:
        results = _look_at(root, names)
    else:
        shares = [names[first :: cpu_count()] for first in range(cpu_count())]
        with ThreadPoolExecutor(cpu_count()) as pool:
            jobs = [{"root": str(root), "pictures": share} for share in shares]
            results = [row for rows in pool.map(lambda job: _worker(job, str(root)), jobs) for row in rows]
    found = {}
    for name, stamp, text, kind in results:
        if text:
            found[name] = (text, kind)
        note.take(name, None if text else stamp)
    return found


def _present(root: Path, names: Collection[str]) -> set[str]:
    """Those of the names that are there; a folder is listed once, which on a network costs less than asking by name."""
    folders, found = defaultdict(list), set()
    for name in names:
        folders[os.path.dirname(name)].append(name)
    for folder, members in folders.items():
        try:
            with os.scandir(root / folder) as entries:
                there = {entry.name for entry in entries if not entry.is_symlink() or entry.is_file()}
        except OSError:
            continue
        found.update(name for name in members if os.path.basename(name) in there)
    return found


def _look_at(root: Path, names: Sequence[str]) -> list[tuple[str, list[int], str, str]]:
    """(name, stamp, what is wrong or nothing, its kind) of each picture."""
    rows = []
    for name in names:
        fault = picture_fault(root, name)
        text, kind = (str(fault), fault.kind) if isinstance(fault, Fault) else ("", "")
        rows.append((name, _stamp(root, name), text, kind))
    return rows


def _stamp(root: Path, name: str) -> list[int]:
    try:
        stat = os.stat(root / name)
    except OSError:
        return []
    return [stat.st_size, stat.st_mtime_ns]


def picture_note(root: Path) -> Path:
    """Where the pictures below an image root are noted that were looked at."""
    name = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()
    return cache_folder() / "pictures" / f"{name}.json"


class _Note:
    """The pictures below an image root that were whole when they were looked at: their stamps by name, read when they
    are asked for, and `looked`, digests of sets of names that were whole together."""

    def __init__(self, root: Path):
        self.root, self.stamps, self._changed = root, None, False
        self._file = picture_note(root)
        self._sets = self._file.with_suffix(".sets.json")
        self.looked = set(_read(self._sets, list))
        self._before = set(self.looked)

    def unseen(self, names: set[str], thorough: bool) -> list[str]:
        """Those of the names that are not noted; `thorough`: or have changed since."""
        if self.stamps is None:
            self.stamps = _read(self._file, dict)
        known = self.stamps
        return [n for n in sorted(names) if n not in known or (thorough and _stamp(self.root, n) != known[n])]

    def take(self, name: str, stamp: list[int] | None) -> None:
        """Note a whole picture, or forget a broken one."""
        self._changed = True
        if stamp is None:
            self.stamps.pop(name, None)
        else:
            self.stamps[name] = stamp

    def write(self) -> None:
        """Put the note on the disk."""
        files = [(self._file, self.stamps)] if self._changed else []
        files += [(self._sets, sorted(self.looked))] if self.looked != self._before else []
        for path, content in files:
            text = json.dumps(content)
            replace_whole(path, lambda new, text=text: new.write_text(text, encoding="utf-8"))


def _read(path: Path, kind: type) -> Any:
    """What the cache notes in a JSON file; nothing where it is not there or broken: all is looked at again."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return kind()
    return found if isinstance(found, kind) else kind()


Faults = Mapping[str, tuple[str, str]]  # picture -> (what is wrong, kind)


def open_records(
    sources: Sequence[RecordFile],
    image_root: Path,
    encoder: Encoder | None,
    thorough: bool = False,
    faults: Faults | None = None,
) -> dict[RecordFile, Prepared | DataError]:
    """`make_columns`, and `look` at the pictures of all that could be read, unless their `faults` are known."""
    columns = make_columns(sources, encoder)
    if faults is None:
        faults = look([one for one in columns.values() if isinstance(one, Columns)], image_root, thorough)
    found: dict[RecordFile, Prepared | DataError] = {}
    for source, one in columns.items():
        if isinstance(one, DataError):
            found[source] = one
        else:
            own = {name: faults[name] for name in one.names if name in faults} if faults else {}
            found[source] = Prepared(source, one, own)
    return found


def faults_of(found: Iterable[Prepared | DataError]) -> Faults:
    """What is wrong with the pictures of all of these."""
    return {name: fault for one in found if isinstance(one, Prepared) for name, fault in one.faults.items()}


if __name__ == "__main__":
    main()
