"""What the answer to a question is compared with, one kind for every form of answer."""

from dataclasses import dataclass

RULES = ("part", "word", "whole", "states", "choice")  # how MLLM-DCL compares


@dataclass(frozen=True)
class Answer:
    """Reference of an open question: the file's single answer, and the ten annotators' where they exist."""

    answer: str
    annotators: tuple[str, ...] = ()


@dataclass(frozen=True)
class RuledAnswer:
    """A text, and the rule by which an answer is compared with it, one of RULES (eval/tasks/mllm_dcl.py)."""

    answer: str
    rule: str


@dataclass(frozen=True)
class GQAAnswer:
    """A question's answer, and what the released evaluator groups its figures by; without a `group`
    a question takes no part in the distribution score."""

    answer: str
    balanced: bool
    open: bool
    group: str | None


@dataclass(frozen=True)
class Options:
    """The options of a question and the index of the right one."""

    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Region:
    """The reference box [x1, y1, x2, y2] as written, the picture's longer side in pixels, a box's largest x and y."""

    answer: str
    side: float = 1.0
    frame: tuple[float, float] = (1.0, 1.0)
