"""The stream: tasks in order, one stage each, every stage a folder that is done or is made again.

runs/<name>/recipe.yaml, environment.json      written when nothing can refuse the run any more
            stages/01-ScienceQA/   adapter/ (what is used from here on), plain/ (before the average took its
                                   place), stage.json (with the environment that it was trained in),
                                   codebook.json (the pool after this stage), origin.json (llaca/folders.py),
                                   train_log.jsonl, beta.csv, DONE (written last)
"""

import fcntl
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from itertools import pairwise
from pathlib import Path

import yaml

from data.benchmark import train_file
from data.cache import NO_LOCKS
from data.checksums import checksum
from data.progress import say
from llaca import machine
from llaca.config import Recipe
from llaca.engines.zero import deepspeed_file

BASE_FILES = (".safetensors", ".bin", ".json", ".model", ".txt", ".jinja")
# to the result
NO_MATTER = ("runs_dir", "report_to", "loader_workers", "expected_minutes", "save_steps", "beta_trace", "retained")


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


def check_run(recipe: Recipe) -> None:
    """Raises ValueError, showing the difference, if the run was started with another recipe, base model or data.

    A folder in which nothing was trained yet, not even up to a checkpoint, may be started with another recipe.
    """
    folder = run_folder(recipe)
    if not (folder / "recipe.yaml").is_file() or not is_begun(folder):
        return
    before, now = frozen(folder), recipe.flat()
    inputs = before.pop("inputs", {})
    what, remedy = "another recipe", f"Give this run another name with --run, or delete {folder}."
    lines = [
        f"{key}: {before.get(key)!r} there, {now.get(key)!r} now"
        for key in sorted({**before, **now})
        if before.get(key) != now.get(key) and key not in NO_MATTER
    ]
    if not lines:
        what, remedy = (
            "other files",
            f"Put those files back, give this run another name with --run, or delete {folder}.",
        )
        lines = changed_inputs(recipe, inputs)
    if lines:
        told = "".join(f"  {line}\n" for line in lines)
        raise ValueError(f"{folder / 'recipe.yaml'} was started with {what}:\n{told}{remedy}")


def changed_inputs(recipe: Recipe, before: dict[str, str]) -> list[str]:
    """What differs between the checksums `before`, by name, and the run's files now: a line for each."""
    files, lines = input_files(recipe), []
    # A run of before tokenizer and configuration were recorded has weights and training files alone, and of large ones
    # the size.
    for name in sorted({*before, *files} if "config.json" in before else before):
        file = files.get(name, Path(recipe.model.base) / name)
        what = "of the base" if file.parent == Path(recipe.model.base) else "DeepSpeed's configuration"
        what = f"the training records of {name}" if name in recipe.stream.tasks else what
        if name not in files:
            lines.append(f"{file} ({what}) is not there any more")
        elif name not in before:
            lines.append(f"{file} ({what}) was not there")
        elif before[name] != (f"{file.stat().st_size} bytes" if before[name].endswith(" bytes") else checksum(file)):
            lines.append(f"{file} ({what}) has changed since")
    return lines


def is_begun(folder: Path) -> bool:
    """Whether a run's folder holds a stage, a checkpoint inside one, or answers."""
    whole = any(path.is_dir() and path.suffix != ".partial" for path in folder.glob("stages/*"))
    return whole or any(folder.glob("stages/*.partial/**/COMPLETE")) or any(folder.glob("answers*/*"))


def frozen(folder: Path) -> dict:
    """The recipe.yaml of a run."""
    try:
        return yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{folder / 'recipe.yaml'}: not YAML ({error}); put it back, or delete {folder}") from None


def freeze_run(recipe: Recipe) -> Path:
    """The run's folder, with the recipe and the inputs' checksums frozen in it. Raises as `check_run` does.

    Call it when nothing can refuse the run any more.
    """
    check_run(recipe)
    folder = run_folder(recipe)
    begun = is_begun(folder)
    if begun and (folder / "recipe.yaml").is_file():
        return folder
    if not begun:  # another recipe may have left them
        for name in ("stages", "tensorboard"):
            shutil.rmtree(folder / name, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    now = {**recipe.flat(), "inputs": input_checksums(recipe)}
    write_atomically(folder / "environment.json", json.dumps(environment(), indent=1) + "\n")
    write_atomically(folder / "recipe.yaml", yaml.safe_dump(now, sort_keys=False))
    return folder


@contextmanager
def reserved(recipe: Recipe) -> Iterator[Callable[[], Path]]:
    """Holds the run's folder, if it is there, and gives what freezes the recipe: `freeze_run`, in a held folder.

    Nothing is made or written before that is called. Raises as `check_run` and `only_one` do.
    """
    folder = run_folder(recipe)
    there = folder.is_dir()
    with ExitStack() as held:
        if there:
            held.enter_context(only_one(folder))
        check_run(recipe)

        def freeze() -> Path:
            if not there:
                folder.mkdir(parents=True, exist_ok=True)
                held.enter_context(only_one(folder))
            return freeze_run(recipe)

        yield freeze


def input_files(recipe: Recipe) -> dict[str, Path]:
    """What a run is made from: the base's weights, configuration and tokenizer and DeepSpeed's configuration by file
    name, and every task's training file by the task's name."""
    stream, base = recipe.stream, Path(recipe.model.base)
    files = {path.name: path for path in sorted(base.glob("*")) if path.suffix in BASE_FILES and path.is_file()}
    if recipe.engine.zero != "none":
        engine = deepspeed_file(recipe.engine.zero)
        files[engine.name] = engine
    return files | {task: train_file(stream.data_root, stream.instructions, task) for task in stream.tasks}


def input_checksums(recipe: Recipe) -> dict[str, str]:
    """SHA-256 of each of them."""
    return {name: checksum(path) for name, path in input_files(recipe).items()}


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
                say(f"{folder}: its file system has no locks ({error.strerror}); train this run by one command")
                break
        yield


@cache
def environment() -> dict:
    """Where the numbers of a run come from: command, commit, versions, machines, time; as this process began.

    Every rank has to make the first call.
    """
    return {
        "command": sys.argv,
        "commit": commit(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {machine.cores()} of {os.cpu_count()} CPU cores",
        "threads": os.environ.get("OMP_NUM_THREADS", "unset"),
        **machine.processes(),
        **machine.gpu_software(),
        **machine.versions(),
    }


def commit() -> str:
    """The commit of this code, with -dirty where files differ from it."""
    root = Path(__file__).parents[1]
    around = {**os.environ, "GIT_CEILING_DIRECTORIES": str(root.parent)}  # not the commit of a project around this one
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        git = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root, env=around)
    except FileNotFoundError:
        return "unknown: git is not installed"
    return git.stdout.strip() or f"unknown: {git.stderr.strip().partition(chr(10))[0]}"
