"""Draws a benchmark of CoIN's size: its record counts, its schema, a few thousand pictures shared by all records.

The counts are those of data/coin.yaml; the ones that CoIN's description leaves open are rounded from the paper's totals
(569,000 training records, 261,000 questions). Texts are random words in CoIN's wordings, about as long as CoIN's: what
takes time is their number and length, not their meaning. The whole is a function of the seed.
"""

import json
import random
from pathlib import Path

import yaml
from PIL import Image

from data.benchmark import COIN

# Task: training records, questions, turns of a training record.
SIZES = {
    "ScienceQA": (12_726, 4_241, 1),
    "TextVQA": (34_602, 5_000, 1),
    "ImageNet": (129_833, 5_050, 1),
    "GQA": (72_140, 12_578, 12),
    "VizWiz": (20_523, 4_319, 1),
    "Grounding": (55_885, 30_969, 1),
    "VQAv2": (82_783, 107_197, 5),
    "OCR-VQA": (160_508, 91_646, 5),
}
VOCABULARY = """
    the a is of in on to what which who where how many color kind there any left right above below person man woman
    child dog cat bird horse car bus train boat street house tree grass sky water table chair plate cup glass window
    door red blue green yellow black white brown small large round old new book title author cover shirt hat shoe
    holding wearing riding standing sitting looking next behind between front one two three made wood metal
"""
WORDS = VOCABULARY.split()
TAIL = "Answer the question using a single word or phrase."


def text(rng: random.Random, least: int, most: int) -> str:
    """Random words, `least` to `most` of them."""
    return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))


def prompt(rng: random.Random, task: str) -> tuple[str, str]:
    """(question with the task's instruction, answer) in the form that the task's files have."""
    if task == "ScienceQA":
        options = "\n".join(f"{letter}. {text(rng, 1, 5)}" for letter in "ABCD")
        tail = "Answer with the option's letter from the given choices directly."
        return f"{text(rng, 10, 60)}?\n{options}\n{tail}", rng.choice("ABCD")
    if task == "TextVQA":
        tokens = ", ".join(rng.choices(WORDS, k=rng.randint(3, 25)))
        return f"{text(rng, 5, 10)}?\nReference OCR token: {tokens}\n{TAIL}", text(rng, 1, 2)
    if task == "ImageNet":
        return "What is the object in the image?\nAnswer the question using a single word or phrase.", text(rng, 1, 2)
    if task == "Grounding":
        box = ", ".join(f"{rng.random():.3f}" for _ in range(4))
        tail = "Please provide the bounding box coordinate of the region this sentence describes"
        return f"{tail}: {text(rng, 2, 8)}", f"[{box}]"
    return f"{text(rng, 5, 12)}?\n{TAIL}", text(rng, 1, 3)


def records(task: str, count: int, turns: int, pictures: int, seed: int) -> list[dict]:
    """Training records of a task. Every second one of ScienceQA's has no picture, as about half of CoIN's."""
    rng = random.Random(f"{seed}/{task}/train")
    made = []
    for number in range(count):
        shown = task != "ScienceQA" or number % 2
        first, answer = prompt(rng, task)
        values = [f"<image>\n{first}" if shown else first, answer]
        for _ in range(turns - 1):
            values += [f"{text(rng, 5, 12)}?", text(rng, 1, 3)]
        speakers = ("human", "gpt") * turns
        record = {"id": f"{task}-{number}"}
        if shown:
            record["image"] = f"pictures/{number % pictures}.jpg"
        record["conversations"] = [{"from": who, "value": value} for who, value in zip(speakers, values, strict=True)]
        made.append(record)
    return made


def questions(task: str, count: int, pictures: int, seed: int) -> list[dict]:
    """Test records of a task; about five follow each other on one picture."""
    rng = random.Random(f"{seed}/{task}/test")
    made = []
    for number in range(count):
        asked, answer = prompt(rng, task)
        record = {"question_id": f"{task}-{number}", "image": f"pictures/{number // 5 % pictures}.jpg", "text": asked}
        made.append(record | ({"answer_bbox": answer} if task == "Grounding" else {"answer": answer}))
    return made


def build(root: Path, share: float = 1.0, pictures: int = 4_000, seed: int = 0) -> None:
    """Writes the benchmark into `root`, with `share` of CoIN's records, unless it is there.

    Every task is scored as `open` or `box`, so that no official annotation files are needed.
    """
    if (root / "benchmark.yaml").is_file():
        return
    folder = root / "images/pictures"
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    for number in range(pictures):
        color = tuple(rng.randrange(256) for _ in range(3))
        Image.new("RGB", (64, 48), color).save(folder / f"{number}.jpg")
    coin = yaml.safe_load(COIN.read_text(encoding="utf-8"))["tasks"]
    tasks = {}
    for task, (train, test, turns) in SIZES.items():
        (root / task).mkdir(exist_ok=True)
        made = records(task, max(1, round(share * train)), turns, pictures, seed)
        (root / task / "train.json").write_text(json.dumps(made), encoding="utf-8")
        made = questions(task, max(1, round(share * test)), pictures, seed)
        (root / task / "test.json").write_text(json.dumps(made), encoding="utf-8")
        tasks[task] = {"scoring": "box" if task == "Grounding" else "open", "max_new_tokens": 8}
        if "instruction" in coin[task]:
            tasks[task]["instruction"] = "last line" if task == "ImageNet" else coin[task]["instruction"]
    content = {"name": "CoIN-size", "images": "images", "tasks": tasks}
    (root / "benchmark.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
