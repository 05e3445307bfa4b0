"""Whatever a model says: every scorer gives three scores in [0, 1], and lenient is never below official."""

import random
from math import isfinite

import pytest

from data.answers import RULES, Answer, GQAAnswer, Options, Region, RuledAnswer
from data.benchmark import TaskSpec
from data.boxes import exact_box
from eval.tasks import SCORING
from eval.tasks.grounding import loose_box

WORDS = """
    a an the A B C D E F (B) C. d) yes no two 2 10 1,000 .5 -3 7.8125e-05 1e999 nan inf 0.2, [0.1, ] [ , . ... ; : ! ?
    ' " ’ ` dog dogs cat dont don’t couldn'tve o'clock red-bus Unanswerable <image> </s> \\ _ café İ ß ΣΑΣ ٣ ② 東京 😀
    BECAUSE: because Answer:
"""
PIECES = [*WORDS.split(), "The answer is B.", "The answer is ", "the answer is (C)"]
SPACES = (" ", " ", " ", "", "\n", "\t", ", ", "\u2028", "\x00", "\u00a0", "\ud800")


def words(generator, most: int = 6) -> str:
    return "".join(generator.choice(PIECES) + generator.choice(SPACES) for _ in range(generator.randrange(most + 1)))


def number(generator) -> str:
    return generator.choice(["0", "1", ".5", f"{generator.random():.3f}", f"{generator.random() * 1e-4:.3e}"])


def box(generator) -> str:
    return "[" + generator.choice([", ", ","]).join(number(generator) for _ in range(4)) + "]"


def reference(scoring: str, generator):
    if scoring in ("scienceqa", "choice"):
        choices = tuple(words(generator, 3) for _ in range(generator.randint(1, 5)))
        return Options(choices, generator.randrange(len(choices)))
    if scoring == "gqa":
        return GQAAnswer(words(generator, 2), True, True, None)
    if scoring in ("grounding", "box"):
        return Region(box(generator), generator.choice([1, 480, 640.0]))
    said = [words(generator, 2) for _ in range(generator.randint(1, 3))]
    if scoring in ("rouge", "exact", "caption"):
        return tuple(said)
    if scoring == "mllm_dcl":
        return RuledAnswer(said[0], generator.choice(RULES))
    people = tuple(generator.choice(said) for _ in range(10)) if generator.random() < 0.7 else ()
    return Answer(said[0], people if scoring != "textvqa" else people or (said[0],) * 10)


def answer(task, truth, generator) -> str:
    """Anything at all, or something near the truth."""
    if generator.random() < 0.4:
        return words(generator)
    if isinstance(truth, Options):
        near = generator.choice([*"ABCDE", *truth.choices])
        return generator.choice(["{}", "{}.", "({}) ", "The answer is {}.", "answer is: {}"]).format(near) + words(
            generator
        )
    if isinstance(truth, Region):
        return generator.choice([truth.answer, truth.answer[1:-1], truth.answer + ".", box(generator)])
    near = generator.choice(truth if isinstance(truth, tuple) else [truth.answer, *getattr(truth, "annotators", ())])
    return generator.choice([str, str.upper, str.strip])(near) + generator.choice(["", ".", " ", "\n", "s"])


@pytest.mark.parametrize("scoring", SCORING)
def test_three_scores_of_any_answer(scoring):
    generator = random.Random(scoring)
    task = SCORING[scoring](TaskSpec("T", scoring, ("T",)))
    right = 0
    truths = [reference(scoring, generator) for _ in range(2000)]
    texts = [answer(task, truth, generator) for truth in truths]
    among = task.official_scores(texts, truths, []) if task.joint else []
    for place, (text, truth) in enumerate(zip(texts, truths, strict=True)):
        if task.joint:
            official = legacy = lenient = among[place]
        else:
            official, legacy, lenient = (rule(text, truth) for rule in (task.official, task.legacy, task.lenient))
        assert 0 <= official <= lenient <= 1 and 0 <= legacy <= 1, (text, truth)
        assert task.has_form(text, truth) in (True, False)
        right += official > 0
    assert 50 < right < 1950, "both sides are met"


def test_boxes_that_are_read_are_finite():
    generator = random.Random(0)
    read = 0
    for _ in range(2000):
        text = generator.choice([words(generator), box(generator), box(generator).replace("0", "1e999", 1)])
        exact, loose = exact_box(text), loose_box(text)
        assert all(isfinite(side) for found in (exact, loose) if found for side in found)
        assert exact is None or loose == exact
        read += exact is not None
    assert read > 300
