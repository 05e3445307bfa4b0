"""What the small base can do before any task, as test sets: `python -m data.mini.small_skills [--out DIR] [--seed N]`.

The skills of data/mini/skills.py in CoIN-small's world (data/mini/small.py), and a text, definitions.txt, that tells
what stays of the language model: WordNet's glosses of the nouns that its authors met most often. A recipe calls it
`retained`.
"""

from functools import partial
from pathlib import Path

from data.mini import skills, small
from data.mini.folder import command, is_version, make
from data.mini.wordnet import Nouns

NAME, VERSION = "CoIN-small's skills", 2
PER_SKILL = 10  # an answer of the small base takes some fifty times as long as one of tiny-llava
DEFINITIONS = 200


def definitions(nouns: Nouns) -> str:
    """A line a noun, without the examples that follow some glosses."""
    words = [word for word in nouns.met if word.isalpha() and word in nouns.senses]
    words = sorted(words, key=lambda word: (-nouns.met[word], word))[:DEFINITIONS]
    return "".join(
        f"{word.capitalize()}: {nouns.glosses[nouns.senses[word][0]].partition('; ')[0]}.\n" for word in words
    )


def is_built(root: Path) -> bool:
    """Whether `root` holds this version, of whatever seed."""
    return is_version(root, NAME, VERSION)


def build(root: Path, seed: int = skills.SEED) -> bool:
    """As `data.mini.folder.make`. Raises FileNotFoundError without stamps or WordNet."""
    world, nouns = small.world_of(), Nouns()
    described = {"benchmark": NAME, "version": VERSION, "seed": seed, "questions": PER_SKILL}
    return make(root, described, partial(fill, seed=seed, world=world, nouns=nouns))


def fill(root: Path, seed: int, world: small.World, nouns: Nouns) -> None:
    """Writes the benchmark into an empty folder."""
    skills.fill(root, seed, world, NAME, PER_SKILL)
    (root / "definitions.txt").write_text(definitions(nouns), encoding="utf-8")


if __name__ == "__main__":
    command(__doc__.splitlines()[0].partition(":")[0], build, Path("data/coin_small_skills"))
