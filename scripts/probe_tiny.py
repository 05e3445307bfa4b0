"""Probes what a base can do before any LoRA: `python -m scripts.probe_tiny [--base DIR] [--world small]`.

Asks fresh questions of the pre-training corpus, one skill at a time, and compares the answers: a choice by its letter,
a place by IoU > 0.5, everything else word for word. A second column has the share of answers that hold the words which
tell a right answer from the others of its skill, in whatever sentence: a frozen language model is not taught the
corpus's own. A base without pictures is asked the simple tasks that come before Dialog-mini. Prints percentages; --json
FILE also writes those of the first column.
"""

import argparse
import json
import random
import re
import tempfile
from collections import Counter
from pathlib import Path

from data.mini import small
from data.mini.dialogues import FIRST
from data.mini.skills import questions
from data.mini.world import MINI
from data.prepare.instructions import prompt
from eval.tasks.grounding import intersection_over_union
from llava.backbones import load_base
from llava.generate import generate_answers
from llava.greedy import Decoder

SHARED = 0.6  # of a skill's answers: what more of them have is the sentence around the answer


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


def words_of(text: str) -> set[str]:
    """In lower case, without signs."""
    return set(re.findall(r"[\w.]*\w", text.lower()))


def telling(expected: list[str]) -> list[set[str]]:
    """Of each of a skill's right answers the words that at most SHARED of them have; all where that leaves none."""
    every = [words_of(text) for text in expected]
    counts = Counter(word for words in every for word in words)
    own = [{word for word in words if counts[word] <= SHARED * len(every)} for words in every]
    return [few or words for few, words in zip(own, every, strict=True)]


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
    parser.add_argument("--world", choices=("mini", "small"), default="mini", help="what the questions are about")
    parser.add_argument("--per-skill", type=int, default=200)
    parser.add_argument("--seed", type=int, default=987654321, help="not the seed of pre-training")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model, backbone = load_base(args.base)
    with tempfile.TemporaryDirectory() as folder:
        if backbone.template.placeholder is None:
            cases = text_questions(args.per_skill, args.seed)
        else:
            world = MINI if args.world == "mini" else small.world_of()
            cases = questions(args.per_skill, Path(folder), args.seed, world)
        texts, _, images = zip(*(case for rows in cases.values() for case in rows), strict=True)
        answers = iter(generate_answers(Decoder(model, backbone, 40), texts, images, 64))
    scores = {}
    for skill, rows in cases.items():
        given = [next(answers) for _ in rows]
        scores[skill] = 100 * sum(right(row[1], text) for row, text in zip(rows, given, strict=True)) / len(rows)
        words = telling([row[1] for row in rows])
        held = 100 * sum(own <= words_of(text) for own, text in zip(words, given, strict=True)) / len(rows)
        print(f"{skill:30s}{scores[skill]:6.1f}{held:6.1f}   e.g. {rows[0][1]!r}: {given[0]!r}")
    if args.json:
        args.json.write_text(json.dumps(scores, indent=1) + "\n")


if __name__ == "__main__":
    main()
