"""Names: of a run, which is a folder and says what is in it, and of the tasks that a recipe speaks of."""

import hashlib
import re
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from data.benchmark import Benchmark

if TYPE_CHECKING:  # the recipe imports this file
    from llaca.config import Recipe

FRONT_BYTES = 180  # of an automatic name without its seed; file systems take 255


def check_name(name: str) -> None:
    """Raises ValueError for a run's name that cannot be the name of one folder."""
    if name in (".", "..") or "/" in name or not name.isprintable() or not 0 < len(name.encode()) <= 255:
        raise ValueError(
            f"run: {name!r} cannot be a folder's name: it has 1 to 255 bytes, no / and no line break (--runs-dir says "
            "where the folder is)"
        )


def run_name(recipe: "Recipe", usual: "Recipe", label: str, smoke: bool) -> str:
    """The method, the `label` of a recipe that is not the default one, what differs from what is `usual` for the method
    in this recipe, and the seed. Where that is too long for a folder, a hash of it stands in place of its end."""
    now, then = recipe.flat(), usual.flat()
    quiet = {"method", *(f.name for section in (recipe.run, recipe.engine) for f in fields(section))}
    changed = {key: now[key] for key in now if now[key] != then[key] and key not in quiet}
    told = [str(changed.pop(key)) for key in ("order", "instructions") if key in changed]
    told += [f"{key}-{value}" for key, value in changed.items()]
    front = "-".join([recipe.method.method, *[label] * bool(label), *["smoke"] * smoke, *told])
    front = re.sub(r"[^\w.=-]+", "_", front)
    if len(front.encode()) > FRONT_BYTES:
        cut = front.encode()[: FRONT_BYTES - 9].decode(errors="ignore")
        front = f"{cut}-{hashlib.sha256(front.encode()).hexdigest()[:8]}"
    return f"{front}-seed{recipe.run.seed}"


def by_task(per_task: dict[str, dict], tasks: list[str], benchmark: Benchmark, path: Path) -> dict[str, dict]:
    """per_task by the names that the stream has: the benchmark may know a task by its folder's name, too.

    Raises ValueError naming `path` for what is no task of the benchmark, and for a task that stands there twice.
    """
    known, found = {benchmark.task(task).name: task for task in tasks} if per_task else {}, {}
    for name, own in per_task.items():
        try:
            task = benchmark.task(name).name
        except ValueError as error:
            raise ValueError(f"{path}: per_task.{name}: {error}") from None
        task = known.get(task, task)
        if task in found:
            raise ValueError(f"{path}: per_task.{name}: {task} stands there twice, by two of its names")
        found[task] = own
    return found
