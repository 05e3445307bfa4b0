"""ScienceQA: multiple choice, the answer is an option letter."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.tasks.base import Task, field, last_answers_by_id, one_of, read_json
from eval.tasks.words import forgiving, normalise

LETTERS = "ABCDE"
WRONG = -1
_SPLIT_NAMES = {"test": "test", "dev": "val"}
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


class ScienceQA(Task):
    """References: problems.json for the pids of pid_splits.json, the whole split."""

    name = "ScienceQA"
    max_new_tokens = 1024
    legacy_missing = 0.0  # alone among the released evaluators this one counts missing answers as wrong

    def load_references(
        self, data_root: Path | str, instructions: str = "original", split: str = "test"
    ) -> dict[str, Problem]:
        folder = Path(data_root) / "cl_dataset" / "ScienceQA"
        splits, key = folder / "pid_splits.json", _SPLIT_NAMES[one_of(split, _SPLIT_NAMES, "split")]
        pids = field(read_json(splits, dict), key, list, str(splits))
        problems = read_json(folder / "problems.json", dict)
        references = {}
        for pid in map(str, pids):
            where = f"{folder / 'problems.json'}, problem {pid}"
            record = field(problems, pid, dict, where)
            choices, answer = field(record, "choices", list, where), field(record, "answer", int, where)
            if not 0 <= answer < len(choices) <= len(LETTERS):
                raise ValueError(
                    f"{where}: answer {answer} of {len(choices)} choices; 1 to {len(LETTERS)} can be asked"
                )
            references[pid] = Problem(tuple(choices), answer)
        return references

    def official(self, text: str, reference: Problem) -> float:
        return float(stated_option(text, reference) == reference.answer)

    def legacy(self, text: str, reference: Problem) -> float:
        return float(legacy_option(text, reference) == reference.answer)

    def lenient(self, text: str, reference: Problem) -> float:
        return float(meant_option(text, reference) == reference.answer)

    def has_form(self, text: str, reference: Problem) -> bool:
        return text.strip() in LETTERS[: len(reference.choices)] and len(text.strip()) == 1

    def legacy_scores(self, rows: Sequence[Mapping[str, Any]], references: Mapping[str, Problem]) -> list[float | None]:
        return last_answers_by_id(self, rows, references)

    def legacy_accuracy(self, scores: Sequence[float | None], references: Mapping[str, Problem]) -> float:
        return sum(score for score in scores if score is not None) / len(references)

    def legacy_report(
        self,
        rows: Sequence[Mapping[str, Any]],
        scores: Sequence[float | None],
        references: Mapping[str, Problem],
    ) -> dict[str, float]:
        """Unrounded: the released evaluator writes its accuracy to a JSON file."""
        return {"Samples": len(references), "Accuracy": 100 * self.legacy_accuracy(scores, references)}


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
