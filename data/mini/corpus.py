"""The pre-training corpus of the shipped base models: captions and conversations about scenes of a world.

Every answer is a sentence. None of the eight tasks' instructions occurs here and none of their answer formats: no
bare word, no bare option letter, no bracketed box, nothing called unanswerable. What the base learns is to see, read,
count, compare, choose and point; the answer formats are left for the tasks to teach.
"""

import json
import random
from pathlib import Path

from data.mini import ask, scenes
from data.mini.world import (
    AUTHORS,
    CATEGORY_OF,
    COLORS,
    GENRES,
    GLYPHS,
    MINI,
    SHAPES,
    SIGNS,
    TITLES,
    Scene,
    Thing,
    World,
)

Turn = tuple[str, str]
_INSTRUCTIONS = json.loads((Path(__file__).parents[1] / "instructions.json").read_text(encoding="utf-8"))[
    "instructions"
]
SAYABLE = sorted(
    {word.strip(",") for sets in _INSTRUCTIONS.values() for lines in sets.values() for w in lines for word in w.split()}
    | {*GLYPHS, *CATEGORY_OF.values(), *COLORS, *SHAPES, *SIGNS, *TITLES, *AUTHORS, *GENRES.values()}
    | {"What", "Who", "Is", "Are", "How", "many", "are", "there", "these", "am", "holding", "picture"}
    | {"yes", "no", "unanswerable", "[", "]", *"ABCD", *"012345", *(f"{n / 12:.2f}" for n in range(13))}
)


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _where(scene: Scene, thing: Thing) -> str:
    x1, y1, x2, y2 = ask.padded_box(scene, thing)
    return f"from {x1:.2f} to {x2:.2f} across and from {y1:.2f} to {y2:.2f} down"


def _listed(rng: random.Random, options: list[str]) -> str:
    """Lettered options in one of several layouts."""
    mark = rng.choice(("{}: {}", "({}) {}", "{}) {}", "{}. {}"))
    return rng.choice(("\n", " ", ", ", "; ")).join(
        mark.format(letter, o) for letter, o in zip("ABCD", options, strict=False)
    )


def _choice(rng: random.Random, right: str, pool: list[str]) -> tuple[str, str]:
    """(options as text, the right option's letter)."""
    options = [right, *rng.sample([p for p in pool if p != right], rng.randint(1, min(3, len(pool) - 1)))]
    rng.shuffle(options)
    return _listed(rng, options), "ABCD"[options.index(right)]


def choose_named(rng: random.Random, right: str, pool: list[str], question: str) -> Turn:
    """A multiple-choice turn with a sentence for an answer."""
    options, letter = _choice(rng, right, pool)
    ask_first = rng.random() < 0.5
    text = f"{question}\n{options}" if ask_first else f"Here is a list.\n{options}\n{question}"
    return text, rng.choice((f"It is choice {letter}, the {right}.", f"I take {letter} because of the {right}."))


def text_only(rng: random.Random, world: World = MINI) -> list[Turn]:
    """Knowledge of kinds, and choosing from a list, without a picture."""
    turns, lore = [], world.lore
    for _ in range(rng.randint(2, 4)):
        name = rng.choice(list(lore))
        kind = lore[name]
        form = rng.random()
        if form < 0.25:
            turns.append((f"Tell me what {_a(name)} is.", f"Everybody knows that {_a(name)} is {_a(kind)}."))
        elif form < 0.4:
            turns.append(choose_named(rng, kind, sorted(set(lore.values())), f"To which kind does the {name} belong?"))
        elif form < 0.7:
            others = [n for n, k in lore.items() if k != kind]
            turns.append(choose_named(rng, name, [name, *others], f"Please find the {kind}."))
        else:
            turns.append(choose_named(rng, name, list(lore), f"Please find the {name}."))
    return turns


def echo(rng: random.Random) -> list[Turn]:
    """Random words, said again. A token that was never an answer has no output embedding of its own, and LoRA does not
    train those: here every word, number, letter and bracket of the world and of the tasks becomes sayable, in no order
    and in no format that means anything. The words with which only the tasks' questions begin are among them: a word
    that was never read has no input embedding either."""
    turns = []
    for _ in range(rng.randint(2, 4)):
        words = " ".join(rng.choices(SAYABLE, k=rng.randint(2, 8)))
        turns.append(
            rng.choice(((f"Say after me: {words}", f"You said: {words}"), (f"Repeat {words}", f"I repeat {words}")))
        )
    return turns


def _portrait_turns(rng: random.Random, scene: Scene) -> list[Turn]:
    name, known = scene.things[0].name, scene.world.kinds
    turns = [(rng.choice(("Tell me what you see.", "Describe this.")), f"I see {_a(name)} here.")]
    pool = list(known)
    turns.append(
        choose_named(rng, name, pool if name in pool else [name, *pool], "Please find the thing that you see.")
    )
    if name in known:
        kind = known[name]
        kinds = sorted(set(known.values()))
        turns.append(choose_named(rng, kind, kinds, "To which kind does the thing that you see belong?"))
        turns.append(("Tell me the kind of thing that you see.", f"The {name} is {_a(kind)}."))
    return turns


def _snapshot_turns(rng: random.Random, scene: Scene) -> list[Turn]:
    name = scene.things[0].name
    answer = "It is far too unclear to tell." if scene.unclear else f"It looks like {_a(name)} to me."
    return [(rng.choice(("Try to make it out.", "Tell me what you can make out.", "Describe this.")), answer)]


def _group_turns(rng: random.Random, scene: Scene) -> list[Turn]:
    turns = []
    things = ask.distinct(scene)
    listing = " and ".join(f"{_a(t.phrase)}" for t in sorted(scene.things, key=lambda t: (t.box[0], t.box[1])))
    turns.append((rng.choice(("Tell me what you see.", "Describe this.")), f"From left to right I see {listing}."))
    for thing in rng.sample(things, min(2, len(things))):
        turns.append(_place(rng, scene, thing))
    for _ in range(2):
        if found := ask.unique_relation(rng, scene):
            a, relation, b = found
            question = rng.choice(
                ("Name the thing {} the {}.", "Tell me the thing {} the {}.", "Which thing do you see {} the {}?")
            )
            turns.append((question.format(relation, b.phrase), f"The {a.name} is {relation} the {b.phrase}."))
        if found := ask.true_or_false_relation(rng, scene):
            turns.append(_relation_check(rng, *found))
    if pair := ask.bigger_pair(rng, scene):
        first, second = pair if rng.random() < 0.5 else pair[::-1]
        turns.append(
            (
                f"Compare the {first.phrase} and the {second.phrase}.",
                f"The {pair[0].name} is bigger than the {pair[1].name}.",
            )
        )
    return turns + _shape_turns(rng, scene) + [_presence(rng, scene)]


def _place(rng: random.Random, scene: Scene, thing: Thing) -> Turn:
    question = rng.choice(("Where is the {}?", "Point at the {}.", "Tell me where the {} goes."))
    return question.format(thing.phrase), f"The {thing.phrase} goes {_where(scene, thing)}."


def _relation_check(rng: random.Random, a: Thing, relation: str, b: Thing, holds: bool) -> Turn:
    """Whether a stated relation holds, or (one time in four) which one does."""
    true = relation if holds else ask.OPPOSITE[relation]
    if rng.random() < 0.25:
        return f"Tell me how the {a.phrase} lies to the {b.phrase}.", f"The {a.phrase} is {true} the {b.phrase}."
    question = rng.choice(
        (
            "Tell me if the {} is {} the {}.",
            "Would you say that the {} is {} the {}?",
            "Does the {} lie {} the {}?",
            "Am I right that the {} is {} the {}?",
            "I think that the {} is {} the {}.",
        )
    ).format(a.phrase, relation, b.phrase)
    return question, f"{'Yes' if holds else 'No'}, it is {true} it."


def _shape_turns(rng: random.Random, scene: Scene) -> list[Turn]:
    turns = []
    shapes = [t for t in scene.things if t.kind == "shape"]
    for shape in ask.lone_shapes(scene):
        turns.append(
            rng.choice(
                (
                    (f"{_tell(rng, 'color')} of the {shape.name}.", f"The {shape.name} is {shape.color}."),
                    (
                        f"{_tell(rng, 'shape')} of the {shape.color} thing.",
                        f"The {shape.color} thing is {_a(shape.name)}.",
                    ),
                )
            )
        )
    if len(shapes) == 2 and shapes[0].name != shapes[1].name:
        same = shapes[0].color == shapes[1].color
        answer = "Yes, they have the same color." if same else "No, they have different colors."
        question = rng.choice(
            (
                "Compare the colors of the {} and the {}.",
                "Do the {} and the {} have one color?",
                "Tell me if the {} and the {} match in color.",
                "Would you say that the {} and the {} match in color?",
            )
        )
        turns.append((question.format(shapes[0].name, shapes[1].name), answer))
    return turns


def _tell(rng: random.Random, what: str) -> str:
    return rng.choice(("Tell me the {}", "Name the {}", "Give me the {}")).format(what)


def _presence(rng: random.Random, scene: Scene) -> Turn:
    phrases = {t.phrase for t in scene.things}
    there = rng.random() < 0.5
    absent = [n for n in (*scene.world.scenery, *(f"{c} {s}" for c in COLORS for s in SHAPES)) if n not in phrases]
    phrase = rng.choice(sorted(phrases) if there else absent)
    question, yes, no = rng.choice(
        (
            ("Can you see {}?", "Yes, I can see {}.", "No, I cannot see {}."),
            ("Do you see {} anywhere?", "Yes, I can see {}.", "No, I cannot see {}."),
            ("Tell me if {} is shown.", "Yes, {} is shown.", "No, {} is not shown."),
            ("Does this show {}?", "Yes, {} is shown.", "No, {} is not shown."),
            ("I would like to find {} here.", "Yes, I can see {}.", "No, I cannot see {}."),
        )
    )
    return question.format(_a(phrase)), (yes if there else no).format(_a(phrase))


def _count_turns(rng: random.Random, scene: Scene) -> list[Turn]:
    target, copies = scene.facts["target"], scene.facts["copies"]
    noun = target.phrase if copies == 1 else ask.plural(target.phrase)
    question = rng.choice(("Count the {}.", "Tell me the number of {}.", "Give me the number of {} that you see."))
    turns = [(question.format(ask.plural(target.phrase)), f"I count {copies} {noun}."), _presence(rng, scene)]
    if target.kind == "shape" and all(t.name != target.name or t.color == target.color for t in scene.things):
        turns.append(
            (
                f"{_tell(rng, 'color')} of the {ask.plural(target.name)}.",
                f"I would say that {target.name} is {target.color}.",
            )
        )
    return turns + [_presence(rng, scene)]


def _sign_turns(rng: random.Random, scene: Scene) -> list[Turn]:
    signs = [t for t in scene.things if t.kind == "sign"]
    turns = []
    for sign in signs:
        which = f"the {sign.color} sign" if len(signs) == 2 or rng.random() < 0.3 else "the sign"
        question = rng.choice(("Read {} to me.", "Tell me the word on {}.", "Give me the word that you read on {}."))
        turns.append((question.format(which), f"On {which} I read {sign.name}."))
        turns.append(_place(rng, scene, sign))
    return turns


def _cover_turns(rng: random.Random, scene: Scene) -> list[Turn]:
    named = {t.kind: t.name for t in scene.things}
    title, author, genre = named["title"], named["author"], scene.genre
    yes, other = (
        rng.random() < 0.5,
        rng.choice(["crime", "horror", "romance", "travel", "cooking", "science", "music", "sport"]),
    )
    asked = genre if yes else other
    verdict = "Yes, it belongs" if asked == genre else "No, it does not belong"
    shelf = f"It belongs on the {genre} shelf."
    question = rng.choice(
        (
            "Tell me if it belongs on the {} shelf.",
            "Does it belong to {}?",
            "Would you say that it is about {}?",
            "Am I right that you find it on the {} shelf?",
        )
    )
    return [
        ("Describe this.", f"I see the book {title} by {author}, about {genre}."),
        (rng.choice(("Read the title to me.", "Tell me the title.")), f"I read {title} at the top."),
        (
            rng.choice(("Tell me who wrote it.", "Name the author.", "Tell me the author.")),
            f"It was written by {author}.",
        ),
        (rng.choice(("Tell me which shelf it belongs on.", "Name the genre.", "Tell me the genre.")), shelf),
        (question.format(asked), f"{verdict} on the {asked} shelf."),
    ]


SCENES = {  # kind of scene -> (maker, turns, share of the corpus)
    "portrait": (scenes.portrait, _portrait_turns, 0.2),
    "kinds": (lambda world, rng: scenes.portrait(world, rng, tuple(world.kinds)), _portrait_turns, 0.08),
    "household": (scenes.snapshot, _snapshot_turns, 0.12),
    "group": (scenes.group, _group_turns, 0.25),
    "count": (scenes.crowd, _count_turns, 0.15),
    "sign": (scenes.street, _sign_turns, 0.1),
    "cover": (scenes.cover, _cover_turns, 0.1),
}


def scene(rng: random.Random, world: World = MINI) -> tuple[str, Scene]:
    """A key of SCENES and a scene of that kind, by the shares of the corpus."""
    kind = rng.choices(list(SCENES), [share for *_, share in SCENES.values()])[0]
    return kind, SCENES[kind][0](world, rng)


def conversation(rng: random.Random, turns: int = 4, world: World = MINI) -> tuple[Scene, list[Turn]]:
    """A scene and at most `turns` question-answer turns about it, in random order."""
    kind, made = scene(rng, world)
    asked = dict(SCENES[kind][1](rng, made))
    return made, rng.sample(list(asked.items()), min(turns, len(asked)))
