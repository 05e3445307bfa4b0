"""Writes Dialog-mini, eight text tasks, to disk: `python -m data.mini.text_stream [--out DIR] [--seed N]`.

    DIR/source/<task>.json                     the tasks in the schema of Natural Instructions
    DIR/tasks/<task>/{train,dev,test}.json     what data.prepare.instructions makes of them
    DIR/benchmark.yaml                         data/mini/dialogues.yaml
    DIR/made.json                              sizes and seed; written last

No input of a task occurs twice, and the whole is a function of the seed.
"""

import json
import random
from functools import partial
from pathlib import Path

from data.mini.dialogues import TASKS, Task
from data.mini.folder import command, is_version, make
from data.prepare.instructions import STREAMS, prepare

NAME, VERSION = "Dialog-mini", 1
STREAM = "dialog_mini"
INSTANCES = 2 * STREAMS[STREAM].evaluated + STREAMS[STREAM].trained


def instances(task: Task, rng: random.Random) -> dict[str, str]:
    """INSTANCES different inputs and their outputs."""
    found: dict[str, str] = {}
    while len(found) < INSTANCES:
        found.setdefault(*task.make(rng))
    return found


def fill(root: Path, seed: int) -> None:
    """Writes the benchmark into an empty folder."""
    source = root / "source"
    source.mkdir()
    for name, task in TASKS.items():
        made = enumerate(instances(task, random.Random(f"{seed}/{name}")).items())
        content = {
            "Definition": list(task.definitions),
            "Positive Examples": [],
            "Instances": [{"id": f"{name}-{n}", "input": asked, "output": [said]} for n, (asked, said) in made],
        }
        (source / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    prepare(source, root, STREAM, examples=0, seed=seed)


def is_built(root: Path) -> bool:
    """Whether `root` holds this version of the benchmark, of whatever seed."""
    return is_version(root, NAME, VERSION)


def build(root: Path, seed: int = 0) -> bool:
    """As `data.mini.folder.make`."""
    sizes = {"evaluated": STREAMS[STREAM].evaluated, "trained": STREAMS[STREAM].trained}
    return make(root, {"benchmark": NAME, "version": VERSION, "seed": seed, **sizes}, partial(fill, seed=seed))


if __name__ == "__main__":
    command(__doc__.splitlines()[0], build, Path("data/dialog_mini"))
