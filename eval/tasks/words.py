"""Comparing words: what the evaluators of VQAv2, VizWiz and TextVQA share, TextVQA's rule, a forgiving comparison.

TextVQA's evaluator puts the prediction and every reference into one normal form. VQAv2's and VizWiz's, which are in
files of their own, do not always.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache

_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {word: str(digit) for digit, word in enumerate(_DIGITS)} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# The evaluators restore one forgotten apostrophe; which words it knows is part of the metric.
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
    he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've
    mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't
    shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's
    something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've
    they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
    where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word for word in _CONTRACTED.split() for i in range(len(word)) if word[i] == "'"
} | {"somebody'd": "somebodyd"}  # the one entry the benchmark's table holds the wrong way round
# The last of these stands in place of a flag, so that only so many full stops of an answer go.
_MAX_FULL_STOPS = int(re.UNICODE)


def without_punctuation(text: str) -> str:
    """The VQA evaluators' punctuation rule: a mark that stands beside a space anywhere in the text goes, for any other
    there is a space; where a comma stands between digits all marks go. Full stops go unless a digit follows."""
    numbers = re.search(r"\d,\d", text)
    cleaned = text
    for mark in _PUNCTUATION:
        goes = numbers or f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if goes else " ")
    return re.sub(r"\.(?!\d)", "", cleaned, count=_MAX_FULL_STOPS)


def plain_words(text: str, contractions: Mapping[str, str]) -> str:
    """The VQA evaluators' word rule: lower case, digits for number words, no articles, `contractions` restored."""
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(contractions.get(word, word) for word in words if word not in _ARTICLES)


@lru_cache(maxsize=100_000)
def normalise(text: str) -> str:
    """TextVQA's normal form: case, punctuation, number words, articles, contractions."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return plain_words(without_punctuation(text.replace("\n", " ").replace("\t", " ")), CONTRACTIONS)


def agreement(agrees: Sequence[bool]) -> float:
    """VQA accuracy: over the ten sets that leave one annotator out, the mean of min(1, agreeing / 3)."""
    return sum(min(1.0, (sum(agrees) - own) / 3) for own in agrees) / len(agrees)


def consensus(prediction: str, answers: Sequence[str]) -> float:
    """TextVQA's accuracy: the agreement of normal forms."""
    return agreement([normalise(answer) == normalise(prediction) for answer in answers])


def same(prediction: str, reference: str) -> bool:
    """Equal but for case and surrounding space."""
    return prediction.strip().lower() == reference.strip().lower()


def forgiving(prediction: str, reference: str) -> bool:
    """Equal after normalising, or the reference stands as whole words inside the prediction.

    For yes and no the first of the two in the prediction decides: "no, yes would be wrong" is a no.
    """
    if same(prediction, reference):
        return True
    said, wanted = normalise(prediction), normalise(reference)
    if wanted in ("yes", "no"):
        return next((word for word in said.split() if word in ("yes", "no")), "") == wanted
    return bool(wanted) and f" {wanted} " in f" {said} "


def lenient_consensus(prediction: str, answers: Sequence[str]) -> float:
    """The best consensus among the annotators' answers the prediction can be forgiven for."""
    forgiven = [consensus(answer, answers) for answer in set(answers) if forgiving(prediction, answer)]
    return max([consensus(prediction, answers), *forgiven])


def is_phrase(text: str, max_words: int) -> bool:
    """One line of 1..max_words words without a final full stop, and neither a lone option letter nor a box:
    the forms of ScienceQA and Grounding are what a model that forgot this task's form falls into."""
    words = text.split()
    other_form = re.fullmatch(r"[A-E]", text.strip()) or "[" in text
    return 0 < len(words) <= max_words and "\n" not in text.strip() and not words[-1].endswith(".") and not other_form
