"""What a tiny base learns before any task, as test sets: `python -m data.mini.skills [--out DIR] [--seed N]`.

A benchmark of test sets alone, one a skill of the pre-training corpus (data/mini/corpus.py), with fresh questions as
they are asked there, answered in the same sentences. A recipe calls it `retained`: what of it stays, stage after stage,
is what training did to the base. Pointing is not among them, whose answers are places and not words.
"""

import json
import random
import re
from collections import defaultdict
from functools import partial
from pathlib import Path

import yaml

from data.mini import corpus
from data.mini.folder import command, is_version, make
from data.mini.world import MINI, World, draw

NAME, VERSION = "CoIN-mini's skills", 1
PER_SKILL = 60
SEED = 987654321  # not that of pre-training
SKILLS = [  # (skill, kind of scene or None, what its questions begin with)
    ("name an object", "portrait", r"(Tell me what you see|Describe this)"),
    ("name it in a bad photograph", "household", r""),
    ("choose what is shown", "portrait", r"(Please find|Here is a list)(?!.*kind)"),
    ("choose its kind", "portrait", r".*To which kind"),
    ("choose without a picture", None, r"(Please find|Here is a list|To which kind)"),
    ("point at a thing", "group", r"(Where is|Point at|Tell me where)"),
    ("name a thing in relation", "group", r"(Name the thing|Tell me the thing|Which thing)"),
    ("tell if a relation holds", "group", r"(?!Name|Which|Tell me the|Tell me how).*(left of|right of|above|below)"),
    ("compare sizes", "group", r"Compare the (?!colors)"),
    ("compare colors", "group", r".*(colors of|one color|match in color)"),
    ("name a color or shape", "group", r"(Tell me|Name|Give me) the (color|shape)"),
    (
        "tell if a thing is there",
        None,
        r"(Can you see|Do you see|Tell me if an? .* is shown|Does this show|I would like)",
    ),
    ("count", "count", r"(Count|Tell me the number|Give me the number)"),
    ("read a sign", "sign", r"(Read|Tell me the word|Give me the word)"),
    ("read a title", "cover", r"(Read|Tell me) the title"),
    ("read an author", "cover", r"(.*who wrote it|(Name|Tell me) the author)"),
    ("tell the genre", "cover", r"(Tell me which shelf|(Name|Tell me) the genre)"),
    ("tell if the genre is", "cover", r"(Tell me if|Does|Would|Am I)"),
]


def skill_of(kind: str | None, question: str) -> str | None:
    """The skill that a question about a scene of this kind asks for."""
    for skill, scene, pattern in SKILLS:
        if (scene == kind or (scene is None and skill.startswith("tell"))) and re.match(pattern, question, re.S):
            return skill
    return None


def questions(
    per_skill: int, folder: Path, seed: int, world: World = MINI
) -> dict[str, list[tuple[str, str, Path | None]]]:
    """`per_skill` (question, expected answer, picture) of every skill in a world, pictures saved into `folder`."""
    rng, found, names = random.Random(seed), defaultdict(list), [skill for skill, *_ in SKILLS]
    while any(len(found[name]) < per_skill for name in names):
        scene, turns = corpus.conversation(rng, 9, world)
        path = None
        cases = [(scene.kind, turn) for turn in turns] + [(None, turn) for turn in corpus.text_only(rng, world)]
        for kind, (question, answer) in cases:
            skill = skill_of(kind, question)
            if skill and len(found[skill]) < per_skill:
                if kind and path is None:
                    path = folder / f"{rng.randrange(2**40)}.png"
                    draw(scene).save(path)
                found[skill].append((f"<image>\n{question}" if kind else question, answer, path if kind else None))
    return {name: found[name] for name in names}


def both(answer: str) -> list[str]:
    """The sentences in which the corpus gives an answer: a choice has two."""
    if found := re.fullmatch(r"It is choice ([A-D]), the (.*)\.|I take ([A-D]) because of the (.*)\.", answer):
        letter, thing = (one or other for one, other in (found.groups()[::2], found.groups()[1::2]))
        return [f"It is choice {letter}, the {thing}.", f"I take {letter} because of the {thing}."]
    return [answer]


def is_built(root: Path) -> bool:
    """Whether `root` holds this version, of whatever seed."""
    return is_version(root, NAME, VERSION)


def build(root: Path, seed: int = SEED) -> bool:
    """As `data.mini.folder.make`."""
    described = {"benchmark": NAME, "version": VERSION, "seed": seed, "questions": PER_SKILL}
    return make(root, described, partial(fill, seed=seed))


def fill(root: Path, seed: int, world: World = MINI, name: str = NAME, per_skill: int | None = None) -> None:
    """Writes the benchmark of a world into an empty folder, with PER_SKILL questions a skill or another number."""
    (root / "pictures").mkdir()
    found = questions(per_skill or PER_SKILL, root / "pictures", seed, world)
    del found["point at a thing"]
    tasks = {skill: {"folders": [skill.replace(" ", "-")], "scoring": "exact", "max_new_tokens": 40} for skill in found}
    spec = {"name": name, "images": "pictures", "tasks": tasks}
    (root / "benchmark.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    for skill, asked in found.items():
        records = [
            {
                "question_id": f"{skill} {number}",
                **({"image": picture.name} if picture else {}),
                "text": question.removeprefix("<image>\n"),
                "answers": both(answer),
            }
            for number, (question, answer, picture) in enumerate(asked)
        ]
        folder = root / tasks[skill]["folders"][0]
        folder.mkdir()
        (folder / "test.json").write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    command(__doc__.splitlines()[0], build, Path("data/coin_mini_skills"))
