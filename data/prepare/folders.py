"""A stream of your own out of folders of pictures: `python -m data.prepare.folders --out DIR TASK=FOLDER [TASK=FOLDER
...] [--ask TASK=QUESTION ...] [--most TRAIN DEV TEST] [--seed N]`.

    FOLDER/siamese/1.png, FOLDER/siamese/2.jpg, FOLDER/manx/1.png ...     a class each, whose name is the answer

Writes benchmark.yaml, the tasks in the order of the command, and of each seven in ten pictures of a class as training
records, one as a development and two as test questions, the classes in turn. Pictures are copied; what is transparent
becomes white, where a plain conversion to RGB would show what lies under it, mostly black. The whole is a function of
the folders and the seed.
"""

import argparse
import hashlib
import json
import random
import shutil
from functools import partial
from pathlib import Path
from typing import NamedTuple

import yaml
from PIL import Image

from data.mini.folder import make
from data.prepare.splits import FEWEST, SHARES, in_turn, shared_out
from data.progress import progress
from data.records import IMAGE

VERSION = 1
ASKED = "What is in the picture?"
HOW = "Answer the question using a single word or phrase."
SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
LONGEST = 32  # tokens of an answer


class Source(NamedTuple):
    """A task's folder of classes and its question."""

    folder: Path
    question: str


def classes_of(folder: Path) -> dict[str, list[Path]]:
    """The pictures of every class by its name, both in alphabetical order.

    Raises FileNotFoundError without the folder, ValueError for fewer than two classes or too few pictures in one.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder: name the one that holds a folder of pictures for every class")
    found = {}
    for own in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        name = own.name.replace("_", " ").strip()
        if name in found:
            raise ValueError(f"{own}: there is another folder for class {name!r}; put them together")
        found[name] = sorted(path for path in own.iterdir() if path.suffix.lower() in SUFFIXES)
    if len(found) < 2:
        raise ValueError(f"{folder} holds {len(found)} folders: lay the pictures of every class into one of its own")
    for name, paths in found.items():
        if len(paths) < FEWEST:
            raise ValueError(
                f"{folder}, class {name!r}: {len(paths)} pictures ({', '.join(sorted(SUFFIXES))}); add some, so that "
                f"there are {FEWEST}, or take the folder away"
            )
    return found


def listed(folder: Path) -> str:
    """SHA-256 of the pictures' names and contents. Raises what `classes_of` raises."""
    found = hashlib.sha256()
    for path in (path for paths in classes_of(folder).values() for path in paths):
        with path.open("rb") as picture:
            found.update(f"{path.relative_to(folder)} {hashlib.file_digest(picture, 'sha256').hexdigest()}\n".encode())
    return found.hexdigest()


def take_over(picture: Path, to: Path) -> Path:
    """Copy a picture, as PNG on white if it is transparent anywhere; return where it lies. Raises ValueError for a file
    that cannot be read."""
    to.parent.mkdir(parents=True, exist_ok=True)
    try:
        with Image.open(picture) as opened:
            opened.load()
            shown = opened.convert("RGBA") if opened.has_transparency_data else None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{picture} cannot be read as a picture ({error}): mend it or take it away") from error
    to = to if shown is None or to.suffix == ".png" else to.with_name(f"{to.name}.png")
    if to.exists():
        raise ValueError(f"{picture}: {to.name} would be written twice; rename it")
    if shown is None:
        return Path(shutil.copyfile(picture, to))
    white = Image.new("RGBA", shown.size, "white")
    white.alpha_composite(shown)
    white.convert("RGB").save(to)
    return to


def records_of(task: str, split: str, pictures: list[tuple[str, Path]], question: str) -> list[dict]:
    """What stands in the file of a split, of (answer, picture below the benchmark's folder)."""
    prompt, rows = f"{question}\n{HOW}", []
    for number, (answer, picture) in enumerate(pictures):
        identity = f"{task}-{split}-{number}"
        if split == "train":
            turns = [{"from": "human", "value": f"{IMAGE}\n{prompt}"}, {"from": "gpt", "value": answer}]
            rows.append({"id": identity, "image": str(picture), "conversations": turns})
        else:
            rows.append({"question_id": identity, "image": str(picture), "text": prompt, "answer": answer})
    return rows


def fill(root: Path, sources: dict[str, Source], most: dict[str, int | None], seed: int, name: str) -> None:
    """Writes the benchmark into an empty folder."""
    spec = {"name": name, "tasks": {task: {"scoring": "open", "max_new_tokens": LONGEST} for task in sources}}
    (root / "benchmark.yaml").write_text(yaml.safe_dump(spec, sort_keys=False, allow_unicode=True), encoding="utf-8")
    for task, source in sources.items():
        (root / task).mkdir()
        splits = {split: [] for split in SHARES}
        for answer, paths in classes_of(source.folder).items():
            for split, own in shared_out(paths, random.Random(f"{seed}/{task}/{answer}")).items():
                splits[split].append([(answer, path) for path in own])
        for split, classes in splits.items():
            chosen = in_turn(classes)[: most[split]]
            copied = [
                (answer, take_over(path, root / task / path.parent.name / path.name).relative_to(root))
                for answer, path in progress(chosen, desc=f"{task} {split}", leave=False, delay=3, unit="picture")
            ]
            rows = records_of(task, split, copied, source.question)
            (root / task / f"{split}.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def named(pairs: list[str], what: str) -> dict[str, str]:
    """TASK=... by its task. Raises ValueError."""
    found = {}
    for pair in pairs:
        task, equals, told = pair.partition("=")
        if not (equals and told and task.replace("-", "").replace("_", "").isalnum()):
            raise ValueError(f"{pair!r}: write TASK={what}, where TASK is made of letters, digits, - and _")
        if task in found:
            raise ValueError(f"{task} occurs twice")
        found[task] = told
    return found


def build(
    root: Path, tasks: dict[str, Path], asked: dict[str, str], most: tuple[int, int, int] | None, seed: int = 0
) -> bool:
    """As `data.mini.folder.make`: the folders of `tasks`, their questions where `asked` has one, at `most` so many
    records of each split. Raises ValueError or FileNotFoundError for what cannot become a benchmark."""
    if most and min(most) < 1:
        raise ValueError(f"--most {' '.join(map(str, most))}: each split takes one record at least")
    if unknown := [task for task in asked if task not in tasks]:
        raise ValueError(f"--ask {unknown[0]}=...: there is no such task; there are {', '.join(tasks)}")
    sources = {task: Source(folder, asked.get(task, ASKED)) for task, folder in tasks.items()}
    there = {task: listed(source.folder) for task, source in sources.items()}
    limits = dict(zip(SHARES, most or (None,) * len(SHARES), strict=True))
    told = {task: [str(source.folder), source.question, there[task]] for task, source in sources.items()}
    described = {"benchmark": root.name, "version": VERSION, "seed": seed, "tasks": told, "most": limits}
    return make(root, described, partial(fill, sources=sources, most=limits, seed=seed, name=root.name))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m data.prepare.folders", description=__doc__.partition(":")[0])
    parser.add_argument("tasks", nargs="+", metavar="TASK=FOLDER", help="FOLDER holds a folder for every class")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ask", nargs="+", default=[], metavar="TASK=QUESTION", help=f"instead of {ASKED!r}")
    parser.add_argument("--most", nargs=3, type=int, metavar=("TRAIN", "DEV", "TEST"), help="records of each; all")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        tasks = {task: Path(folder) for task, folder in named(options.tasks, "FOLDER").items()}
        made = build(options.out, tasks, named(options.ask, "QUESTION"), options.most, options.seed)
    except (ValueError, OSError) as error:
        raise SystemExit(f"data.prepare.folders: {error}") from error
    print(f"{options.out}: {'made' if made else 'already there'}")


if __name__ == "__main__":
    main()
