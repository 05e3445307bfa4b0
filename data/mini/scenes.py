"""Composition: random scenes of the world, each a function of the `random.Random` that is passed in."""

import random

from data.mini.world import (
    AUTHORS,
    COLORS,
    GENRES,
    GRID,
    HOUSEHOLD_NAMES,
    PORTRAIT_NAMES,
    SCENERY_NAMES,
    SHAPES,
    SIDE,
    SIGNS,
    TITLES,
    Scene,
    Thing,
)


def _pale(rng: random.Random) -> tuple[int, int, int]:
    return tuple(rng.randint(215, 255) for _ in range(3))


def _canvas(rng: random.Random) -> tuple[int, int]:
    """Width and height in pixels; two pictures in five are not square."""
    return rng.choice([(SIDE, SIDE)] * 3 + [(SIDE, SIDE - 8), (SIDE - 8, SIDE)])


def portrait(rng: random.Random, names: tuple[str, ...] = PORTRAIT_NAMES) -> Scene:
    """One object, large, anywhere, slightly turned."""
    width, height = size = _canvas(rng)
    side = rng.randint(26, min(size) - 2)
    x, y = rng.randint(0, width - side), rng.randint(0, height - side)
    thing = Thing("object", rng.choice(names), (x, y, x + side, y + side), angle=rng.choice((-20, -10, 0, 10, 20)))
    return Scene("portrait", size, [thing], _pale(rng))


def snapshot(rng: random.Random) -> Scene:
    """A household object in a bad photograph: dark, blurred or grainy; one in four is beyond recognition."""
    scene = portrait(rng, HOUSEHOLD_NAMES)
    scene.kind, scene.seed = "household", rng.randrange(2**31)
    scene.unclear = rng.random() < 0.25
    if scene.unclear:
        scene.blur, scene.light, scene.noise = rng.uniform(7, 11), rng.uniform(0.3, 0.8), rng.randint(10, 35)
    else:
        scene.blur, scene.light, scene.noise = rng.uniform(0, 1.2), rng.uniform(0.45, 0.9), rng.randint(0, 25)
    return scene


def _place(rng: random.Random, size: tuple[int, int], side: int, taken: list[tuple]) -> tuple | None:
    """A free box of `side` pixels on the grid, or None when ten tries found none."""
    for _ in range(10):
        x = GRID * rng.randint(0, (size[0] - side) // GRID)
        y = GRID * rng.randint(0, (size[1] - side) // GRID)
        box = (x, y, x + side, y + side)
        if all(box[2] <= t[0] or t[2] <= box[0] or box[3] <= t[1] or t[3] <= box[1] for t in taken):
            return box
    return None


def _thing(rng: random.Random, box: tuple, avoid: set[str]) -> Thing:
    """An object or a coloured shape whose phrase is not in `avoid`."""
    while True:
        if rng.random() < 0.5:
            thing = Thing("object", rng.choice(SCENERY_NAMES), box)
        else:
            thing = Thing("shape", rng.choice(list(SHAPES)), box, color=rng.choice(list(COLORS)))
        if thing.phrase not in avoid:
            return thing


def group(rng: random.Random, count: int | None = None) -> Scene:
    """Two to four different things of 16, 20 or 24 pixels, apart from each other."""
    size, things = _canvas(rng), []
    for _ in range(count or rng.choice((2, 2, 3, 3, 4))):
        box = _place(rng, size, rng.choice((16, 20, 24)), [t.box for t in things])
        if box:
            things.append(_thing(rng, box, {t.phrase for t in things}))
    return Scene("group", size, things, _pale(rng)) if len(things) > 1 else group(rng, count)


def crowd(rng: random.Random) -> Scene:
    """One to five copies of one thing, and up to two others; `facts['target']` is the copied thing."""
    size, copies, things = _canvas(rng), rng.randint(1, 5), []
    target = _thing(rng, (0, 0, 0, 0), set())
    for i in range(copies + rng.randint(0, 2)):
        box = _place(rng, size, 12, [t.box for t in things])
        if box is None:
            return crowd(rng)
        copied = Thing(target.kind, target.name, box, target.color)
        things.append(copied if i < copies else _thing(rng, box, {t.phrase for t in things}))
    rng.shuffle(things)
    return Scene("count", size, things, _pale(rng), facts={"target": target, "copies": copies})


def street(rng: random.Random) -> Scene:
    """One or two signs of different colours, and sometimes something beside them."""
    size, things, colors = _canvas(rng), [], rng.sample(list(COLORS), 2)
    for word, color in zip(rng.sample(SIGNS, 2)[: rng.choice((1, 1, 2))], colors, strict=False):
        for _ in range(10):
            x = GRID * rng.randint(0, (size[0] - 36) // GRID)
            y = GRID * rng.randint(0, (size[1] - 16) // GRID)
            if all(y + 16 <= t.box[1] or t.box[3] <= y for t in things):
                things.append(Thing("sign", word, (x, y, x + 36, y + 16), color))
                break
    if len(things) == 1 and rng.random() < 0.5:
        box = _place(rng, size, 16, [t.box for t in things])
        if box:
            things.append(_thing(rng, box, set()))
    return Scene("sign", size, things, _pale(rng))


def cover(rng: random.Random) -> Scene:
    """A book: title on top, the genre's icon in the middle, author at the bottom, on a coloured cover."""
    size = (rng.choice((40, 48)), SIDE)
    color, icon = rng.choice(list(COLORS)), rng.choice(list(GENRES))
    side = rng.choice((16, 20))
    x, y = GRID * rng.randint(0, (size[0] - side) // GRID), rng.choice((12, 16)) if side == 16 else 14
    shade = tuple(max(0, min(255, c + rng.randint(-14, 14))) for c in COLORS[color])
    things = [
        Thing("title", rng.choice(TITLES), (0, 0, size[0], 14), color),
        Thing("icon", icon, (x, y, x + side, y + side)),
        Thing("author", rng.choice(AUTHORS), (0, SIDE - 14, size[0], SIDE), color),
    ]
    return Scene("cover", size, things, shade, genre=GENRES[icon])
