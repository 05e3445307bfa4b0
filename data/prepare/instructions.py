"""Task streams in the schema of Natural Instructions: python -m data.prepare.instructions --source DIR --root DATA_ROOT

    --source DIR      a folder of task files, as natural-instructions/tasks has them
    --stream NAME     instrdialog (default): CITB's InstrDialog (arXiv 2310.14510), 19 dialogue tasks in three orders;
                      instrdialog_first: the 100 tasks that it tunes a model on before;
                      dialog_mini: the eight of data/mini/dialogues.py, as data.mini.text_stream writes them
    --examples N      of the task's positive examples in every prompt (default: 2)
    --seed S          draws the training records and, of several right outputs, the one that is learnt

A task file is an object with `Definition` (a text or a list of one), `Positive Examples` [{input, output}] and
`Instances` [{id, input, output: [...]}]. The splits of InstrDialog are CITB's: a task's first 50 instances are its test
set, the next 50 its dev set, at most 500 of the rest are trained on. A prompt is Tk-Instruct's (arXiv 2204.07705): the
definition on its first line, which tasks are grouped by, the examples, then the input. Answers are scored by ROUGE-L.
"""

import argparse
import json
import random
import string
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data.benchmark import open_benchmark
from data.jsonfile import field, one_of, read_json_of
from data.prepare.write import write_files

DATA = Path(__file__).parents[1]


class Stream(NamedTuple):
    """What describes a stream's benchmark, and how many instances of a task go into its test and its dev set each, and
    at most into training."""

    description: Path
    evaluated: int
    trained: int


STREAMS = {
    "instrdialog": Stream(DATA / "instrdialog" / "benchmark.yaml", evaluated=50, trained=500),
    "instrdialog_first": Stream(DATA / "instrdialog" / "first.yaml", evaluated=25, trained=100),
    "dialog_mini": Stream(DATA / "mini" / "dialogues.yaml", evaluated=100, trained=1000),
}


class Instance(NamedTuple):
    """An input of a task, and the outputs of which each is right."""

    id: str
    input: str
    outputs: tuple[str, ...]


def text_of(value: Any, where: str) -> str:
    """A text, or the first of a list of texts. Raises ValueError, beginning with `where`."""
    value = value[0] if isinstance(value, list) and value else value
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where} should be a text; correct the file")
    return value.strip()


def read_task(path: Path) -> tuple[str, list[Instance], list[tuple[str, str]]]:
    """Return a task's definition, instances and positive examples. Raises FileNotFoundError or ValueError naming the
    file and the instance."""
    content = read_json_of(path, dict)
    instances = []
    for number, entry in enumerate(field(content, "Instances", list, str(path))):
        where = f"{path}, instance {number}"
        outputs = entry.get("output") if isinstance(entry, dict) else None
        outputs = [outputs] if isinstance(outputs, str) else outputs
        if not isinstance(outputs, list) or not outputs or not all(isinstance(one, str) for one in outputs):
            raise ValueError(f"{where}: 'output' must be a text or a list of texts; correct the file")
        own = str(entry.get("id", number))
        instances.append(Instance(own, text_of(entry.get("input"), f"{where}: 'input'"), tuple(outputs)))
    examples = []
    for number, entry in enumerate(content.get("Positive Examples") or []):
        where = f"{path}, positive example {number}"
        asked, said = (
            text_of(field(entry, key, (str, list), where), f"{where}: '{key}'") for key in ("input", "output")
        )
        examples.append((asked, said))
    return text_of(content.get("Definition"), f"{path}: 'Definition'"), instances, examples


def _ended(text: str) -> str:
    return text if text[-1] in string.punctuation else f"{text}."


def prompt(definition: str, examples: Sequence[tuple[str, str]], asked: str) -> str:
    """Return what asks for an output, with as many examples as are given; the definition takes one line."""
    shown = [
        f"Positive Example {number} -\nInput: {_ended(given)}\nOutput: {_ended(said)}\n"
        for number, (given, said) in enumerate(examples, 1)
    ]
    definition = _ended(" ".join(definition.split()))
    parts = [
        f"Definition: {definition}\n",
        *shown,
        f"Now complete the following example -\nInput: {_ended(asked)}\nOutput:",
    ]
    return "\n".join(parts)


def rows_of(task: str, path: Path, stream: Stream, examples: int, seed: int) -> dict[str, list[dict[str, Any]]]:
    """Return a task's records by split: train, dev, test. Raises as `read_task` does, and for too few instances."""
    definition, instances, shown = read_task(path)
    kept = [one for one in instances if any(output.strip() for output in one.outputs)]
    evaluated = 2 * stream.evaluated
    if len(kept) <= evaluated:
        raise ValueError(f"{path}: {len(kept)} instances with an output are not enough; {evaluated} are evaluated")
    rng, rest = random.Random(f"{seed}/{task}"), kept[evaluated:]
    rng.shuffle(rest)
    found: dict[str, list[dict[str, Any]]] = {"train": [], "dev": [], "test": []}
    for one in rest[: stream.trained]:
        said = rng.choice([output for output in one.outputs if output.strip()])
        turns = [("human", prompt(definition, shown[:examples], one.input)), ("gpt", said.strip())]
        found["train"].append({"id": one.id, "conversations": [{"from": who, "value": text} for who, text in turns]})
    for number, one in enumerate(kept[:evaluated]):
        row = {
            "question_id": one.id,
            "text": prompt(definition, shown[:examples], one.input),
            "answers": list(one.outputs),
        }
        found["test" if number < stream.evaluated else "dev"].append(row)
    return found


def prepare(
    source: Path, root: Path, stream: str, examples: int = 2, seed: int = 0, overwrite: bool = False
) -> list[str]:
    """Write a stream's benchmark; return what was done, line by line.

    Raises FileNotFoundError or ValueError for a file that is missing or broken, FileExistsError before it would
    overwrite a file that differs.
    """
    chosen = STREAMS[one_of(stream, STREAMS, "stream")]
    contents, told = {root / "benchmark.yaml": chosen.description.read_text(encoding="utf-8")}, []
    for task in open_benchmark(root, chosen.description).tasks:
        found = rows_of(task, source / f"{task}.json", chosen, examples, seed)
        for split, rows in found.items():
            text = "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"
            contents[root / "tasks" / task / f"{split}.json"] = text
        told.append(f"{task}: " + ", ".join(f"{len(rows)} {split}" for split, rows in found.items()))
    write_files({path: lambda new, text=text: new.write_text(text) for path, text in contents.items()}, overwrite)
    return told


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m data.prepare.instructions", description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--stream", choices=list(STREAMS), default="instrdialog")
    parser.add_argument("--examples", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true")
    options = parser.parse_args(arguments)
    try:
        print("\n".join(prepare(**vars(options))))
    except (ValueError, OSError) as error:
        sys.exit(f"data.prepare.instructions: {error}")


if __name__ == "__main__":
    main()
