"""The folder of what can be made again at any time, and files in it that are made once, whoever needs them first."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout


def cache_folder() -> Path:
    """$LLACA_CACHE, else .cache in the project's folder."""
    return Path(os.environ.get("LLACA_CACHE") or Path(__file__).parents[1] / ".cache")


def writable(folder: Path) -> Path:
    """The folder, made if need be. Raises OSError with the remedy if it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise OSError(
            f"{folder} cannot be written to ({error.strerror}): what is read once is kept there, ready to be used; set "
            "LLACA_CACHE to a folder that can"
        ) from error
    return folder


def replace_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Calls `write` with the name of a new file, which then takes the place of `path`: it is either whole or absent."""
    new = writable(path.parent) / f"{path.name}.{os.getpid()}.partial"
    try:
        write(new)
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def make_once(files: Sequence[Path], make: Callable[[Path, Path], None]) -> None:
    """Makes each file that is not there: `make(file, partial)` writes what becomes `file` into `partial`.

    Processes that need the same files at the same time share the work: each makes what no other is making, and waits
    for the others' at the end. On a file system without locks they may make one twice, which changes nothing.
    """
    for patience in (0, -1):  # what is being made elsewhere comes last
        for file in files:
            if file.is_file():
                continue
            try:
                with _lock(file, patience):
                    if not file.is_file():
                        replace_whole(file, partial(make, file))
            except Timeout:
                continue


@contextmanager
def _lock(file: Path, patience: float) -> Iterator[None]:
    """Holds the right to make a file; what a process held that was killed is free again. Raises Timeout."""
    lock = FileLock(writable(file.parent) / f"{file.name}.lock")
    try:
        lock.acquire(timeout=patience)
    except NotImplementedError:  # the file system has no locks
        yield
        return
    try:
        yield
    finally:
        lock.release()
