"""Pictures opened by threads before they are asked for, while the model works on those before them."""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

Picture = dict[str, torch.Tensor]
THREADS = 4  # Pillow decodes and scales without Python's lock


class Ahead:
    """Reads pictures in the order in which they are going to be asked for, at most `depth` of them ahead.

    `read` makes of a path what the model takes. Use as a context: leaving it ends the threads.
    """

    def __init__(self, read: Callable[[Path], Picture], paths: Iterable[Path], depth: int):
        self._read, self._to_come, self._depth = read, deque(paths), depth
        self._pool, self._begun = ThreadPoolExecutor(THREADS), {}

    def __enter__(self) -> "Ahead":
        self._go_on()
        return self

    def __exit__(self, *_) -> None:
        self._pool.shutdown(cancel_futures=True)

    def take(self, paths: Sequence[Path]) -> list[Future[Picture]]:
        """Return what becomes of these pictures and go on with the next ones; one may be asked for again."""
        taken = [self._begun.pop(path, None) or self._pool.submit(self._read, path) for path in paths]
        self._go_on()
        return taken

    def _go_on(self) -> None:
        while self._to_come and len(self._begun) < self._depth:
            path = self._to_come.popleft()
            self._begun[path] = self._pool.submit(self._read, path)
