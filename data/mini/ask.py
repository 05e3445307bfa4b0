"""What is true of a scene: the facts that questions of the benchmark and of the pre-training corpus are about."""

import random

from data.mini.world import Scene, Thing


def plural(noun: str) -> str:
    """Plural of a thing's name or phrase ('red heart' -> 'red hearts')."""
    return noun + ("es" if noun.endswith(("s", "x", "ch")) else "s")


def padded_box(scene: Scene, thing: Thing) -> list[float]:
    """Box as fractions of the padded square, two decimals: [x1, y1, x2, y2]."""
    side, (width, height) = scene.world.side, scene.size
    dx, dy = (side - width) // 2, (side - height) // 2
    x1, y1, x2, y2 = thing.box
    return [round(v / side, 2) for v in (x1 + dx, y1 + dy, x2 + dx, y2 + dy)]


def clearly(relation: str, a: Thing, b: Thing) -> bool:
    """Whether the whole of `a` lies left of / right of / above / below the whole of `b`."""
    return {
        "left of": a.box[2] <= b.box[0],
        "right of": a.box[0] >= b.box[2],
        "above": a.box[3] <= b.box[1],
        "below": a.box[1] >= b.box[3],
    }[relation]


OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
RELATIONS = tuple(OPPOSITE)


def unique_relation(rng: random.Random, scene: Scene) -> tuple[Thing, str, Thing] | None:
    """(a, relation, b) such that a is the only thing in that relation to b, or None."""
    found = []
    for b in scene.things:
        for relation in RELATIONS:
            there = [a for a in scene.things if a is not b and clearly(relation, a, b)]
            if len(there) == 1:
                found.append((there[0], relation, b))
    return rng.choice(found) if found else None


def true_or_false_relation(rng: random.Random, scene: Scene) -> tuple[Thing, str, Thing, bool] | None:
    """(a, relation, b, holds): as often true as false, and never a matter of degree."""
    wanted = rng.random() < 0.5
    found = [
        (a, relation if wanted else OPPOSITE[relation], b, wanted)
        for a in scene.things
        for b in scene.things
        for relation in RELATIONS
        if a is not b and clearly(relation, a, b)
    ]
    return rng.choice(found) if found else None


def bigger_pair(rng: random.Random, scene: Scene) -> tuple[Thing, Thing] | None:
    """(bigger, smaller) of different names with at least 8 units between their sizes, or None."""
    apart = 8 * scene.world.unit
    pairs = [(a, b) for a in scene.things for b in scene.things if a.size >= b.size + apart and a.name != b.name]
    return rng.choice(pairs) if pairs else None


def lone_shapes(scene: Scene) -> list[Thing]:
    """The shapes that are the only one of their form and also the only one of their colour."""
    shapes = [t for t in scene.things if t.kind == "shape"]
    return [
        s for s in shapes if sum(t.name == s.name for t in shapes) == 1 and sum(t.color == s.color for t in shapes) == 1
    ]


def distinct(scene: Scene) -> list[Thing]:
    """One thing per phrase that occurs exactly once."""
    phrases = [t.phrase for t in scene.things]
    return [t for t in scene.things if phrases.count(t.phrase) == 1]
