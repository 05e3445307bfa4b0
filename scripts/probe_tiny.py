"""Probes what a tiny base can do before any LoRA: `python -m scripts.probe_tiny [--base DIR] [--per-skill N]`.

Asks fresh questions of the pre-training corpus, one skill at a time, and compares the answers: a choice by its letter,
a place by IoU > 0.5, everything else word for word. A base without pictures is asked the simple tasks that come before
Dialog-mini. Prints accuracies in percent; --json FILE also writes them.
"""

import argparse
import json
import random
import re
import tempfile
from collections import defaultdict
from pathlib import Path

from data.mini import corpus
from data.mini.dialogues import FIRST
from data.mini.world import draw
from data.prepare.instructions import prompt
from eval.tasks.grounding import intersection_over_union
from llava.backbones import load_base
from llava.generate import generate_answers
from llava.greedy import Decoder

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


def right(expected: str, given: str) -> bool:
    """Whether an answer is right: a place by IoU, a choice by its letter, the rest word for word."""
    boxes = [[float(v) for v in re.findall(r"\d\.\d\d", text)] for text in (expected, given)]
    if boxes[0]:
        (x1, x2, y1, y2), other = boxes[0], boxes[1]
        return (
            len(other) == 4
            and intersection_over_union((x1, y1, x2, y2), (other[0], other[2], other[1], other[3])) > 0.5
        )
    letters = [re.findall(r"\b[A-D]\b", text) for text in (expected, given)]
    return letters[0] == letters[1] if letters[0] else expected == given


def questions(per_skill: int, folder: Path, seed: int) -> dict[str, list[tuple[str, str, Path | None]]]:
    """`per_skill` (question, expected answer, picture) of every skill, pictures saved into `folder`."""
    rng, found, names = random.Random(seed), defaultdict(list), [skill for skill, *_ in SKILLS]
    while any(len(found[name]) < per_skill for name in names):
        scene, turns = corpus.conversation(rng, 9)
        path = None
        cases = [(scene.kind, turn) for turn in turns] + [(None, turn) for turn in corpus.text_only(rng)]
        for kind, (question, answer) in cases:
            skill = skill_of(kind, question)
            if skill and len(found[skill]) < per_skill:
                if kind and path is None:
                    path = folder / f"{rng.randrange(2**40)}.png"
                    draw(scene).save(path)
                found[skill].append((f"<image>\n{question}" if kind else question, answer, path if kind else None))
    return {name: found[name] for name in names}


def text_questions(per_skill: int, seed: int) -> dict[str, list[tuple[str, str, None]]]:
    """`per_skill` (question, expected answer, None) of every simple task."""
    rng, found = random.Random(seed), {}
    for name, task in FIRST.items():
        made = [task.make(rng) for _ in range(per_skill)]
        found[name] = [(prompt(rng.choice(task.definitions), [], asked), said, None) for asked, said in made]
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, default=Path("checkpoints/tiny-llava"))
    parser.add_argument("--per-skill", type=int, default=200)
    parser.add_argument("--seed", type=int, default=987654321, help="not the seed of pre-training")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model, backbone = load_base(args.base)
    with tempfile.TemporaryDirectory() as folder:
        if backbone.template.placeholder is None:
            cases = text_questions(args.per_skill, args.seed)
        else:
            cases = questions(args.per_skill, Path(folder), args.seed)
        texts, _, images = zip(*(case for rows in cases.values() for case in rows), strict=True)
        answers = iter(generate_answers(Decoder(model, backbone, 40), texts, images, 64))
    scores = {}
    for skill, rows in cases.items():
        given = [next(answers) for _ in rows]
        scores[skill] = 100 * sum(right(row[1], text) for row, text in zip(rows, given, strict=True)) / len(rows)
        print(f"{skill:30s}{scores[skill]:6.1f}   e.g. {rows[0][1]!r}: {given[0]!r}")
    if args.json:
        args.json.write_text(json.dumps(scores, indent=1) + "\n")


if __name__ == "__main__":
    main()
