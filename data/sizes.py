"""Width and height of pictures, for what needs no pixels: how many positions of a sequence a picture takes.

    <cache>/pictures/<image root and names>.sizes.npy      int32 [names, 2] of a column of names

A picture's header is read once; the file is made anew when pictures of its image root were looked at after it.
"""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from joblib import cpu_count

from data.cache import make_once
from data.columns import Texts
from data.pictures import size_of
from data.preprocess import picture_note

MANY = 2_000  # headers that are read one after the other


def picture_sizes(root: Path, names: Sequence[str]) -> np.ndarray:
    """Return the width and height of each picture below `root`: int32 [len(names), 2].

    0 and 0 stand for one that cannot be opened, which the check of the records tells. What is read of a column of names
    is kept. Raises OSError where the cache cannot be written to.
    """
    if not isinstance(names, Texts):
        return _read(root, names)
    note = picture_note(root)
    content = os.fsencode(root.resolve()) + names.content.tobytes() + names.ends.tobytes()
    file = note.with_name(f"{hashlib.sha256(content).hexdigest()}.sizes.npy")

    def holds(path: Path) -> bool:
        try:
            return path.stat().st_mtime_ns >= (note.stat().st_mtime_ns if note.is_file() else 0)
        except OSError:
            return False

    def make(_: Path, new: Path) -> None:
        with new.open("wb") as opened:
            np.save(opened, _read(root, names))

    make_once([file], make, holds)
    found = np.load(file, mmap_mode="r")
    if len(absent := np.flatnonzero(found[:, 0] == 0)):  # perhaps they are there now
        found = np.array(found)
        found[absent] = _read(root, [names[place] for place in absent.tolist()])
    return found


def _read(root: Path, names: Sequence[str]) -> np.ndarray:
    def one(name: str) -> tuple[int, int]:
        try:
            return size_of(root / name)
        except OSError:
            return 0, 0

    if len(names) <= MANY:
        rows = [one(name) for name in names]
    else:
        with ThreadPoolExecutor(cpu_count()) as pool:  # what takes time is the file system
            rows = list(pool.map(one, names, chunksize=MANY))
    return np.array(rows, np.int32).reshape(-1, 2)
