"""CoIN-small, CoIN-mini's eight tasks in a world of real pictures and words: `python -m data.mini.small [--out DIR]
[--seed N]`.

    objects   Tux Paint's stamps (Debian's tuxpaint-stamps-default, GPL-2): drawings and photographs of animals, food,
              plants, vehicles and household things, several of some; named by the last words of their descriptions
              that WordNet knows as a thing of that kind
    kinds     WordNet's (Debian's wordnet-base): of objects, and, where a question has no picture, of other nouns that
              WordNet's authors met in text
    words     in four fonts that matplotlib ships

Pictures are 96 pixels along the longer side, every layout that of CoIN-mini at twice its size; schema, instructions and
scoring are CoIN's. Both packages lie under /usr/share after `apt install`, or where scripts/make_small_llava.sh unpacks
them; what is made of the stamps is not to be passed on under another licence than theirs. The whole is a function of
the packages and the seed.
"""

from collections import defaultdict
from functools import cache, partial
from pathlib import Path

from PIL import Image

from data.mini.build import fill
from data.mini.folder import command, is_version, make
from data.mini.wordnet import SOURCE as WORDNET
from data.mini.wordnet import Nouns
from data.mini.world import SIDE, World, font_file, squared
from data.prepare.stamps import SOURCE as STAMPS
from data.prepare.stamps import stamps_in

NAME, VERSION = "CoIN-small", 1
SIZES = {"train": 400, "dev": 100, "test": 125}
UNIT = 2
# Of each kind of stamp, what its thing has to be in WordNet, by its most frequent senses, and the kinds that are asked.
ROOTS = {
    "animal": ("animal",),
    "food": ("food", "edible fruit", "vegetable"),
    "plant": ("plant life",),
    "vehicle": ("vehicle",),
    "household thing": ("artifact",),
}
ASKED = {
    "animal": ("bird", "mammal", "insect", "fish"),
    "food": ("fruit", "vegetable"),
    "plant": ("flower",),
    "vehicle": ("vehicle",),
    "household thing": ("tool",),
}
KINDS = tuple(kind for kinds in ASKED.values() for kind in kinds)
SETS = (("animal", "food"), ("household thing",), ("plant", "vehicle"))  # portraits, household, scenery
SENSES = 3  # of a word, that count
MET = 2  # times that a noun without a picture was met in WordNet's texts, at least
FONTS = ("DejaVuSansMono-Bold", "DejaVuSans", "STIXGeneral", "STIXGeneralItalic")


@cache
def picture_of(path: Path) -> Image.Image:
    """A stamp as an RGBA square, no larger than it is ever shown."""
    with Image.open(path) as picture:
        square = squared(picture.convert("RGBA"))
    square.thumbnail((SIDE * UNIT, SIDE * UNIT))
    return square


def kinds_of(nouns: Nouns, word: str, kinds: tuple[str, ...]) -> list[str]:
    """Which of the kinds a word is, by one of its most frequent senses."""
    senses = nouns.senses.get(word, [])[:SENSES]
    above = set().union(*(nouns.above(sense) for sense in senses)) if senses else set()
    return [kind for kind in kinds if nouns.senses[kind][0] in above]


def name_of(nouns: Nouns, description: str, roots: tuple[str, ...]) -> str | None:
    """The one or two last words that name a thing of one of the roots; None without them, or if they are a kind."""
    words = description.replace("“", "").replace("”", "").split()
    for count in (2, 1):
        name = " ".join(words[-count:])
        if len(words) >= count and kinds_of(nouns, name, roots) and name not in KINDS:
            return name
    return None


def world_of(stamps: Path = STAMPS, wordnet: Path = WORDNET) -> World:
    """The world of CoIN-small. Raises FileNotFoundError without stamps or WordNet."""
    nouns, pictures, kind_of = Nouns(wordnet), defaultdict(list), {}
    for stamp in stamps_in(stamps):
        name = name_of(nouns, stamp.name, ROOTS[stamp.kind])
        if name and kind_of.setdefault(name, stamp.kind) == stamp.kind:
            pictures[name].append(stamp.path)
    sets = [tuple(name for name, kind in kind_of.items() if kind in kinds) for kinds in SETS]
    known = {name: kinds_of(nouns, name, ASKED[kind]) for name, kind in kind_of.items()}
    kinds = {name: found[0] for name, found in known.items() if len(found) == 1}
    lore = dict(kinds)
    for word in sorted(word for word, times in nouns.met.items() if times >= MET and word.isalpha()):
        found = kinds_of(nouns, word, KINDS)
        if len(found) == 1 and found[0] != word and nouns.is_kind(word, found[0]):
            lore.setdefault(word, found[0])
    return World(
        unit=UNIT,
        portraits=sets[0],
        household=sets[1],
        scenery=sets[2],
        kinds=kinds,
        lore=lore,
        pictures=dict(pictures),
        load=picture_of,
        fonts=tuple(map(font_file, FONTS)),
    )


def is_built(root: Path) -> bool:
    """Whether `root` holds this version, of whatever seed."""
    return is_version(root, NAME, VERSION)


def build(root: Path, seed: int = 0, stamps: Path = STAMPS, wordnet: Path = WORDNET) -> bool:
    """As `data.mini.folder.make`. Raises FileNotFoundError without stamps or WordNet."""
    world = world_of(stamps, wordnet)
    described = {
        "benchmark": NAME,
        "version": VERSION,
        "seed": seed,
        "samples": SIZES,
        "objects": len(world.pictures),
        "stamps": "tuxpaint-stamps-default, GPL-2",
    }
    return make(root, described, partial(fill, seed=seed, sizes=SIZES, world=world, name=NAME))


if __name__ == "__main__":
    command(__doc__.splitlines()[0].partition(":")[0], build, Path("data/coin_small"))
