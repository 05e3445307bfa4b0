"""Multiple choice: the answer is an option letter, in one's own benchmark the `answer` of the question file."""

from __future__ import annotations

import re

from data.answers import Options
from data.references import LETTERS, ChoiceFiles
from eval.tasks.base import Task
from eval.tasks.words import forgiving, normalise

WRONG = -1
# ScienceQA's own way to find the option (run_gpt3.py, github.com/lupantech/ScienceQA): any character ends it.
_ANSWER_IS = re.compile(r"The answer is ([A-Z]).")
# The same said in other words, as a capital letter standing alone.
_LOOSE_ANSWER_IS = re.compile(r"(?i:\banswer(?: is)?):?\s*\(?([A-E])(?![\w'])")
# "B", "B.", "(B)", "B. text", "the answer is: (B)"
_LETTER_FORMS = (
    re.compile(r"\(?([A-E])\)?[.):]?", re.IGNORECASE),
    re.compile(r"\(?([A-E])[.):]\s.*", re.DOTALL),
    re.compile(r"(?:the )?answer is:? \(?([A-E])\)?\.?", re.IGNORECASE),
)


class MultipleChoice(ChoiceFiles, Task):
    """An option letter, as ScienceQA's; `choices`, the options' texts, is optional and lets `lenient` forgive them."""

    def official(self, text: str, reference: Options) -> float:
        return float(stated_option(text, reference) == reference.answer)

    def legacy(self, text: str, reference: Options) -> float:
        return float(legacy_option(text, reference) == reference.answer)

    def lenient(self, text: str, reference: Options) -> float:
        return float(meant_option(text, reference) == reference.answer)

    def right_answer(self, reference: Options) -> str:
        return f"{LETTERS[reference.answer]}. {reference.choices[reference.answer]}".removesuffix(". ")

    def has_form(self, text: str, reference: Options) -> bool:
        return text.strip() in LETTERS[: len(reference.choices)] and len(text.strip()) == 1


def option_index(letter: str, options: Options) -> int:
    """Index of an option letter, WRONG if there is no such option."""
    index = LETTERS.find(letter.upper())
    return index if index < len(options.choices) else WRONG


def stated_option(text: str, options: Options) -> int:
    """The option an answer states, else WRONG: where "The answer is X." stands once, X, as the benchmark itself reads
    it (and if it stands more than once, nothing); else an answer that is a letter in one of the usual forms."""
    text = text.strip()
    if found := _ANSWER_IS.findall(text):
        return option_index(found[0], options) if len(found) == 1 else WRONG
    for form in _LETTER_FORMS:
        if letter := form.fullmatch(text):
            return option_index(letter.group(1), options)
    return WRONG


def legacy_option(text: str, options: Options) -> int:
    """The released evaluator's reading: a letter, "B. ...", else the first single word character standing
    alone, whatever it is: the article of "a dog" is option A, a digit is wrong."""
    if text in tuple(LETTERS) or (len(text) >= 3 and text[0] in LETTERS and text[1:3] == ". "):
        return option_index(text[0], options)
    alone = re.search(r"\b\w\b", text)
    return option_index(alone.group(), options) if alone else WRONG


def meant_option(text: str, options: Options) -> int:
    """The option an answer states, or is the text of, or names: in front of its reason if it has one, else anywhere."""
    stated = stated_option(text, options)
    if stated != WRONG:
        return stated
    equal = [i for i, choice in enumerate(options.choices) if normalise(choice) == normalise(text) != ""]
    if equal:
        return equal[0]
    in_front = re.split(r"\bbecause\b", text, maxsplit=1, flags=re.IGNORECASE)[0]
    named = (named_option(part, options) for part in (in_front, text))
    return next((option for option in named if option != WRONG), WRONG)


def named_option(text: str, options: Options) -> int:
    """The one option that a text gives as the answer, or whose text it holds, or whose capital letter stands alone."""
    stated = stated_option(text, options)
    if stated != WRONG:
        return stated
    announced = set(_LOOSE_ANSWER_IS.findall(text))
    if len(announced) == 1:
        return option_index(announced.pop(), options)
    inside = [i for i, choice in enumerate(options.choices) if normalise(choice) and forgiving(text, choice)]
    if len(inside) == 1:
        return inside[0]
    letters = set(re.findall(r"(?<![\w'])[A-E](?![\w'])", text))
    return option_index(letters.pop(), options) if len(letters) == 1 else WRONG
