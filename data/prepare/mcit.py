"""UCIT and MLLM-DCL from their releases: python -m data.prepare.mcit --benchmark ucit|mllm_dcl --root DIR [--overwrite]

    ucit       DIR holds instructions/<Task>/ and datasets/ as the release lays them out
    mllm_dcl   DIR holds RS/, Med/, AD/, Sci/ and Fin/, each with train.json, test.json and images/

The release stays as it is. DIR/tasks/ gets the records as this project reads them, DIR/benchmark.yaml describes them:
captions get their references from the COCO file beside the questions, which numbers them from 1 in the questions'
order; questions of Med and Fin the sentence that the released evaluation puts behind them; pictures a path that begins
at DIR.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from data.benchmark import open_benchmark
from data.jsonfile import field, one_of, read_json_of
from data.prepare.write import write_files

Row = dict[str, Any]
DATA = Path(__file__).parents[1]
UCIT_FOLDERS = {
    "ImageNet-R": ("ImageNet-R",),
    "ArxivQA": ("ArxivQA",),
    "VizWiz": ("VizWiz", "VizWiz-caption"),
    "IconQA": ("IconQA",),
    "CLEVR-Math": ("CLEVR-Math", "CLEVR"),
    "Flickr30k": ("Flickr30k", "Flickr30k-cap"),
}
CAPTIONS = "val_coco_type_3000.json"
WHOLE = {"AI2D", "TQA", "VQA", "SciVerse"}  # how names of pictures begin; the other ones of Sci are maps
SHORT = "Answer the question with a single word (or phrase)."
YES_OR_NO = "Only answer with yes or no directly."
LETTER = "Answer with the given letter directly, e.g., A, B, C, D."


def first_of(folder: Path, names: Sequence[str]) -> Path:
    """The first of some names that is there. Raises FileNotFoundError naming them."""
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise FileNotFoundError(f"{folder / names[0]}: not there, nor by another name of the release; unpack it here")


def rows_of(path: Path) -> list[Row]:
    """The records of a release's file. Raises FileNotFoundError or ValueError naming file and record."""
    return objects(read_json_of(path, list), f"{path}, record")


def objects(entries: Sequence[Any], where: str) -> list[Row]:
    """A list's entries, all of which must be objects. Raises ValueError, beginning with `where` and the number."""
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise ValueError(f"{where} {number}: no object; correct the file")
    return list(entries)


def trained(row: Row, number: int, folder: str = "") -> Row:
    """A training record, with an id and its picture's path below `folder`."""
    return {**row, "id": str(row.get("id", row.get("question_id", number))), **picture(row, folder)}


def picture(row: Row, folder: str) -> dict[str, str]:
    """The record's picture, its path below `folder`."""
    return {"image": str(PurePosixPath(folder, str(row["image"])))} if row.get("image") else {}


# --- UCIT ---


def captions(path: Path, rows: Sequence[Row]) -> list[list[str]]:
    """Every question's captions, from a file of COCO's form. Raises ValueError if it belongs to other questions."""
    content = read_json_of(path, dict)
    found: dict[int, list[str]] = defaultdict(list)
    for number, entry in enumerate(objects(field(content, "annotations", list, str(path)), f"{path}, annotation")):
        where = f"{path}, annotation {number}"
        found[field(entry, "image_id", int, where)].append(field(entry, "caption", str, where))
    if set(found) != set(range(1, len(rows) + 1)):
        raise ValueError(
            f"{path}: captions of {len(found)} pictures, not of 1 to {len(rows)}; take files of one release"
        )
    for entry in objects(content.get("images") or [], f"{path}, picture"):
        number = field(entry, "id", int, f"{path}, a picture of it")
        name = PurePosixPath(str(entry.get("file_name", ""))).name
        asked = PurePosixPath(str(rows[number - 1].get("image", ""))).name if number in found else name
        if name and name != asked:
            raise ValueError(
                f"{path}: picture {number} is {name}, of the questions it is {asked}; take files of one release"
            )
    return [found[number] for number in range(1, len(rows) + 1)]


def ucit(root: Path, task: str) -> tuple[list[Row], list[Row]]:
    """Training and test records of one task of UCIT."""
    folder = first_of(root / "instructions", UCIT_FOLDERS[task])
    train = rows_of(first_of(folder, ("train_4w.json", "train_brief_4w.json", "train.json")))
    path = first_of(folder, ("test_3000.json", "test.json"))
    test = rows_of(path)
    if open_benchmark(root, DATA / "ucit.yaml").task(task).scoring == "caption":
        said = captions(folder / CAPTIONS, test)
        test = [{**row, "answers": own} for row, own in zip(test, said, strict=True)]
    return [trained(row, number) for number, row in enumerate(train)], test


# --- MLLM-DCL ---


def rule(task: str, row: Row, where: str) -> str:
    """By which of data.answers.RULES the released evaluation compares an answer to this question."""
    if task != "Sci":
        return {"RS": "word", "AD": "word", "Med": "part", "Fin": "choice"}[task]
    kind = PurePosixPath(field(row, "image", str, where)).name.split("_")[0]
    if kind in WHOLE:
        return "whole"
    return "states" if "Which states" in field(row, "text", str, where) else "part"


def asked(task: str, row: Row, where: str) -> str:
    """The question as the released evaluation asks it."""
    text, answer = field(row, "text", str, where), field(row, "answer", str, where)
    behind = {"Med": SHORT, "Fin": YES_OR_NO if answer in ("Yes", "No") else LETTER}.get(task, "")
    return text if text.rstrip().endswith(behind) else f"{text} {behind}"


def mllm_dcl(root: Path, task: str) -> tuple[list[Row], list[Row]]:
    """Training and test records of one domain of MLLM-DCL."""
    train, path = rows_of(root / task / "train.json"), root / task / "test.json"
    test = []
    for number, row in enumerate(rows_of(path)):
        where = f"{path}, record {number}"
        test.append({**row, **picture(row, task), "text": asked(task, row, where), "rule": rule(task, row, where)})
    return [trained(row, number, task) for number, row in enumerate(train)], test


RELEASES: dict[str, tuple[Path, Callable[[Path, str], tuple[list[Row], list[Row]]]]] = {
    "ucit": (DATA / "ucit.yaml", ucit),
    "mllm_dcl": (DATA / "mllm_dcl.yaml", mllm_dcl),
}


def prepare(benchmark: str, root: Path, overwrite: bool = False) -> list[str]:
    """Write a benchmark's tasks/ and benchmark.yaml; return what was found, a line a task.

    Raises FileNotFoundError or ValueError for a file that is missing or broken, FileExistsError before it would
    overwrite a file that differs.
    """
    description, read = RELEASES[one_of(benchmark, RELEASES, "benchmark")]
    contents: dict[Path, str] = {root / "benchmark.yaml": description.read_text(encoding="utf-8")}
    told = []
    for task in open_benchmark(root, description).tasks:
        train, test = read(root, task)
        for name, rows in (("train.json", train), ("test.json", test)):
            contents[root / "tasks" / task / name] = "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"
        told.append(f"{task}: {len(train)} training records, {len(test)} questions{ending(train, test)}")
    write_files({path: partial(_write, text) for path, text in contents.items()}, overwrite)
    return told


def _write(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")


def ending(train: Sequence[Row], test: Sequence[Row]) -> str:
    """Of questions that end in a sentence of the evaluation, how many training questions end in one, too."""
    behind = (SHORT, YES_OR_NO, LETTER)
    if not any(str(row.get("text", "")).rstrip().endswith(behind) for row in test):
        return ""
    trained_so = sum(first_question(row).rstrip().endswith(behind) for row in train)
    return f"; the evaluation's sentence ends {trained_so} of the training questions"


def first_question(row: Mapping[str, Any]) -> str:
    """What a training record asks first; empty where it does not follow the schema."""
    turns = row.get("conversations")
    first = turns[0] if isinstance(turns, list) and turns else {}
    return str(first.get("value", "")) if isinstance(first, dict) else ""


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m data.prepare.mcit", description=__doc__.splitlines()[0])
    parser.add_argument("--benchmark", choices=list(RELEASES), required=True)
    parser.add_argument("--root", type=Path, required=True, metavar="DIR", help="the release, unpacked")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there with other content")
    options = parser.parse_args(arguments)
    try:
        print("\n".join(prepare(**vars(options))))
    except (ValueError, OSError) as error:
        sys.exit(f"data.prepare.mcit: {error}")


if __name__ == "__main__":
    main()
