"""CoIN-small, made of stamps and of a WordNet that the test writes, in the files and forms of the packages."""

import json
import random
from pathlib import Path

import pytest
from PIL import Image, ImageDraw, ImageFont

from data.check import check_benchmark
from data.mini import scenes, small, small_skills
from data.mini.tasks import TASKS
from data.mini.wordnet import Nouns
from data.mini.world import AUTHORS, SIGNS, TITLES, draw

# noun -> what it is a kind of; a second sense after a comma, "times met" after a colon
NOUNS = {
    "entity": "",
    "animal": "entity",
    "bird": "animal",
    "mammal": "animal",
    "insect": "animal",
    "fish": "animal",
    "food": "entity",
    "edible fruit": "food",
    "fruit": "entity",
    "vegetable": "food",
    "plant life": "entity",
    "flower": "plant life",
    "artifact": "entity",
    "vehicle": "artifact",
    "tool": "artifact",
    "owl": "bird",
    "guinea fowl": "bird",
    "cow": "mammal",
    "bee": "insect",
    "trout": "food, fish",
    "dolphin": "fish, mammal",
    "apple": "fruit",
    "carrot": "plant life, vegetable",
    "rose": "flower",
    "hammer": "tool",
    "mug": "artifact",
    "bus": "vehicle",
    "tram": "vehicle",
    "eagle": "bird:5",
    "kiwi": "bird, fruit:9",
    "moa": "bird:1",
    "soccer": "entity:7",
}
# Fruit is food, whatever kind of it: as an apple's second hypernym.
SECOND = {"apple": "edible fruit"}
STAMPS = {
    "animals/owl": "An owl.",
    "animals/fowl": "Helmeted guinea fowl, Africa",
    "animals/cow": "A brown cow!",
    "animals/bee": "A bee",
    "animals/trout": "Coral trout",
    "animals/dolphin": "A dolphin",
    "animals/spider": "Spider playing soccer",
    "food/apple1": "A red apple.",
    "food/apple2": "“Fuji” apple",
    "food/carrot": "A carrot",
    "plants/rose": "A rose",
    "vehicles/bus": "A green bus",
    "vehicles/tram": "The tram",
    "household/hammer": "A hammer",
    "household/mug": "A mug",
}


def write_wordnet(folder: Path) -> Path:
    """NOUNS as wndb(5WN) says."""
    folder.mkdir()
    licence = "  1 This software and database is being provided to you, the LICENSEE\n"
    senses = {word: [part for part in said.partition(":")[0].split(", ")] for word, said in NOUNS.items()}
    number = {}
    for word, above in senses.items():
        for sense in range(len(above)):
            number[word, sense] = 1000 + len(number)
    data, index, counts = [licence], [licence], []
    for word, above in senses.items():
        lemma = word.replace(" ", "_")
        for sense, other in enumerate(above):
            others = [number[name, 0] for name in (other, SECOND.get(word)) if name]
            pointers = "".join(f" @ {one:08d} n 0000" for one in others) + " ~ 00000001 n 0000"
            offset = number[word, sense]
            data.append(
                f"{offset:08d} 05 n 02 {lemma} 0 a_synonym 0 {len(others) + 1:03d}{pointers} | a gloss | of it\n"
            )
        offsets = " ".join(f"{number[word, sense]:08d}" for sense in range(len(above)))
        index.append(f"{lemma} n {len(above)} 2 @ ~ {len(above)} 1 {offsets}  \n")
        times = NOUNS[word].partition(":")[2]
        counts += [f"{lemma}%1:05:00:: 1 {times}\n", f"{lemma}%2:38:00:: 1 99\n"] if times else []
    for name, lines in (("data.noun", data), ("index.noun", index), ("cntlist.rev", counts)):
        (folder / name).write_text("".join(lines))
    return folder


def write_stamps(folder: Path) -> Path:
    """STAMPS: an ellipse each, wide or tall, on nothing."""
    for place, description in STAMPS.items():
        path = folder / f"{place}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        rng = random.Random(place)
        picture = Image.new("RGBA", (rng.randint(60, 300), rng.randint(60, 300)))
        box = (5, 5, picture.width - 5, picture.height - 5)
        ImageDraw.Draw(picture).ellipse(box, fill=tuple(rng.randbytes(3)))
        picture.save(path)
        path.with_suffix(".txt").write_text(f"{description}\nsv.utf8=Något\n")
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> tuple[Path, Path]:
    """Where stamps and WordNet lie."""
    folder = tmp_path_factory.mktemp("sources")
    return write_stamps(folder / "stamps"), write_wordnet(folder / "wordnet")


@pytest.fixture(scope="module")
def world(sources):
    return small.world_of(*sources)


def test_wordnet_is_read_as_its_manual_says(sources):
    nouns = Nouns(sources[1])
    [apple], [fruit], [food] = (nouns.senses[word] for word in ("apple", "fruit", "food"))
    assert {fruit, food} < nouns.above(apple) and apple in nouns.above(apple) and len(nouns.senses["trout"]) == 2
    assert nouns.is_kind("guinea fowl", "animal") and not nouns.is_kind("trout", "fish"), "its first sense is food"
    assert nouns.met == {"eagle": 5, "kiwi": 9, "moa": 1, "soccer": 7}, "nouns alone"


def test_things_have_the_names_that_wordnet_knows(world):
    assert set(world.portraits) == {"owl", "guinea fowl", "cow", "bee", "trout", "dolphin", "apple", "carrot"}
    assert (set(world.household), set(world.scenery)) == ({"hammer", "mug"}, {"rose", "bus", "tram"})
    assert [path.stem for path in world.pictures["apple"]] == ["apple1", "apple2"]
    wanted = {"owl": "bird", "guinea fowl": "bird", "cow": "mammal", "bee": "insect", "trout": "fish"}
    wanted |= {"apple": "fruit", "carrot": "vegetable", "rose": "flower"}
    wanted |= {"bus": "vehicle", "tram": "vehicle", "hammer": "tool"}
    assert world.kinds == wanted, "a dolphin is a fish, too, and a mug no tool"
    assert world.lore == wanted | {"eagle": "bird"}, "a kiwi is two things, and nobody has met a moa"


def test_every_word_fits_its_place_in_every_font(world):
    for file in world.fonts:
        font = ImageFont.truetype(file, 12 * world.unit)
        assert max(font.getlength(word.upper()) for word in SIGNS) <= 36 * world.unit
        assert max(font.getlength(word) for word in [*map(str.upper, TITLES), *AUTHORS]) <= 40 * world.unit


@pytest.mark.parametrize("maker", [scenes.group, scenes.crowd, scenes.street, scenes.cover, scenes.portrait])
def test_scenes_are_twice_as_large_and_on_their_grid(world, maker):
    rng, seen = random.Random(1), set()
    for _ in range(60):
        scene = maker(world, rng)
        assert max(scene.size) == 96 and draw(scene).size == scene.size
        for thing in scene.things:
            x1, y1, x2, y2 = thing.box
            assert 0 <= x1 < x2 <= scene.size[0] and 0 <= y1 < y2 <= scene.size[1]
            assert maker is scenes.portrait or not (x1 % 2 or y1 % 2 or x2 % 2 or y2 % 2)
            seen.add((thing.name, thing.variant) if thing.kind == "object" else thing.variant)
    if maker is scenes.portrait:
        assert {("apple", 0), ("apple", 1)} <= seen
    if maker in (scenes.street, scenes.cover):
        assert {0, 1, 2, 3} <= seen, "every font"


def test_the_benchmark_is_coins_and_the_same_of_the_same_seed(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(small, "SIZES", {"train": 6, "dev": 2, "test": 3})
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        assert small.build(folder, 0, *sources)
    one, two = ({p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in folders)
    assert one == two and len([path for path in one if path.suffix == ".png"]) > 70
    assert small.is_built(folders[0]) and not small.build(folders[0], 0, *sources)
    check_benchmark(folders[0], "original", list(TASKS))
    records = json.loads((folders[0] / "Instructions" / "ImageNet" / "train.json").read_text())
    with Image.open(folders[0] / "cl_dataset" / records[0]["image"]) as picture:
        assert max(picture.size) == 96


def test_the_skills_are_asked_in_the_same_world_beside_what_wordnet_says(sources, world, tmp_path, monkeypatch):
    monkeypatch.setattr(small_skills, "PER_SKILL", 2)
    small_skills.fill(tmp_path, 1, world, Nouns(sources[1]))
    asked = json.loads((tmp_path / "name-an-object" / "test.json").read_text())
    shown = {f"I see {'an' if name[0] in 'aeiou' else 'a'} {name} here." for name in world.portraits}
    assert len(asked) == 2 and all(record["answers"][0] in shown for record in asked)
    text = (tmp_path / "definitions.txt").read_text()
    assert text.splitlines() == [f"{word}: a gloss | of it." for word in ("Kiwi", "Soccer", "Eagle", "Moa")]


@pytest.mark.parametrize("lacking", ["stamps", "wordnet"])
def test_a_package_that_is_not_there_is_named(sources, tmp_path, lacking):
    places = {"stamps": sources[0], "wordnet": sources[1], lacking: tmp_path / "nothing"}
    package = {"stamps": "tuxpaint-stamps-default", "wordnet": "wordnet-base"}[lacking]
    with pytest.raises(FileNotFoundError, match=f"make_small_llava.sh fetches .*apt install {package}"):
        small.build(tmp_path / "out", 0, **places)
    assert not (tmp_path / "out").exists()
