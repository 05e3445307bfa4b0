"""What pre-training asks of every patch of a picture: the name, the colour and the box of the thing that covers it."""

import math
from functools import cache

import torch

from data.mini.world import AUTHORS, COLORS, GENRES, SHAPES, SIGNS, TITLES, Scene, World

PATCH = 8  # pixels along a square that is one token, in CoIN-mini
COLOR_ID = {color: i + 1 for i, color in enumerate(COLORS)}


@cache
def names_of(world: World) -> dict[str, int]:
    """The names of all that a patch may show, numbered; 0 is nothing."""
    shapes, signs = (f"{c} {s}" for s in SHAPES for c in COLORS), (f"{word}!" for word in SIGNS)
    named = dict.fromkeys(["", *world.pictures, *shapes, *GENRES, *signs, *TITLES, *AUTHORS])
    return {name: number for number, name in enumerate(named)}


def patch_targets(scene: Scene, frame: tuple[int, int, int, int]) -> torch.Tensor:
    """What covers each square of a frame (left, top, right, bottom) of the picture padded to a square, row by row:
    [squares, 6], name, colour and box corners in grid units; -100 where there is none."""
    world, (left, top, right, bottom) = scene.world, frame
    names, side, grid, square = names_of(world), world.side, world.grid, PATCH * world.unit
    columns, rows = (right - left) // square, (bottom - top) // square
    dx, dy = (side - scene.size[0]) // 2, (side - scene.size[1]) // 2
    best = [(square * square // 4 - 1, 0, 0, -100, -100, -100, -100)] * (columns * rows)
    for thing in [] if scene.unclear else scene.things:
        x1, y1, x2, y2 = thing.box[0] + dx, thing.box[1] + dy, thing.box[2] + dx, thing.box[3] + dy
        name = f"{thing.name}!" if thing.kind == "sign" else thing.phrase if thing.kind == "shape" else thing.name
        color = COLOR_ID[thing.color] if thing.color else 0
        corners = [(v + grid // 2) // grid for v in (x1, y1, x2, y2)]
        for row in range((y1 - top) // square, math.ceil((y2 - top) / square)):
            for column in range((x1 - left) // square, math.ceil((x2 - left) / square)):
                x, y = left + column * square, top + row * square
                overlap = (min(x2, x + square) - max(x1, x)) * (min(y2, y + square) - max(y1, y))
                if overlap > best[row * columns + column][0]:
                    best[row * columns + column] = (overlap, names[name], color, *corners)
    return torch.tensor([b[1:] for b in best])
