"""The stream: tasks in order, one stage each, every stage a folder that is done or is made again.

runs/<name>/recipe.yaml, environment.json
            stages/01-ScienceQA/   adapter/ (what is used from here on), plain/ (before the average took its
                                   place), stage.json (with the environment that it was trained in),
                                   codebook.json (the pool after this stage), origin.json (llaca/folders.py),
                                   train_log.jsonl, beta.csv, DONE (written last)
"""

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import yaml
from tqdm import tqdm

from data.benchmark import train_file
from llaca.config import Recipe

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # some network file systems
PACKAGES = ("torch", "transformers", "peft", "accelerate", "numpy", "scikit-learn", "pillow")


@dataclass(frozen=True)
class Stage:
    """One stage of training: `index` counts from 1; `tasks` is one task, or all of them in multi-task training."""

    index: int
    name: str
    tasks: tuple[str, ...]
    folder: Path

    @property
    def task(self) -> str:
        """The name of its task, or of all of them."""
        return "+".join(self.tasks)

    @property
    def done(self) -> bool:
        return (self.folder / "DONE").is_file()


def ordered(tasks: list[str], order: str) -> list[str]:
    """The tasks in the paper's `original`, `reverse` or `alphabet` order; the recipe has checked which."""
    if order == "alphabet":
        return sorted(tasks, key=str.lower)
    return list(reversed(tasks)) if order == "reverse" else list(tasks)


def stages_of(recipe: Recipe, joint: bool, run_folder: Path) -> list[Stage]:
    """The stages of a run; `joint` puts all tasks into one."""
    tasks = ordered(recipe.stream.tasks, recipe.stream.order)
    groups = [("multi_task", tuple(tasks))] if joint else [(task, (task,)) for task in tasks]
    return [
        Stage(i, f"{i:02d}-{name}", members, run_folder / "stages" / f"{i:02d}-{name}")
        for i, (name, members) in enumerate(groups, start=1)
    ]


def check_order(stages: list[Stage]) -> None:
    """Raises ValueError if a stage is done whose predecessor is not: it came from parameters that are no more."""
    for before, after in pairwise(stages):
        if after.done and not before.done:
            raise ValueError(
                f"{after.folder} is done and {before.name}, which comes first, is not: put {before.name} back, or "
                "remove DONE from every stage after it, to train them again"
            )


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file so that it is either whole or absent."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def run_folder(recipe: Recipe) -> Path:
    """Where the run is."""
    return Path(recipe.run.runs_dir) / recipe.run.run


def open_run(recipe: Recipe) -> Path:
    """The run's folder, with the recipe and the inputs' checksums frozen in it.

    Raises ValueError, showing the difference, if it was started with another recipe, base model or data.
    """
    folder = run_folder(recipe)
    frozen = folder / "recipe.yaml"
    now = {**recipe.flat(), "inputs": checksums(recipe)}
    # change nothing in the result
    where = ("runs_dir", "report_to", "loader_workers", "expected_minutes", "save_steps", "beta_trace")
    if frozen.is_file():
        before = yaml.safe_load(frozen.read_text(encoding="utf-8"))
        changed = {k for k in {**before, **now} if before.get(k) != now.get(k) and k not in where}
        if changed:
            lines = [f"  {key}: {before.get(key)!r} there, {now.get(key)!r} now" for key in sorted(changed)]
            raise ValueError(
                f"{frozen} was started with another recipe:\n"
                + "\n".join(lines)
                + f"\nGive this run another name with --run, or delete {folder}."
            )
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "environment.json", json.dumps(environment(), indent=1) + "\n")
    write_atomically(frozen, yaml.safe_dump(now, sort_keys=False))
    return folder


def checksums(recipe: Recipe) -> dict[str, str]:
    """What the run is made from: SHA-256 of the base's weights (beyond 1 GB: their size) and of the training files."""
    stream, sums = recipe.stream, {}
    for path in sorted(Path(recipe.model.base).glob("*.safetensors")):
        big = path.stat().st_size > 1 << 30
        sums[path.name] = f"{path.stat().st_size} bytes" if big else hashlib.sha256(path.read_bytes()).hexdigest()
    for task in stream.tasks:
        content = train_file(stream.data_root, stream.instructions, task).read_bytes()
        sums[task] = hashlib.sha256(content).hexdigest()
    return sums


@contextmanager
def only_one(folder: Path, seconds: float = 10.0) -> Iterator[None]:
    """Holds the run folder for this process. Raises BlockingIOError if another one keeps it for `seconds`.

    Where the file system has no locks, as some network file systems have none, it says so and goes on.
    """
    with (folder / ".lock").open("w") as lock:
        deadline = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise BlockingIOError(f"{folder}: another process trains this run; wait for it or end it") from None
                time.sleep(0.1)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                tqdm.write(f"{folder}: its file system has no locks ({error.strerror}); train this run by one command")
                break
        yield


def die_with_launcher() -> None:
    """On Linux, ends this process when the launcher that started it is killed: nobody trains unseen."""
    launcher = os.environ.get("LLACA_LAUNCHER")
    if launcher and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        alone = "RANK" not in os.environ  # else torchrun or DeepSpeed stand in between
        if alone and os.getppid() != int(launcher):  # it was killed before the line above
            sys.exit(f"the launcher (process {launcher}) is gone")


def leave_at_once() -> None:
    """Lets SIGTERM and SIGINT end the process where it is, whatever library code it is in: 128 + signal in a shell.

    Nothing is lost by that: what is not whole has no COMPLETE or DONE, and is made again.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


@cache
def environment() -> dict:
    """Where the numbers of a run come from: command, commit, versions, machine, time; as this process began."""
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        git = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
        commit = git.stdout.strip() or "not a git checkout"
    except FileNotFoundError:
        commit = "unknown: git is not installed"
    return {
        "command": sys.argv,
        "commit": commit,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        "threads": os.environ.get("OMP_NUM_THREADS", "unset"),
        **{package: version(package) for package in PACKAGES},
    }
