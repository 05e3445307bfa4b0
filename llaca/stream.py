"""The stream: tasks in order, one stage each, every stage a folder that is done or is made again.

runs/<name>/recipe.yaml, environment.json
            stages/01-ScienceQA/   adapter/ (what is used from here on), plain/ (before the average took its
                                   place), stage.json, codebook.json (the pool after this stage),
                                   train_log.jsonl, beta.csv, DONE (written last)
"""

import json
import os
import platform
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import yaml

from llaca.config import Recipe

PACKAGES = ("torch", "transformers", "peft", "accelerate", "numpy", "scikit-learn", "pillow")


@dataclass(frozen=True)
class Stage:
    """One stage of training: `index` counts from 1; `tasks` is one task, or all of them in multi-task training."""

    index: int
    name: str
    tasks: tuple[str, ...]
    folder: Path

    @property
    def done(self) -> bool:
        return (self.folder / "DONE").is_file()


def ordered(tasks: list[str], order: str) -> list[str]:
    """The tasks in the paper's `original`, `reverse` or `alphabet` order."""
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


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file so that it is either whole or absent."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def open_run(recipe: Recipe) -> Path:
    """The run's folder, with the recipe frozen in it. Raises ValueError if it was started with another recipe."""
    folder = Path(recipe.run.runs_dir) / recipe.run.run
    frozen = folder / "recipe.yaml"
    now = recipe.flat()
    where = ("runs_dir", "report_to", "expected_minutes")  # change nothing in the result
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


def environment() -> dict:
    """Where the numbers of a run come from: versions, commit, machine, time."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    return {
        "commit": commit.stdout.strip() or "not a git checkout",
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        **{package: version(package) for package in PACKAGES},
    }
