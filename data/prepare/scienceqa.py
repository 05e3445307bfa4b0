"""ScienceQA: problems.json and pid_splits.json; pictures in ScienceQA/images/<split>/<pid>/.

    Context: <hint>
    <question>
    A. <choice>
    B. <choice>

The hint is the text that a question is about; its line stands in front, as in LLaVA-1.5's evaluation, and is left out
where there is no hint. The answer is the option's letter.
"""

from typing import Any

from data.jsonfile import field
from data.prepare.source import Record, Source, text
from data.references import LETTERS

ANNOTATIONS = ("problems.json", "pid_splits.json")


def read(source: Source) -> tuple[list[Record], list[Record]]:
    """(training, test) records of the official splits of these names."""
    problems = source.json("problems.json", dict, drop={"lecture", "solution"})
    splits = source.json("pid_splits.json", dict)
    return _split(source, problems, splits, "train"), _split(source, problems, splits, "test")


def _split(source: Source, problems: dict, splits: dict, split: str) -> list[Record]:
    path, records = source.folder / "problems.json", []
    for pid in map(str, field(splits, split, list, str(source.folder / "pid_splits.json"))):
        where = f"{path}, record {pid}"
        problem = field(problems, pid, dict, where)
        question, choices, answer = _asked(problem, where)
        image = problem.get("image")
        if image is not None:
            image = f"ScienceQA/images/{split}/{pid}/{text(problem, 'image', where)}"
        if source.answered(question, LETTERS[answer]):
            options = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
            hint = text(problem, "hint", where)
            lines = [*([f"Context: {hint}"] if hint else []), question, *options]
            records.append(Record(pid, image, [("\n".join(lines), LETTERS[answer])], {"answer": LETTERS[answer]}))
    return records


def _asked(problem: dict[str, Any], where: str) -> tuple[str, list[str], int]:
    """Question, choices and the index of the right one; ValueError if that is none of at most five choices."""
    question, choices = text(problem, "question", where), field(problem, "choices", list, where)
    answer = field(problem, "answer", int, where)
    if not all(isinstance(choice, str) for choice in choices):
        raise ValueError(f"{where}: choices must be texts; correct the record")
    if not 0 <= answer < len(choices) <= len(LETTERS):
        raise ValueError(f"{where}: answer {answer} of {len(choices)} choices; 1 to {len(LETTERS)} can be asked")
    return question, choices, answer
