"""How things of an unsplit source become training, development and test records."""

import random
from collections.abc import Iterable
from itertools import zip_longest

SHARES = {"train": 0.7, "dev": 0.1, "test": 0.2}
FEWEST = 5  # items, so that every split has one


def shared_out(items: list, rng: random.Random) -> dict[str, list]:
    """Every item in one split, by SHARES; of five items or more at least one in each."""
    items, found, reached = rng.sample(items, len(items)), {}, 0.0
    begin, left = 0, len(SHARES)
    for split, share in SHARES.items():
        reached, left = reached + share, left - 1
        end = round(reached * len(items))
        if len(items) >= FEWEST:
            end = min(max(end, begin + 1), len(items) - left)
        found[split], begin = items[begin:end], end
    return found


def in_turn(classes: Iterable[list]) -> list:
    """The first of each class, the second of each class, and so on, so that the first of them are of all."""
    return [found for row in zip_longest(*classes) for found in row if found is not None]
