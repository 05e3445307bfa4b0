"""Multiple choice: the answer is an option letter, in one's own benchmark the `answer` of the question file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from eval.tasks.base import Task, field
from eval.tasks.words import forgiving, normalise

LETTERS = "ABCDE"
WRONG = -1
# "B", "B.", "(B)", "B. text", and ScienceQA's own "The answer is B."
_LETTER_FORMS = (
    re.compile(r"\(?([A-E])\)?[.):]?", re.IGNORECASE),
    re.compile(r"\(?([A-E])[.):]\s.*", re.DOTALL),
    re.compile(r"(?:the )?answer is:? \(?([A-E])\)?\.?", re.IGNORECASE),
)


@dataclass(frozen=True)
class Problem:
    """The options of a question and the index of the right one."""

    choices: tuple[str, ...]
    answer: int


class Choice(Task):
    """An option letter, as ScienceQA's; `choices`, the options' texts, is optional and lets `lenient` forgive them."""

    def reference_of(self, record: Mapping[str, Any], where: str) -> Problem:
        letter = field(record, "answer", str, where)
        choices = field(record, "choices", list, where) if "choices" in record else [""] * len(LETTERS)
        if letter not in tuple(LETTERS[: len(choices)]):
            raise ValueError(f"{where}: answer '{letter}' is no letter of its {len(choices)} options")
        return Problem(tuple(map(str, choices)), LETTERS.index(letter))

    def official(self, text: str, reference: Problem) -> float:
        return float(stated_option(text, reference) == reference.answer)

    def legacy(self, text: str, reference: Problem) -> float:
        return float(legacy_option(text, reference) == reference.answer)

    def lenient(self, text: str, reference: Problem) -> float:
        return float(meant_option(text, reference) == reference.answer)

    def has_form(self, text: str, reference: Problem) -> bool:
        return text.strip() in LETTERS[: len(reference.choices)] and len(text.strip()) == 1


def option_index(letter: str, problem: Problem) -> int:
    """Index of an option letter, WRONG if this problem has no such option."""
    index = LETTERS.find(letter.upper())
    return index if index < len(problem.choices) else WRONG


def stated_option(text: str, problem: Problem) -> int:
    """The option an answer states in one of the usual forms, else WRONG."""
    for form in _LETTER_FORMS:
        if found := form.fullmatch(text.strip()):
            return option_index(found.group(1), problem)
    return WRONG


def legacy_option(text: str, problem: Problem) -> int:
    """The released evaluator's reading: a letter, "B. ...", else the first single word character standing
    alone, whatever it is: the article of "a dog" is option A, a digit is wrong."""
    if text in tuple(LETTERS) or (len(text) >= 3 and text[0] in LETTERS and text[1:3] == ". "):
        return option_index(text[0], problem)
    alone = re.search(r"\b\w\b", text)
    return option_index(alone.group(), problem) if alone else WRONG


def meant_option(text: str, problem: Problem) -> int:
    """The option an answer states, or names by its text, or the only capital letter standing alone in it."""
    stated = stated_option(text, problem)
    if stated != WRONG:
        return stated
    equal = [i for i, choice in enumerate(problem.choices) if normalise(choice) == normalise(text) != ""]
    inside = [i for i, choice in enumerate(problem.choices) if forgiving(text, choice)]
    letters = set(re.findall(r"(?<![\w'])[A-E](?![\w'])", text))
    if equal or len(inside) == 1:
        return (equal or inside)[0]
    return option_index(letters.pop(), problem) if len(letters) == 1 else WRONG
