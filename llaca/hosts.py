"""Several processes, perhaps on several hosts: they start alike, fail together, and notice a host that has gone.

A process that is killed closes its connections, and the others' next collective fails at once. A host that loses power
or its network says nothing: without `Heartbeat` the others would wait for it for half an hour.
"""

import atexit
import hashlib
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from data.checksums import checksum
from llaca import machine, ranks
from llaca.config import Recipe
from llaca.stream import environment, input_files, run_folder

T = TypeVar("T")
ROOT = Path(__file__).parents[1]
SOURCES = ("data", "llaca", "llava")
BEAT, SILENCE = 5.0, 120.0  # seconds between two signs of life; without one that a process is waited for


def together(act: Callable[[], T]) -> T:
    """The result of `act()`, which every process calls; all raise if it raises ValueError or OSError in one.

    Those in which it did not raise a ValueError that names the host and the error: they would wait for the other.
    """
    result = error = None
    try:
        result = act()
    except (ValueError, OSError) as raised:
        error = raised
    told = ranks.everyone(None if error is None else f"{socket.gethostname()}: {error}")
    if error is not None:
        raise error
    if first := next((text for text in told if text), None):
        raise ValueError(f"another process cannot go on; {first}")
    return result


def start_alike(recipe: Recipe) -> None:
    """Raises ValueError, in every process and naming the host, where processes differ in what determines the result:
    the recipe, the code, the versions, the base, the training files; or do not see the run folder of the first. Raises
    OSError for a file that cannot be read."""
    if ranks.count() == 1:
        return
    facts = together(lambda: _facts(recipe))
    told = ranks.everyone((socket.gethostname(), facts))
    (first, wanted), faults = told[0], []
    for host, found in dict(told[1:]).items():
        differs = [name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)]
        faults += [f"{name} is {found.get(name)!r} on {host} and {wanted.get(name)!r} on {first}" for name in differs]
    if faults:
        raise ValueError("every process has to train the same: " + "; ".join(sorted(faults)))
    unseen = _hosts_without(run_folder(recipe))
    if unseen:
        raise ValueError(
            f"{run_folder(recipe)} on {first} cannot be seen from {', '.join(unseen)}: give a --runs-dir on a file "
            "system that all hosts share"
        )
    if len({host for host, _ in told}) > 1:
        heartbeat()


def _facts(recipe: Recipe) -> dict:
    around, code = environment(), hashlib.sha256()
    for path in sorted(path for folder in SOURCES for path in (ROOT / folder).rglob("*.py")):
        code.update(path.read_bytes())
    versions = {name: around[name] for name in ("commit", "python", *machine.PACKAGES)}
    inputs = {f"the checksum of {name}": checksum(path) for name, path in input_files(recipe).items()}
    options = {f"--{name}": value for name, value in recipe.flat().items()}
    return {**options, **versions, **inputs, "the code's checksum": code.hexdigest()[:16]}


def _hosts_without(folder: Path) -> list[str]:
    """Hosts that do not see a file that the first process writes there."""
    name = ranks.everyone(f".seen-{uuid.uuid4().hex}")[0]

    def write() -> bool:
        """By the first process alone: what another one asks for before it is there, its host may think missing."""
        new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
        return new

    new = together(lambda: ranks.first() and write())
    unseen = [] if (folder / name).exists() else [socket.gethostname()]
    told = ranks.everyone(unseen)
    if ranks.first():
        (folder / name).unlink()
        if new:
            with suppress(OSError):
                folder.rmdir()
    return sorted({host for hosts in told for host in hosts})


class Heartbeat:
    """Ends this process, with a message, when another one has shown no sign of life for `silence` seconds.

    The signs go through a store beside the process group's own, in a thread of its own: they come whatever the process
    computes or waits for, and under every backend. A process on the first host that has ended counts as silent.
    """

    def __init__(self, silence: float):
        self.silence, self.stopped = silence, threading.Event()
        self.heard = {rank: (None, time.monotonic()) for rank in range(ranks.count()) if rank != ranks.rank()}
        self.names = dict(enumerate(ranks.everyone(socket.gethostname())))
        self.store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        self.store.set(self._key(ranks.rank()), "0")
        ranks.wait()
        self.threads = [threading.Thread(target=work, daemon=True) for work in (self._beat, self._watch)]
        for thread in self.threads:
            thread.start()
        atexit.register(self.stop)

    def stop(self) -> None:
        """Ends the watch: the interpreter must not go while a thread is inside the store."""
        self.stopped.set()
        for thread in self.threads:
            thread.join(timeout=2 * BEAT)

    def _key(self, rank: int) -> str:
        return f"llaca/alive/{rank}"

    def _beat(self) -> None:
        count = 0
        while not self.stopped.wait(min(BEAT, self.silence / 4)):
            count += 1
            with suppress(RuntimeError):  # the store is silent, too: `_watch` sees it
                self.store.set(self._key(ranks.rank()), str(count))
                for rank, value in zip(self.heard, self.store.multi_get(list(map(self._key, self.heard))), strict=True):
                    if value != self.heard[rank][0]:
                        self.heard[rank] = (value, time.monotonic())

    def _watch(self) -> None:
        before = time.monotonic()
        while not self.stopped.wait(min(BEAT, self.silence / 4)):
            now = time.monotonic()
            if now - before > self.silence / 2:  # this process was stopped itself, and perhaps all were
                self.heard.update({rank: (value, now) for rank, (value, _) in self.heard.items()})
            before = now
            silent = [rank for rank, (_, when) in self.heard.items() if now - when > self.silence]
            if silent:
                who = ", ".join(f"rank {rank} on {self.names[rank]}" for rank in silent)
                print(
                    f"llaca.train: no sign of life for {self.silence:.0f} s from {who}. This process ends; what is "
                    "saved is whole, and the same command on every host goes on from there",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(1)


@cache
def heartbeat() -> Heartbeat:
    """That of this process, which starts with the first call; every process calls it."""
    return Heartbeat(SILENCE)
