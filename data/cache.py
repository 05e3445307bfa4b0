"""The folder of what can be made again at any time, and files in it that are made once, whoever needs them first."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from uuid import uuid4

from filelock import FileLock, Timeout

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # what some network file systems answer


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
    """Calls `write` with the name of a new file, which then takes the place of `path`: it is either whole or absent.

    Whom the umask lets read a file may read it, also one of safetensors, which makes its files for their owner alone.
    """
    draft = (
        writable(path.parent) / f"{path.name}.{uuid4().hex}.partial"
    )  # for what a writer leaves beside its file, too
    draft.mkdir()
    new = draft / path.name
    try:
        new.touch()
        readable = new.stat().st_mode
        write(new)
        new.chmod(readable)
        os.replace(new, path)
    finally:
        shutil.rmtree(draft)


def make_once(
    files: Sequence[Path], make: Callable[[Path, Path], None], is_whole: Callable[[Path], bool] = Path.is_file
) -> None:
    """Makes each file that is not whole: `make(file, partial)` writes what becomes `file` into `partial`.

    Processes that need the same files at the same time share the work: each makes what no other is making, and waits
    for the others' at the end. On a file system without locks they may make one twice, which changes nothing.
    """
    for patience in (0, -1):  # what is being made elsewhere comes last
        for file in files:
            if is_whole(file):
                continue
            try:
                with _lock(file, patience):
                    if not is_whole(file):
                        for left in file.parent.glob(f"{file.name}.*.partial"):  # of processes that were killed
                            shutil.rmtree(left, ignore_errors=True)
                        replace_whole(file, partial(make, file))
            except Timeout:
                continue


@contextmanager
def _lock(file: Path, patience: float) -> Iterator[None]:
    """Holds the right to make a file; what a process held that was killed is free again. Raises Timeout if another one
    holds it for longer than `patience` seconds (-1: for ever)."""
    lock = FileLock(writable(file.parent) / f"{file.name}.lock")
    try:
        lock.acquire(timeout=patience)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        yield
        return
    try:
        yield
    finally:
        lock.release()
