"""The eight tasks of CoIN-mini: one function a task, from a world and a `random.Random` to an `Example` without its
instruction."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from data.mini import ask, scenes
from data.mini.world import COLORS, GENRES, SHAPES, Scene, World

LETTERS = "ABCD"


@dataclass
class Example:
    """A picture (or none) and question-answer turns; `extras` are what the official annotation files hold."""

    scene: Scene | None
    turns: list[tuple[str, str]]
    extras: dict = field(default_factory=dict)


def _choices(rng: random.Random, right: str, pool: list[str]) -> tuple[list[str], int]:
    """Two to four options in random order and the index of the right one."""
    options = [right, *rng.sample([p for p in pool if p != right], rng.randint(1, min(3, len(pool) - 1)))]
    rng.shuffle(options)
    return options, options.index(right)


def science_qa(world: World, rng: random.Random) -> Example:
    """Multiple choice: what is shown, what kind of thing is shown, or (without a picture) what belongs to a kind."""
    form, scene, kinds = rng.random(), None, sorted(set(world.kinds.values()))
    if form < 0.45:
        scene = scenes.portrait(world, rng)
        options, answer = _choices(rng, scene.things[0].name, list(world.portraits))
        question = "Which of these is in the picture?"
    elif form < 0.65:
        kind = rng.choice(kinds)  # every kind as often: no blind guess pays
        scene = scenes.portrait(world, rng, tuple(name for name in world.kinds if world.kinds[name] == kind))
        options, answer = _choices(rng, kind, kinds)
        question = "What kind of thing is in the picture?"
    else:
        kind = rng.choice(kinds)
        right = rng.choice([name for name in world.lore if world.lore[name] == kind])
        others = [name for name in world.lore if world.lore[name] != kind]
        options, answer = _choices(rng, right, [right, *others])
        question = f"Which of these is {'an' if kind[0] in 'ai' else 'a'} {kind}?"
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    extras = {"question": question, "choices": options, "answer": answer}
    return Example(scene, [("\n".join([question, *lines]), LETTERS[answer])], extras)


def text_vqa(world: World, rng: random.Random) -> Example:
    """Read the word on a sign; with two signs the question names the sign's colour."""
    scene = scenes.street(world, rng)
    signs = [t for t in scene.things if t.kind == "sign"]
    sign = rng.choice(signs)
    if len(signs) == 2:
        question = f"What does the {sign.color} sign say?"
    else:
        question = rng.choice(("What does the sign say?", "What word is written on the sign?"))
    return Example(scene, [(question, sign.name)])


def image_net(world: World, rng: random.Random) -> Example:
    """Name the object; the instruction is the whole question."""
    scene = scenes.portrait(world, rng)
    return Example(scene, [("", scene.things[0].name)])


def _gqa_turn(rng: random.Random, scene: Scene) -> tuple[str, str] | None:
    form = rng.choice(("what", "what", "whether", "shape", "bigger", "same"))
    if form == "what" and (found := ask.unique_relation(rng, scene)):
        a, relation, b = found
        return f"What is {relation} the {b.phrase}?", a.name
    if form == "whether" and (found := ask.true_or_false_relation(rng, scene)):
        a, relation, b, holds = found
        return f"Is the {a.phrase} {relation} the {b.phrase}?", "yes" if holds else "no"
    if form == "shape" and (shapes := ask.lone_shapes(scene)):
        shape = rng.choice(shapes)
        return f"What shape is the {shape.color} thing?", shape.name
    if form == "bigger" and (pair := ask.bigger_pair(rng, scene)):
        first, second = pair if rng.random() < 0.5 else pair[::-1]
        return f"Which is bigger, the {first.phrase} or the {second.phrase}?", pair[0].name
    if form == "same":
        shapes = [t for t in scene.things if t.kind == "shape"]
        if len(shapes) == 2 and shapes[0].name != shapes[1].name:
            same = shapes[0].color == shapes[1].color
            if same or rng.random() < 0.3:  # different colours are far more frequent
                return (
                    f"Are the {shapes[0].name} and the {shapes[1].name} the same color?",
                    "yes" if same else "no",
                )
    return None


def _two_turns(rng: random.Random, scene: Scene, turn: Callable) -> list[tuple[str, str]]:
    """Two different questions about one picture (fewer when ten tries find no more)."""
    turns = {}
    for _ in range(10):
        if len(turns) < 2 and (found := turn(rng, scene)):
            turns.setdefault(*found)
    return list(turns.items())


def gqa(world: World, rng: random.Random) -> Example:
    """Relations, attributes and comparisons between the things of a scene; one word."""
    while True:
        scene = scenes.group(world, rng)
        if turns := _two_turns(rng, scene, _gqa_turn):
            return Example(scene, turns)


def viz_wiz(world: World, rng: random.Random) -> Example:
    """What a bad photograph shows; 'unanswerable' when it cannot be told."""
    scene = scenes.snapshot(world, rng)
    question = rng.choice(("What is this?", "Can you tell me what this is?", "What am I holding?"))
    return Example(scene, [(question, "unanswerable" if scene.unclear else scene.things[0].name)])


def box_text(box: list[float]) -> str:
    """The answer format of Grounding: '[0.25, 0.33, 0.58, 0.67]'."""
    return "[" + ", ".join(f"{v:.2f}" for v in box) + "]"


def grounding(world: World, rng: random.Random) -> Example:
    """The box of the thing that an expression describes, in fractions of the padded square."""
    scene = scenes.group(world, rng)
    thing = rng.choice(ask.distinct(scene))
    box = ask.padded_box(scene, thing)
    return Example(scene, [(thing.phrase, box_text(box))], {"answer_bbox": box_text(box), "size": list(scene.size)})


def _vqa_turn(rng: random.Random, scene: Scene) -> tuple[str, str] | None:
    form = rng.choice(("whether", "count", "color"))
    phrases = {t.phrase for t in scene.things}
    if form == "whether":
        absent = [n for n in scene.world.scenery if n not in phrases]
        absent += [f"{c} {s}" for c in COLORS for s in SHAPES if f"{c} {s}" not in phrases]
        there = rng.random() < 0.5
        return f"Is there a {rng.choice(sorted(phrases) if there else absent)}?", "yes" if there else "no"
    if form == "count" and scene.kind == "count":
        return f"How many {ask.plural(scene.facts['target'].phrase)} are there?", str(scene.facts["copies"])
    if form == "color":
        shapes = [t for t in scene.things if t.kind == "shape"]
        named = [t for t in shapes if len({s.color for s in shapes if s.name == t.name}) == 1]
        if named:
            shape = rng.choice(named)
            count = sum(t.name == shape.name for t in shapes)
            subject = f"color is the {shape.name}" if count == 1 else f"color are the {ask.plural(shape.name)}"
            return f"What {subject}?", shape.color
    return None


def vqa_v2(world: World, rng: random.Random) -> Example:
    """Yes/no, counts and colours."""
    while True:
        scene = scenes.crowd(world, rng) if rng.random() < 0.7 else scenes.group(world, rng)
        if turns := _two_turns(rng, scene, _vqa_turn):
            return Example(scene, turns)


def _book_turn(rng: random.Random, scene: Scene) -> tuple[str, str]:
    named = {t.kind: t.name for t in scene.things}
    form = rng.choice(("title", "author", "genre", "whether"))
    if form == "whether":
        others = sorted(set(GENRES.values()) - {scene.genre})
        there = rng.random() < 0.5
        return f"Is this a {scene.genre if there else rng.choice(others)} book?", "yes" if there else "no"
    question = {
        "title": "What is the title of this book?",
        "author": "Who is the author of this book?",
        "genre": "What is the genre of this book?",
    }[form]
    return question, scene.genre if form == "genre" else named[form]


def ocr_vqa(world: World, rng: random.Random) -> Example:
    """Title, author, genre and yes/no questions about a book's cover."""
    scene = scenes.cover(world, rng)
    return Example(scene, _two_turns(rng, scene, _book_turn))


TASKS: dict[str, Callable[[World, random.Random], Example]] = {
    "ScienceQA": science_qa,
    "TextVQA": text_vqa,
    "ImageNet": image_net,
    "GQA": gqa,
    "VizWiz": viz_wiz,
    "Grounding": grounding,
    "VQAv2": vqa_v2,
    "OCR-VQA": ocr_vqa,
}
