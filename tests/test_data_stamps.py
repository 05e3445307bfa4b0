"""The stream of stamps, from drawn ones in the package's layout."""

import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageDraw

from data.check import check_benchmark
from data.prepare import stamps

INK = {"red": (220, 30, 30), "green": (40, 160, 40), "blue": (40, 60, 200), "yellow": (240, 220, 40)}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Ten stamps of every kind, each of one colour, with names in the package's form; some that cannot be used."""
    root = tmp_path_factory.mktemp("stamps")
    for kind in stamps.KINDS:
        folder = root / kind / "small"
        folder.mkdir(parents=True)
        for number in range(10):
            colour = list(INK)[number % 4]
            picture = Image.new("RGBA", (60, 40), (0, 0, 0, 0))
            ImageDraw.Draw(picture).ellipse((5, 5, 55, 35), fill=(*INK[colour], 255))
            picture.save(folder / f"{number}.png")
            (folder / f"{number}.txt").write_text(f"A {colour} {kind[:3]}{number}! It is nice.\nde.utf8=Etwas.\n")
        picture.save(folder / "9_mirror.png")
        picture.save(folder / "nameless.png")
    return root


@pytest.fixture(scope="module")
def built(source, tmp_path_factory):
    root = tmp_path_factory.mktemp("out") / "stamps"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stamps, "SIZES", {"train": 40, "dev": 8, "test": 16})
        patch.setattr(stamps, "FEWEST", 10)
        assert stamps.build(root, source) and not stamps.build(root, source)
    return root


def answers(root, task: str, split: str) -> list[str]:
    records = json.loads((root / task / f"{split}.json").read_text())
    return [r["conversations"][1]["value"] if split == "train" else r["answer"] for r in records]


def test_it_is_a_benchmark_whose_check_finds_nothing(built):
    report = check_benchmark(built, "original", list(stamps.TASKS))
    assert report.ok and report.records == 4 * (40 + 16)
    for task in stamps.TASKS:
        counts = Counter(answers(built, task, "train"))
        assert max(counts.values()) - min(counts.values()) <= 1, "answers in turn"


def test_answers_are_what_the_picture_shows(built, source):
    """A colour by the pixels; the picked name is that of the one colour of four that is there."""
    for record in json.loads((built / "Colour" / "test.json").read_text()):
        pixels = np.asarray(Image.open(built / record["image"]).convert("RGB")).reshape(-1, 3).astype(int)
        away = {name: np.abs(pixels - ink).sum(1).min() for name, ink in INK.items()}
        assert min(away, key=away.get) == record["answer"]
    for record in json.loads((built / "Pick" / "test.json").read_text()):
        _, *choices, last = record["text"].split("\n")
        assert last == stamps.LETTER and [choice[:3] for choice in choices] == ["A. ", "B. ", "C. ", "D. "]
        pixels = np.asarray(Image.open(built / record["image"]).convert("RGB")).reshape(-1, 3).astype(int)
        right = choices["ABCD".index(record["answer"])][3:].split()[0]
        assert np.abs(pixels - INK[right]).sum(1).min() < 60, "its colour is in the picture"
        assert len(set(choices)) == 4


def test_no_stamp_is_in_two_splits_and_broken_names_are_left_out(source, monkeypatch):
    found = stamps.stamps_in(source)
    assert len(found) == 50 and all("mirror" not in stamp.path.name for stamp in found)
    assert {stamp.name.split()[0] for stamp in found} == set(INK) and "it is" not in found[0].name
    seen = {}
    monkeypatch.setattr(
        stamps, "write", lambda root, task, split, examples, bar: seen.update({(task, split): examples})
    )
    drawn, opened = [], stamps.opened
    monkeypatch.setattr(stamps, "opened", lambda stamp: drawn.append(stamp.path) or opened(stamp))
    stamps.fill(source, source, 0)
    (source / "benchmark.yaml").unlink()
    for task in ("Kind", "Pick"):
        paths = {}
        for split in stamps.SIZES:
            drawn.clear()
            for _ in range(80):
                next(seen[task, split])
            paths[split] = set(drawn)
        assert not paths["train"] & paths["test"] and not paths["train"] & paths["dev"]
        assert not paths["dev"] & paths["test"] and len(paths["train"]) > 25


def test_the_same_seed_gives_the_same_bytes_and_no_stamps_are_told(built, source, tmp_path, monkeypatch):
    monkeypatch.setattr(stamps, "SIZES", {"train": 40, "dev": 8, "test": 16})
    monkeypatch.setattr(stamps, "FEWEST", 10)
    for seed, same in ((0, True), (1, False)):
        other = tmp_path / str(seed)
        stamps.build(other, source, seed)
        files = [path.relative_to(built) for path in sorted(built.rglob("*.j*")) if path.name != "made.json"]
        assert all((other / file).read_bytes() == (built / file).read_bytes() for file in files) == same
    with pytest.raises(FileNotFoundError, match="apt install tuxpaint-stamps-default"):
        stamps.build(tmp_path / "none", tmp_path)
