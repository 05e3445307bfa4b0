"""Folders of pictures, a class each, become a benchmark that the check passes and that a run reads."""

import json
import random
import struct
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from data.check import check_benchmark
from data.prepare.folders import build
from data.prepare.splits import FEWEST, shared_out

HEADER = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
HUGE = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + HEADER + struct.pack(">I", zlib.crc32(HEADER))  # a PNG's start
COLORS = {"red_fox": (200, 30, 30), "blue": (30, 30, 200), "green": (30, 160, 30)}


@pytest.fixture
def pets(tmp_path):
    """Ten pictures of every class, as PNG, JPEG and transparent WebP; a note that is no picture."""
    for name, color in COLORS.items():
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        for number in range(10):
            suffix = (".png", ".JPG", ".webp")[number % 3]
            picture = Image.new("RGB", (20, 10 + number), color)
            if suffix == ".webp":
                picture.putalpha(0)
            picture.save(folder / f"{number}{suffix}")
        (folder / "notes.txt").write_text("mine")
    return tmp_path / "photos"


def test_every_picture_is_in_one_split_and_the_check_passes(tmp_path, pets):
    root = tmp_path / "pets"
    assert build(root, {"Breeds": pets, "Again": pets}, {"Breeds": "Which breed is it?"}, None)
    assert not build(root, {"Breeds": pets, "Again": pets}, {"Breeds": "Which breed is it?"}, None)
    rows = {split: json.loads((root / "Breeds" / f"{split}.json").read_text()) for split in ("train", "dev", "test")}
    assert {split: len(own) for split, own in rows.items()} == {"train": 21, "dev": 3, "test": 6}
    pictures = [row["image"] for own in rows.values() for row in own]
    assert len(set(pictures)) == 30
    assert Counter(row["conversations"][1]["value"] for row in rows["train"]) == {"red fox": 7, "blue": 7, "green": 7}
    assert {row["conversations"][1]["value"] for row in rows["train"][:3]} == {"red fox", "blue", "green"}
    first = rows["test"][0]
    assert first["text"] == "Which breed is it?\nAnswer the question using a single word or phrase."
    for row in rows["test"]:
        color = Image.open(root / row["image"]).convert("RGB").getpixel((5, 5))
        right = (255, 255, 255) if "webp" in row["image"] else COLORS[row["answer"].replace(" ", "_")]
        assert max(abs(a - b) for a, b in zip(color, right, strict=True)) < 4
    report = check_benchmark(root, "original", [])
    assert list(report.benchmark.tasks) == ["Breeds", "Again"]


def test_at_most_so_many_records_are_those_of_all_classes(tmp_path, pets):
    build(tmp_path / "few", {"Breeds": pets}, {}, (6, 3, 3))
    rows = json.loads((tmp_path / "few" / "Breeds" / "train.json").read_text())
    assert Counter(row["conversations"][1]["value"] for row in rows) == {"red fox": 2, "blue": 2, "green": 2}
    assert len(list((tmp_path / "few" / "Breeds").glob("*/*.*"))) == 12  # what no record shows is not copied


def test_every_split_has_every_class(tmp_path):
    for count in range(FEWEST, 24):
        shares = shared_out(list(range(count)), random.Random(count))
        assert sorted(item for own in shares.values() for item in own) == list(range(count))
        assert all(shares.values()), count
    for name, color in COLORS.items():
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(FEWEST):
            Image.new("RGB", (9, 9), color).save(tmp_path / "photos" / name / f"{number}.png")
    build(tmp_path / "pets", {"Breeds": tmp_path / "photos"}, {}, None)
    for split in ("train", "dev", "test"):
        rows = json.loads((tmp_path / "pets" / "Breeds" / f"{split}.json").read_text())
        assert {row["image"].split("/")[1] for row in rows} == set(COLORS), split


def test_changed_pictures_are_not_already_there(tmp_path, pets):
    asked = (tmp_path / "pets", {"Breeds": pets}, {}, None)
    assert build(*asked) and not build(*asked)
    (pets / "blue" / "0.png").write_bytes((pets / "green" / "0.png").read_bytes())
    with pytest.raises(FileExistsError, match=r"as asked for \(it differs in tasks\); move it away"):
        build(*asked)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda photos: (photos / "blue" / "0.png").write_text("<html>"), r"blue/0\.png cannot be read as a picture"),
        (lambda photos: (photos / "blue" / "0.png").write_bytes(HUGE), r"blue/0\.png cannot be read as a picture"),
        (lambda photos: (photos / "red fox").mkdir(), "another folder for class 'red fox'"),
        (lambda photos: (photos / "new").mkdir(), "class 'new': 0 pictures"),
        (lambda photos: Image.new("L", (3, 3)).save(photos / "blue" / "2.webp.png"), r"2\.webp\.png would be written"),
    ],
)
def test_what_cannot_become_a_benchmark_is_named(tmp_path, pets, spoil, told):
    spoil(pets)
    with pytest.raises(ValueError, match=told):
        build(tmp_path / "pets", {"Breeds": pets}, {}, None)
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (["Breeds"], "write TASK=FOLDER"),
        (["../x=photos"], "write TASK=FOLDER"),
        (["Breeds=photos", "Breeds=photos"], "Breeds occurs twice"),
        (["Breeds=nowhere"], "nowhere is no folder"),
        (["Breeds=photos/blue"], "holds 0 folders"),
        (["Breeds=photos", "--ask", "Bread=Which?"], "there is no such task; there are Breeds"),
        (["Breeds=photos", "--most", "-1", "0", "5"], "--most -1 0 5: each split takes one record at least"),
    ],
)
def test_a_wrong_command_ends_in_one_line(tmp_path, pets, line, told):
    command = [sys.executable, "-m", "data.prepare.folders", "--out", "pets", *line]
    environment = {"PYTHONPATH": str(Path(__file__).parents[1])}
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert ended.returncode == 1 and told in ended.stderr and ended.stderr.startswith("data.prepare.folders: ")
