"""How things of an unsplit source become training, development and test records."""

import random
from collections.abc import Iterable
from itertools import zip_longest

SHARES = {"train": 0.7, "dev": 0.1, "test": 0.2}


def shared_out(items: list, rng: random.Random) -> dict[str, list]:
    """Every item in one split, by SHARES."""
    items, found, begin = rng.sample(items, len(items)), {}, 0.0
    for split, share in SHARES.items():
        end = begin + share
        found[split] = items[round(begin * len(items)) : round(end * len(items))]
        begin = end
    return found


def in_turn(classes: Iterable[list]) -> list:
    """The first of each class, the second of each class, and so on, so that the first of them are of all."""
    return [found for row in zip_longest(*classes) for found in row if found is not None]
