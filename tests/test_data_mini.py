"""CoIN-mini: the world's names, true answers, and the benchmark on disk."""

import filecmp
import hashlib
import json
import random
import re
import unicodedata

import pytest
from PIL import Image

from data.benchmark import open_benchmark
from data.mini import ask, build, corpus, fourfold, scenes, world
from data.mini.tasks import TASKS, box_text

INSTRUCTIONS = json.loads(build.INSTRUCTIONS.read_text())["instructions"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A whole benchmark of a few samples a task."""
    root = tmp_path_factory.mktemp("mini") / "coin_mini"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "SIZES", {"train": 12, "dev": 4, "test": 6})
        assert build.build(root, seed=3)
        assert not build.build(root, seed=3), "an unchanged benchmark is not made again"
    return root


def samples(task: str, count: int, seed: int = 0):
    rng = random.Random(seed)
    return [TASKS[task](world.MINI, rng) for _ in range(count)]


def test_names_are_distinct_words_of_the_unicode_names():
    glyphs = world.PORTRAITS + world.HOUSEHOLD + world.SCENERY
    assert len(world.GLYPHS) == len(glyphs) == len(set(glyphs))
    assert all(name in unicodedata.name(g).lower().split() for name, g in world.GLYPHS.items())
    assert len(world.PORTRAIT_NAMES) >= 40
    assert not set(world.PORTRAIT_NAMES) & set(world.HOUSEHOLD_NAMES)


def test_pictures_fit_in_64_pixels_and_some_are_not_square():
    rng = random.Random(0)
    sizes = [
        world.draw(make(world.MINI, rng)).size
        for make in (scenes.portrait, scenes.group, scenes.cover)
        for _ in range(30)
    ]
    assert max(max(size) for size in sizes) <= 64
    assert len({w == h for w, h in sizes}) == 2


@pytest.mark.parametrize("maker", [scenes.group, scenes.crowd, scenes.street, scenes.cover, scenes.portrait])
def test_things_lie_inside_the_picture_and_apart(maker):
    rng = random.Random(1)
    for _ in range(100):
        scene = maker(world.MINI, rng)
        for i, thing in enumerate(scene.things):
            x1, y1, x2, y2 = thing.box
            assert 0 <= x1 < x2 <= scene.size[0] and 0 <= y1 < y2 <= scene.size[1]
            for other in scene.things[:i]:
                a, b = thing.box, other.box
                apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
                assert apart or scene.kind == "cover"


def test_the_padded_box_is_where_the_thing_is_in_the_padded_picture():
    rng = random.Random(2)
    for _ in range(50):
        scene = scenes.group(world.MINI, rng)
        thing = scene.things[0]
        picture = world.draw(scene)
        square = Image.new("RGB", (world.SIDE, world.SIDE))
        square.paste(picture, ((world.SIDE - picture.width) // 2, (world.SIDE - picture.height) // 2))
        corners = [round(v * world.SIDE) for v in ask.padded_box(scene, thing)]
        assert square.crop(corners).tobytes() == picture.crop(thing.box).tobytes()


def test_yes_and_no_are_balanced_and_counts_are_counts():
    answers = [answer for sample in samples("VQAv2", 600) for _, answer in sample.turns]
    assert 0.4 < answers.count("yes") / (answers.count("yes") + answers.count("no")) < 0.6
    for sample in samples("VQAv2", 200, seed=1):
        for question, answer in sample.turns:
            if match := re.fullmatch(r"How many (.+) are there\?", question):
                there = [t for t in sample.scene.things if ask.plural(t.phrase) == match[1]]
                assert answer == str(len(there))


def test_relations_are_true_of_the_picture():
    checked = 0
    for sample in samples("GQA", 300):
        for question, answer in sample.turns:
            if match := re.fullmatch(r"Is the (.+) (left of|right of|above|below) the (.+)\?", question):
                a, b = (next(t for t in sample.scene.things if t.phrase == match[i]) for i in (1, 3))
                horizontal = match[2] in ("left of", "right of")
                first, second = (a.box[0], b.box[0]) if horizontal else (a.box[1], b.box[1])
                smaller = match[2] in ("left of", "above")
                assert answer == ("yes" if (first < second) == smaller else "no")
                checked += 1
    assert checked > 30


def test_multiple_choice_has_one_right_answer():
    for sample in samples("ScienceQA", 200):
        extras = sample.extras
        kinds = [world.CATEGORY_OF.get(choice) for choice in extras["choices"]]
        assert len(set(extras["choices"])) == len(extras["choices"]) >= 2
        assert sample.turns[0][1] == "ABCD"[extras["answer"]]
        if match := re.fullmatch(r"Which of these is an? (.+)\?", extras["question"]):
            assert kinds.count(match[1]) == 1 and kinds[extras["answer"]] == match[1]


def test_the_pretraining_corpus_has_no_instruction_and_no_answer_format_of_the_tasks():
    rng = random.Random(0)
    turns = [turn for _ in range(1500) for turn in corpus.conversation(rng, 9)[1] + corpus.text_only(rng)]
    echoes = [turn for _ in range(1500) for turn in corpus.echo(rng)]
    text = "\n".join(part for turn in turns for part in turn).lower()
    wordings = {line.lower() for sets in INSTRUCTIONS.values() for lines in sets.values() for line in lines}
    said = "\n".join(part for turn in echoes for part in turn).lower()
    assert not [line for line in wordings if line in text or line in said]
    task_answers = {answer for task in TASKS for s in samples(task, 300) for _, answer in s.turns}
    assert not [answer for _, answer in turns + echoes if answer in task_answers or len(answer.split()) < 3]
    assert not re.search(r"\[ ?\d\.\d\d,", said)
    assert "unanswerable" not in text and "[" not in text
    task_questions = {q.splitlines()[0] for task in TASKS for s in samples(task, 300) for q, _ in s.turns if q}
    assert not task_questions & {question for question, _ in turns}


def test_layout_and_schema(small):
    for which, folder in open_benchmark(small).instructions.items():
        for task in TASKS:
            directory = small / folder / task
            evaluated = "val" if task in ("TextVQA", "VizWiz", "VQAv2") else "test"
            assert sorted(p.stem for p in directory.iterdir()) == sorted(["train", "dev", evaluated])
            train = json.loads((directory / "train.json").read_text())
            assert len(train) == 12
            for record in train:
                first = record["conversations"][0]["value"]
                assert ("image" in record) == first.startswith("<image>\n")
                assert any(wording in first for wording in INSTRUCTIONS[task][which])
                assert [t["from"] for t in record["conversations"]] == ["human", "gpt"] * (
                    len(record["conversations"]) // 2
                )
            for record in json.loads((directory / f"{evaluated}.json").read_text()):
                assert {"question_id", "text"} <= set(record) and "<image>" not in record["text"]
    box = json.loads((small / "Instructions/Grounding/test.json").read_text())[0]["answer_bbox"]
    assert box == box_text(json.loads(box))


def test_no_picture_occurs_twice(small):
    pictures = [hashlib.sha256(Image.open(p).tobytes()).hexdigest() for p in sorted(small.glob("cl_dataset/*/*/*.png"))]
    assert len(pictures) > 150 and len(set(pictures)) == len(pictures)


def test_building_deletes_nothing(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(FileExistsError, match="move it away"):
        build.build(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_the_benchmark_is_a_function_of_the_seed(small, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "SIZES", {"train": 12, "dev": 4, "test": 6})
    build.build(tmp_path / "same", seed=3)
    build.build(tmp_path / "other", seed=4)
    files = [str(p.relative_to(small)) for p in small.rglob("*") if p.is_file()]
    _, different, errors = filecmp.cmpfiles(small, tmp_path / "same", files, shallow=False)
    assert not different and not errors
    _, different, _ = filecmp.cmpfiles(small, tmp_path / "other", files, shallow=False)
    assert len(different) > len(files) / 2


def test_fourfold_has_four_times_the_training_records(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "SIZES", {"train": 3, "dev": 1, "test": 2})
    plain, more = tmp_path / "plain", tmp_path / "more"
    assert build.build(plain) and fourfold.build(more)
    assert fourfold.is_built(more) and not fourfold.is_built(plain) and build.is_built(plain)
    for task in TASKS:
        counts = [len(json.loads((r / "Instructions" / task / "train.json").read_text())) for r in (plain, more)]
        assert counts == [3, 12]
