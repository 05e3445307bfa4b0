"""What a task is: its files and references (data/references.py), and three readings of one answer.

Every answer gets three scores between 0 and 1 in one pass:

- official: the benchmark's own metric, answers joined by question id, a missing answer counted as wrong;
- legacy:   what the released evaluators count, their slips included, to repeat published figures;
- lenient:  the form of the answer forgiven, only its content judged.

The gap between official and lenient is forgetting of the answer's form, not of the task.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from data.answers import Answer
from data.references import OpenFiles, TaskFiles
from eval.tasks.words import consensus, forgiving, is_phrase, lenient_consensus, same

MODES = ("official", "legacy", "lenient")


def printed(share: float) -> float:
    """A share as the released evaluators print it: percent, two decimals."""
    return float(f"{100 * share:.2f}")


class Task(TaskFiles):
    """One task: subclasses say how an answer is scored against a reference."""

    legacy_missing: float | None = None  # most released evaluators do not notice a missing answer
    joint = False  # True: an answer has no score by itself, only among the answers of its test set

    @abstractmethod
    def official(self, text: str, reference: Any) -> float:
        """Score of one answer in [0, 1] by the benchmark's own rule."""

    @abstractmethod
    def legacy(self, text: str, reference: Any) -> float:
        """Score of one answer in [0, 1] by the released evaluator."""

    @abstractmethod
    def lenient(self, text: str, reference: Any) -> float:
        """Score of one answer in [0, 1] with its form forgiven; never below official."""

    @abstractmethod
    def has_form(self, text: str, reference: Any) -> bool:
        """Whether the answer has the form the task asks for, right or wrong."""

    def official_scores(self, texts: Sequence[str], references: Sequence[Any], others: Sequence[Any]) -> list[float]:
        """`official` of answers to some questions of a test set; `others`: the references of its other questions."""
        return [self.official(text, reference) for text, reference in zip(texts, references, strict=True)]

    def counts(self, reference: Any) -> bool:
        """Whether the benchmark counts this question at all."""
        return True

    def right_answer(self, reference: Any) -> str:
        """What a reference says, for a reader."""
        return reference.answer

    # --- the released evaluators ---

    def legacy_scores(self, rows: Sequence[Mapping[str, Any]], references: Mapping[str, Any]) -> list[float | None]:
        """One legacy score per answer row; None where the released evaluator does not count the row.

        Here, as in most of them, every row counts, joined by id; ValueError for an id without reference.
        """
        scores: list[float | None] = []
        for row in rows:
            question_id = str(row["question_id"])
            if question_id not in references:
                raise ValueError(f"{self.name}: answer to unknown question_id {question_id}; wrong split or data?")
            scores.append(self.legacy(row["text"], references[question_id]))
        return scores

    def legacy_accuracy(self, scores: Sequence[float | None], references: Mapping[str, Any]) -> float:
        """Share in [0, 1]: the mean over the answers present."""
        counted = [score for score in scores if score is not None]
        return sum(counted) / len(counted) if counted else 0.0

    def legacy_report(
        self,
        rows: Sequence[Mapping[str, Any]],
        scores: Sequence[float | None],
        references: Mapping[str, Any],
    ) -> dict[str, float]:
        """The figures the released evaluator prints, rounded as it prints them."""
        return {
            "Samples": sum(score is not None for score in scores),
            "Accuracy": printed(self.legacy_accuracy(scores, references)),
        }

    # --- the question-only baseline ---

    def can_be_constant(self, answer: str) -> bool:
        """Whether a training answer is of the kind that `best_constant` chooses from."""
        return True

    def best_constant(self, answers: Sequence[str]) -> str:
        """The one answer to give to all of these: the most frequent, the first seen of equals."""
        return Counter(answers).most_common(1)[0][0]


def last_answers_by_id(
    task: Task, rows: Sequence[Mapping[str, Any]], references: Mapping[str, Any]
) -> list[float | None]:
    """Legacy scores of evaluators that read answers into a dictionary: the last of doubled ids counts,
    ids without a reference are passed over."""
    last = {str(row["question_id"]): position for position, row in enumerate(rows)}
    scores: list[float | None] = []
    for position, row in enumerate(rows):
        question_id = str(row["question_id"])
        reference = references.get(question_id)
        counted = reference is not None and last[question_id] == position and task.counts(reference)
        scores.append(task.legacy(row["text"], reference) if counted else None)
    return scores


class OpenQuestionTask(OpenFiles, Task):
    """Open questions, answered in a few words.

    official: with ten answers their `consensus`, here TextVQA's, else the whole answer compared without regard to case.
    lenient: the consensus of normal forms, whatever the benchmark's own rule is.
    """

    max_words = 15  # of an answer in the form that is asked for
    consensus = staticmethod(consensus)

    def official(self, text: str, reference: Answer) -> float:
        if reference.annotators:
            return self.consensus(text, reference.annotators)
        return float(same(text, reference.answer))

    def right_answer(self, reference: Answer) -> str:
        """With annotators all that several of them say, and how many do."""
        counts = Counter(reference.annotators).most_common()
        several = [f"{answer} ({count} of {len(reference.annotators)})" for answer, count in counts if count > 1]
        return ", ".join(several) or reference.answer

    def legacy(self, text: str, reference: Answer) -> float:
        return float(text.upper() == reference.answer.upper())

    def lenient(self, text: str, reference: Answer) -> float:
        if reference.annotators:
            return max(self.official(text, reference), lenient_consensus(text, reference.annotators))
        return float(forgiving(text, reference.answer))

    def has_form(self, text: str, reference: Answer) -> bool:
        return is_phrase(text, self.max_words)
