"""SHA-256 of files, remembered, so that a second start does not read 14 GB of weights again.

<cache>/checksums/<SHA-256 of the path>.json holds path, size, mtime_ns and sha256 of one
file. An entry holds while the file's size and time of change are the same. Each file has an entry of its own, replaced
as a whole, so any number of processes may write at once. Measured on one core with SHA instructions: 1.5 GB a second
of processor time, so about 10 seconds for the 14 GB of a 7B base once they are in memory.
"""

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path

from data.cache import cache_folder, replace_whole

SETTLED = 2.0  # seconds; some file systems keep the time of a change no finer than that
_memo: dict[tuple[str, int, int], str] = {}


def checksum(path: Path) -> str:
    """SHA-256 of a file's content, 64 hexadecimal digits.

    Remembered by resolved path, size in bytes and time of change in nanoseconds, in this process and on the disk. A
    memo that cannot be read or written is no error: the file is read again. Raises OSError for a file that cannot be
    read.
    """
    path = Path(path).resolve()
    with path.open("rb") as file:
        key = _key(path, os.fstat(file.fileno()))
        if key in _memo:
            return _memo[key]
        if told := _read(key):
            return _memo.setdefault(key, told)
        found = hashlib.file_digest(file, "sha256").hexdigest()
        # A file that is being written, or was a moment ago, can change again without another size or time.
        if key == _key(path, os.fstat(file.fileno())) and time.time() - key[2] / 1e9 > SETTLED:
            _memo[key] = found
            _write(key, found)
    return found


def _key(path: Path, stat: os.stat_result) -> tuple[str, int, int]:
    return str(path), stat.st_size, stat.st_mtime_ns


def _entry(path: str) -> Path:
    name = hashlib.sha256(os.fsencode(path)).hexdigest()
    return cache_folder() / "checksums" / f"{name}.json"


def _read(key: tuple[str, int, int]) -> str | None:
    """What the disk remembers of this key; None without an entry, and for a broken one."""
    entry = _entry(key[0])
    try:
        told = json.loads(entry.read_bytes())
        holds = [told["path"], told["size"], told["mtime_ns"]] == list(key)
        found = told["sha256"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return found if holds and isinstance(found, str) and len(found) == 64 else None


def _write(key: tuple[str, int, int], found: str) -> None:
    entry = _entry(key[0])
    told = json.dumps(dict(zip(("path", "size", "mtime_ns"), key, strict=True)) | {"sha256": found}) + "\n"
    with suppress(OSError):
        replace_whole(entry, lambda new: new.write_text(told, encoding="utf-8"))
