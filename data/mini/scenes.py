"""Composition: random scenes of a world, each a function of the world and of the `random.Random` that is passed in.

Sizes are written in units of the world's, a forty-eighth of a picture's longer side."""

import random
from dataclasses import replace

from data.mini.world import AUTHORS, COLORS, GENRES, SHAPES, SIGNS, TITLES, Scene, Thing, World


def _pale(rng: random.Random) -> tuple[int, int, int]:
    return tuple(rng.randint(215, 255) for _ in range(3))


def _canvas(world: World, rng: random.Random) -> tuple[int, int]:
    """Width and height in pixels; two pictures in five are not square."""
    side, less = world.side, world.side - 8 * world.unit
    return rng.choice([(side, side)] * 3 + [(side, less), (less, side)])


def portrait(world: World, rng: random.Random, names: tuple[str, ...] | None = None) -> Scene:
    """One object of `names` (without: of the portraits), large, anywhere, slightly turned."""
    width, height = size = _canvas(world, rng)
    side = rng.randint(26 * world.unit, min(size) - 2)
    x, y = rng.randint(0, width - side), rng.randint(0, height - side)
    name, angle = rng.choice(names or world.portraits), rng.choice((-20, -10, 0, 10, 20))
    thing = Thing("object", name, (x, y, x + side, y + side), angle=angle, variant=world.variant(rng, name))
    return Scene("portrait", size, [thing], _pale(rng), world=world)


def snapshot(world: World, rng: random.Random) -> Scene:
    """A household object in a bad photograph: dark, blurred or grainy; one in four is beyond recognition."""
    scene = portrait(world, rng, world.household)
    scene.kind, scene.seed = "household", rng.randrange(2**31)
    scene.unclear = rng.random() < 0.25
    if scene.unclear:
        scene.blur, scene.light, scene.noise = rng.uniform(7, 11), rng.uniform(0.3, 0.8), rng.randint(10, 35)
    else:
        scene.blur, scene.light, scene.noise = rng.uniform(0, 1.2), rng.uniform(0.45, 0.9), rng.randint(0, 25)
    scene.blur *= world.unit
    return scene


def _place(
    world: World, rng: random.Random, size: tuple[int, int], units: int, taken: list[tuple]
) -> tuple[int, int, int, int] | None:
    """A free square of so many units on the grid, or None when ten tries found none."""
    side = units * world.unit
    for _ in range(10):
        x = world.grid * rng.randint(0, (size[0] - side) // world.grid)
        y = world.grid * rng.randint(0, (size[1] - side) // world.grid)
        box = (x, y, x + side, y + side)
        if all(box[2] <= t[0] or t[2] <= box[0] or box[3] <= t[1] or t[3] <= box[1] for t in taken):
            return box
    return None


def _thing(world: World, rng: random.Random, box: tuple, avoid: set[str]) -> Thing:
    """An object or a coloured shape whose phrase is not in `avoid`."""
    while True:
        if rng.random() < 0.5:
            name = rng.choice(world.scenery)
            thing = Thing("object", name, box, variant=world.variant(rng, name))
        else:
            thing = Thing("shape", rng.choice(list(SHAPES)), box, color=rng.choice(list(COLORS)))
        if thing.phrase not in avoid:
            return thing


def group(world: World, rng: random.Random, count: int | None = None) -> Scene:
    """Two to four different things of 16, 20 or 24 units, apart from each other."""
    size, things = _canvas(world, rng), []
    for _ in range(count or rng.choice((2, 2, 3, 3, 4))):
        box = _place(world, rng, size, rng.choice((16, 20, 24)), [t.box for t in things])
        if box:
            things.append(_thing(world, rng, box, {t.phrase for t in things}))
    return Scene("group", size, things, _pale(rng), world=world) if len(things) > 1 else group(world, rng, count)


def crowd(world: World, rng: random.Random) -> Scene:
    """One to five copies of one thing, and up to two others; `facts['target']` is the copied thing."""
    size, copies, things = _canvas(world, rng), rng.randint(1, 5), []
    target = _thing(world, rng, (0, 0, 0, 0), set())
    for i in range(copies + rng.randint(0, 2)):
        box = _place(world, rng, size, 12, [t.box for t in things])
        if box is None:
            return crowd(world, rng)
        things.append(replace(target, box=box) if i < copies else _thing(world, rng, box, {t.phrase for t in things}))
    rng.shuffle(things)
    return Scene("count", size, things, _pale(rng), facts={"target": target, "copies": copies}, world=world)


def street(world: World, rng: random.Random) -> Scene:
    """One or two signs of different colours, and sometimes something beside them."""
    size, things, colors = _canvas(world, rng), [], rng.sample(list(COLORS), 2)
    width, height = 36 * world.unit, 16 * world.unit
    for word, color in zip(rng.sample(SIGNS, 2)[: rng.choice((1, 1, 2))], colors, strict=False):
        for _ in range(10):
            x = world.grid * rng.randint(0, (size[0] - width) // world.grid)
            y = world.grid * rng.randint(0, (size[1] - height) // world.grid)
            if all(y + height <= t.box[1] or t.box[3] <= y for t in things):
                box = (x, y, x + width, y + height)
                things.append(Thing("sign", word, box, color, variant=world.font(rng)))
                break
    if len(things) == 1 and rng.random() < 0.5:
        box = _place(world, rng, size, 16, [t.box for t in things])
        if box:
            things.append(_thing(world, rng, box, set()))
    return Scene("sign", size, things, _pale(rng), world=world)


def cover(world: World, rng: random.Random) -> Scene:
    """A book: title on top, the genre's icon in the middle, author at the bottom, on a coloured cover."""
    unit, height = world.unit, world.side
    size = (rng.choice((40, 48)) * unit, height)
    color, icon = rng.choice(list(COLORS)), rng.choice(list(GENRES))
    side = rng.choice((16, 20)) * unit
    x = world.grid * rng.randint(0, (size[0] - side) // world.grid)
    y = rng.choice((12, 16)) * unit if side == 16 * unit else 14 * unit
    shade = tuple(max(0, min(255, c + rng.randint(-14, 14))) for c in COLORS[color])
    things = [
        Thing("title", rng.choice(TITLES), (0, 0, size[0], 14 * unit), color, variant=world.font(rng)),
        Thing("icon", icon, (x, y, x + side, y + side)),
        Thing("author", rng.choice(AUTHORS), (0, height - 14 * unit, size[0], height), color, variant=world.font(rng)),
    ]
    return Scene("cover", size, things, shade, genre=GENRES[icon], world=world)
