"""A stream of third-party pictures: `python -m data.prepare.stamps [--source DIR] [--out DIR] [--seed N]`.

    Digits   which digit is written?            scikit-learn's load_digits: 1,797 hand-written ones of 8 x 8 pixels
    Kind     animal, food, plant, vehicle, household thing?      Tux Paint's stamps: drawings and photographs
    Colour   which colour is most of it?        the same, by their own pixels
    Pick     which of four things is it?        the same, by their names

The stamps are Debian's package tuxpaint-stamps-default (GPL-2; 161 MB), which lies in SOURCE after `apt install`, or
unpacked by `dpkg -x` anywhere. No picture of a split occurs in another; within one they recur, mirrored, moved and
scaled on other backgrounds. Answers are balanced, so that the question alone tells next to nothing. The whole is a
function of the stamps and the seed.
"""

import argparse
import colorsys
import json
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml
from PIL import Image
from tqdm import tqdm

from data.mini.folder import make
from data.packages import shared
from data.prepare.splits import SHARES, shared_out
from data.progress import progress

NAME, VERSION = "Stamps", 1
SOURCE = shared("tuxpaint/stamps")
SIZES = {"train": 1200, "dev": 200, "test": 250}
SIDE = 96  # pixels of a picture
KINDS = {"animals": "animal", "food": "food", "plants": "plant", "vehicles": "vehicle", "household": "household thing"}
WORD = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
CLEAR = 0.5  # share of a stamp's pixels that its colour has at least
FEWEST = 12  # stamps that a colour has at least
TASKS = {"Digits": "open", "Kind": "open", "Colour": "open", "Pick": "choice"}


class Stamp(NamedTuple):
    """A picture with its name and kind."""

    path: Path
    name: str
    kind: str


class Example(NamedTuple):
    """A question about a picture, with its answer."""

    picture: Image.Image
    question: str
    answer: str


def stamps_in(source: Path) -> list[Stamp]:
    """The stamps of KINDS that have an English name, in the order of their paths. Raises FileNotFoundError."""
    found = []
    for folder, kind in KINDS.items():
        for path in sorted((source / folder).rglob("*.png")):
            told = path.with_suffix(".txt")
            first = told.read_text(encoding="utf-8").splitlines()[:1] if told.is_file() else []
            words = re.split(r"[.!,;:(]", "".join(first).lower())[0].strip()
            name = next((words[len(a) :] for a in ("a ", "an ", "the ", "some ") if words.startswith(a)), words)
            if name and not path.stem.endswith("_mirror"):
                found.append(Stamp(path, name, kind))
    if not found:
        raise FileNotFoundError(
            f"{source}: no stamps in it; bash scripts/make_small_llava.sh fetches them, or "
            "apt install tuxpaint-stamps-default"
        )
    return found


def colour_of(stamp: Image.Image) -> str | None:
    """The colour of most of an RGBA picture's opaque pixels, None where none has CLEAR of them."""
    small = np.asarray(stamp.resize((32, 32)))
    names = [named(*(pixel[:3] / 255)) for pixel in small.reshape(-1, 4) if pixel[3] > 127]
    counts = {name: names.count(name) for name in names}
    best = max(counts, key=counts.get, default=None)
    return best if best and counts[best] >= CLEAR * len(names) else None


def named(red: float, green: float, blue: float) -> str:
    """The plain word for a colour of parts in [0, 1]."""
    hue, saturation, value = colorsys.rgb_to_hsv(red, green, blue)
    if value < 0.2:
        return "black"
    if saturation < 0.2:
        return "white" if value > 0.8 else "gray"
    for end, word in ((20, "red"), (45, "orange"), (70, "yellow"), (165, "green"), (260, "blue"), (330, "purple")):
        if 360 * hue < end:
            return "brown" if word in ("red", "orange") and value < 0.65 else word
    return "red"


def placed(stamp: Image.Image, rng: random.Random) -> Image.Image:
    """An RGBA picture somewhere on a pale background, mirrored half of the time."""
    side = round(SIDE * rng.uniform(0.7, 1))
    shown = stamp.copy()
    shown.thumbnail((side, side))
    if rng.random() < 0.5:
        shown = shown.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    canvas = Image.new("RGB", (SIDE, SIDE), tuple(rng.randrange(200, 256) for _ in range(3)))
    canvas.paste(shown, (rng.randint(0, SIDE - shown.width), rng.randint(0, SIDE - shown.height)), shown)
    return canvas


def opened(stamp: Stamp) -> Image.Image:
    """Its picture, RGBA, no larger than it is shown."""
    with Image.open(stamp.path) as picture:
        picture = picture.convert("RGBA")
    picture.thumbnail((2 * SIDE, 2 * SIDE))
    return picture


def balanced(groups: dict[str, list], rng: random.Random) -> Iterator[tuple[str, object]]:
    """(group, item) for ever: groups in turn, items at random."""
    while True:
        for group in rng.sample(sorted(groups), len(groups)):
            yield group, rng.choice(groups[group])


def grouped(items: list, key: Callable[[object], str | None]) -> dict[str, list]:
    """The items by key, those without one left out."""
    found = defaultdict(list)
    for item in items:
        if (own := key(item)) is not None:
            found[own].append(item)
    return dict(found)


def digits(rng: random.Random) -> dict[str, Iterator[Example]]:
    """Of every split."""
    from sklearn.datasets import load_digits  # a second, which every start of a training would wait for

    scans, truth = load_digits(return_X_y=True)
    numbered = list(zip(scans.reshape(-1, 8, 8), truth.tolist(), strict=True))

    def examples(items):
        for digit, (scan, _) in balanced(grouped(items, lambda item: str(item[1])), rng):
            ink = Image.fromarray((255 - 255 / 16 * scan).astype(np.uint8)).resize(
                (SIDE, SIDE), Image.Resampling.BICUBIC
            )
            yield Example(ink.convert("RGB"), f"Which digit is written here?\n{WORD}", digit)

    return {split: examples(items) for split, items in shared_out(numbered, rng).items()}


def kinds(shared: dict[str, list[Stamp]], rng: random.Random) -> dict[str, Iterator[Example]]:
    """Of every split."""

    def examples(items):
        for kind, stamp in balanced(grouped(items, lambda stamp: stamp.kind), rng):
            yield Example(placed(opened(stamp), rng), f"Which kind of thing is in the picture?\n{WORD}", kind)

    return {split: examples(items) for split, items in shared.items()}


def colours(shared: dict[str, list[Stamp]], rng: random.Random) -> dict[str, Iterator[Example]]:
    """Of every split, in the colours that are frequent enough."""
    known = {stamp: colour_of(opened(stamp)) for items in shared.values() for stamp in items}
    every = list(known.values())
    kept = {colour for colour in every if colour and every.count(colour) >= FEWEST}

    def examples(items):
        for colour, stamp in balanced(
            grouped(items, lambda stamp: known[stamp] if known[stamp] in kept else None), rng
        ):
            yield Example(placed(opened(stamp), rng), f"Which colour is most of the thing?\n{WORD}", colour)

    return {split: examples(items) for split, items in shared.items()}


def picks(shared: dict[str, list[Stamp]], rng: random.Random) -> dict[str, Iterator[Example]]:
    """Of every split; the other choices are of other kinds."""

    def examples(items):
        for letter, stamp in balanced({letter: items for letter in "ABCD"}, rng):
            others = sorted({other.name for other in items if other.kind != stamp.kind and other.name != stamp.name})
            names = rng.sample(others, 3)
            names.insert("ABCD".index(letter), stamp.name)
            told = "\n".join(f"{mark}. {name}" for mark, name in zip("ABCD", names, strict=True))
            question = f"Which of these is in the picture?\n{told}\n{LETTER}"
            yield Example(placed(opened(stamp), rng), question, letter)

    return {split: examples(items) for split, items in shared.items()}


def fill(root: Path, source: Path, seed: int) -> None:
    """Writes the benchmark into an empty folder."""
    stamps = stamps_in(source)
    shared = {split: [] for split in SHARES}
    for group in grouped(stamps, lambda stamp: stamp.kind).values():  # of every kind the same shares
        for split, items in shared_out(group, random.Random(f"{seed}/shares")).items():
            shared[split] += items
    makers = {"Digits": digits, "Kind": partial(kinds, shared), "Colour": partial(colours, shared)}
    makers["Pick"] = partial(picks, shared)
    spec = {"name": NAME, "tasks": {task: {"scoring": kind, "max_new_tokens": 8} for task, kind in TASKS.items()}}
    (root / "benchmark.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    with progress(total=len(TASKS) * sum(SIZES.values()), desc="draw", unit="picture") as bar:
        for task, make_examples in makers.items():
            for split, examples in make_examples(random.Random(f"{seed}/{task}")).items():
                write(root, task, split, examples, bar)


def write(root: Path, task: str, split: str, examples: Iterator[Example], bar: tqdm) -> None:
    """The pictures and the file of a split."""
    records, folder = [], Path(task) / split
    (root / folder).mkdir(parents=True)
    for number in range(SIZES[split]):
        example, name = next(examples), f"{folder}/{number}.jpg"
        example.picture.save(root / name, quality=90)
        identity = f"{task}-{split}-{number}"
        if split == "train":
            turns = [
                {"from": "human", "value": f"<image>\n{example.question}"},
                {"from": "gpt", "value": example.answer},
            ]
            records.append({"id": identity, "image": name, "conversations": turns})
        else:
            answer = {"text": example.question, "answer": example.answer}
            records.append({"question_id": identity, "image": name, **answer})
        bar.update()
    (root / task / f"{split}.json").write_text(json.dumps(records, indent=1) + "\n")


def build(root: Path, source: Path = SOURCE, seed: int = 0) -> bool:
    """As `data.mini.folder.make`. Raises FileNotFoundError without stamps."""
    described = {"benchmark": NAME, "version": VERSION, "seed": seed, "stamps": len(stamps_in(source)), **SIZES}
    return make(root, described, partial(fill, source=source, seed=seed))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m data.prepare.stamps", description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, default=SOURCE, help="usr/share/tuxpaint/stamps of the package")
    parser.add_argument("--out", type=Path, default=Path("data/stamps"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        made = build(options.out, options.source, options.seed)
    except OSError as error:
        raise SystemExit(f"data.prepare.stamps: {error}") from error
    print(f"{options.out}: {'made' if made else 'already there'}")


if __name__ == "__main__":
    main()
