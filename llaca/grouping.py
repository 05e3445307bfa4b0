"""Instruction grouping: which task may share which parameter set, decided from the tasks' instruction texts alone.

A codebook holds groups of instructions. A task's instructions are compared with every stored one by TF-IDF
cosine similarity; the score of a group is the mean over all (task's, stored) pairs, and the best group takes
the task if its score reaches a threshold, else the task founds a new group (Table 10 of the paper).

As in the released code the TF-IDF weights are fitted anew on each pair of texts (scikit-learn's TfidfVectorizer
with English stop words). With two documents these weights have only two values, so all pairs are computed at
once from word counts, see `similarity`.

    python -m llaca.grouping --instructions data/instructions.json --set original|diverse|10type
"""

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import log
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix
    from sklearn.feature_extraction.text import CountVectorizer

THRESHOLDS = {"original": 0.90, "diverse": 0.30, "10type": 0.30}
PAIRS = 1 << 22  # numbers of a similarity that are held at once
IDF_UNSHARED = log(3 / 2) + 1  # smoothed idf of a word in one of two documents; 1 for a word in both
INSTRUCTIONS = Path(__file__).parent.parent / "data" / "instructions.json"


def similarity(left: Sequence[str], right: Sequence[str]) -> np.ndarray:
    """[len(left), len(right)]: the cosine of each pair under TF-IDF weights fitted on that pair alone.

    With word counts x and y a word weighs 1 if it is in both texts and w = ln(3/2) + 1 if it is in one, so
        cos = x.y / (|x'| |y'|),    |x'|^2 = w^2 sum_i x_i^2 - (w^2 - 1) sum_{i: y_i > 0} x_i^2.
    A text of stop words alone is similar to nothing but the same text (scikit-learn refuses such a pair).
    """
    return np.concatenate(list(_similarities(left, right)))


def _similarities(left: Sequence[str], right: Sequence[str]) -> Iterator[np.ndarray]:
    """The rows of `similarity`, PAIRS numbers at once: a file can have thousands of distinct instructions."""
    texts = _vectorizer(vocabulary=_words([*left, *right]))
    x, y = (texts.transform(side).astype(float) for side in (left, right))
    squared, others = IDF_UNSHARED**2, np.array(right)
    step = max(1, PAIRS // len(right))
    for start in range(0, len(left), step):
        own = x[start : start + step]
        norm_x = squared * _sum(own.power(2)) - (squared - 1) * _dense(own.power(2), y > 0)
        norm_y = squared * _sum(y.power(2)).T - (squared - 1) * _dense(own > 0, y.power(2))
        norms = np.sqrt(norm_x * norm_y)
        equal = np.array(left[start : start + step])[:, None] == others[None, :]
        yield np.where(equal, 1.0, _dense(own, y) / np.where(norms > 0, norms, 1.0))


def _vectorizer(**settings) -> "CountVectorizer":
    from sklearn.feature_extraction.text import CountVectorizer  # takes a second, which runs without groups do not need

    return CountVectorizer(stop_words="english", **settings)


def _words(texts: Sequence[str]) -> dict[str, int]:
    analyze = _vectorizer().build_analyzer()
    found = sorted({word for text in texts for word in analyze(text)})
    return {word: place for place, word in enumerate(found or ["-"])}


def _sum(matrix: "csr_matrix") -> np.ndarray:
    return np.asarray(matrix.sum(1)).reshape(-1, 1)


def _dense(x: "csr_matrix", y: "csr_matrix") -> np.ndarray:
    return (x @ y.T).toarray()


class Match(NamedTuple):
    """index: the group, or None for a new one; scores: one number in [0, 1] for every group."""

    index: int | None
    scores: list[float]


class Answering(NamedTuple):
    """The group a test set is answered with; `matched` is False if none reached the threshold."""

    index: int
    matched: bool
    scores: list[float]


class Codebook:
    """Groups of instructions, in the order they were founded; a group's index never changes.

    threshold: a score at or above it matches. aggregate: a group's score is the 'mean' over all pairs, as
    released and as in Table 10, or their 'max', as the paper's text says (10type then gives three groups, not four).
    """

    def __init__(self, threshold: float, aggregate: str = "mean", groups: Iterable[Sequence[str]] = ()):
        if aggregate not in ("mean", "max"):
            raise ValueError(f"aggregate must be mean or max, not {aggregate!r}")
        self.threshold, self.aggregate = threshold, aggregate
        self.groups = [_distinct(group) for group in groups]

    def match(self, instructions: Sequence[str]) -> Match:
        """The best group (the first of equals) if it reaches the threshold, and the scores of all.

        A group of exactly these instructions matches whatever its score: ten different ones may be little alike.
        """
        instructions = _distinct(instructions)
        scores = [self._score(instructions, group) for group in self.groups]
        if (same := self._same(instructions)) is not None:
            return Match(same, scores)
        best = int(np.argmax(scores)) if scores else None
        return Match(best if scores and scores[best] >= self.threshold else None, scores)

    def _score(self, instructions: Sequence[str], group: Sequence[str]) -> float:
        rows = _similarities(instructions, group)
        if self.aggregate == "max":
            return float(max(row.max() for row in rows))
        if len(instructions) * len(group) <= PAIRS:
            return float(np.mean(next(rows)))
        return float(sum(row.sum() for row in rows) / (len(instructions) * len(group)))

    def choose(self, instructions: Sequence[str]) -> Answering:
        """The group for a test set: below the threshold the most similar one, where the release takes the last.

        Raises ValueError if there is no group yet.
        """
        if not self.groups:
            raise ValueError("the codebook is empty: no parameter set to choose from")
        index, scores = self.match(instructions)
        if index is not None:
            return Answering(index, True, scores)
        return Answering(int(np.argmax(scores)), False, scores)

    def add(self, index: int | None, instructions: Sequence[str]) -> int:
        """Let the group take in the instructions it has not seen; None founds a group. Returns the index.

        Adding the same twice changes nothing: a group of exactly these instructions is not founded again.
        """
        instructions = _distinct(instructions)
        if index is None:
            if (same := self._same(instructions)) is not None:
                return same
            self.groups.append(instructions)
            return len(self.groups) - 1
        if not 0 <= index < len(self.groups):
            raise ValueError(f"no group {index} in a codebook of {len(self.groups)}")
        self.groups[index] = _distinct([*self.groups[index], *instructions])
        return index

    def _same(self, instructions: Sequence[str]) -> int | None:
        return next((i for i, group in enumerate(self.groups) if set(group) == set(instructions)), None)

    def to_json(self) -> str:
        """The codebook as JSON text, the same text for the same groups."""
        fields = {"threshold": self.threshold, "aggregate": self.aggregate, "groups": self.groups}
        return json.dumps(fields, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Codebook":
        """The codebook that `to_json` wrote."""
        return cls(**json.loads(text))


def _distinct(instructions: Sequence[str]) -> list[str]:
    if isinstance(instructions, str) or not instructions or not all(text.strip() for text in instructions):
        raise ValueError(f"expected a list of non-empty instructions, got {instructions!r}")
    return list(dict.fromkeys(instructions))


def group_tasks(instructions: Mapping[str, Sequence[str]], codebook: Codebook) -> list[list[str]]:
    """Task names by group; tasks (name -> instructions) enter the codebook in the order of the mapping."""
    groups: list[list[str]] = []
    for task, texts in instructions.items():
        index = codebook.add(codebook.match(texts).index, texts)
        groups += [[] for _ in range(len(codebook.groups) - len(groups))]
        groups[index].append(task)
    return groups


def main(argv: Sequence[str] | None = None) -> None:
    """Print the groups of one instruction set as JSON: a list of lists of task names."""
    parser = argparse.ArgumentParser(prog="python -m llaca.grouping", description=main.__doc__)
    parser.add_argument("--instructions", type=Path, default=INSTRUCTIONS, help="file with `instructions` and `orders`")
    parser.add_argument("--set", choices=THRESHOLDS, default="original", help="instruction set")
    parser.add_argument("--aggregate", choices=("mean", "max"), default="mean", help="score of a group")
    args = parser.parse_args(argv)
    try:
        content = json.loads(args.instructions.read_text(encoding="utf-8"))
        instructions = {t: content["instructions"][t][args.set] for t in content["orders"]["original"]}
    except (OSError, json.JSONDecodeError) as error:
        parser.error(f"cannot read {args.instructions}: {error}")
    except KeyError as error:
        parser.error(
            f"{args.instructions}: {error} is missing; expected orders.original and, for each of its "
            f"tasks, instructions.TASK.{args.set}"
        )
    print(json.dumps(group_tasks(instructions, Codebook(THRESHOLDS[args.set], args.aggregate))))


if __name__ == "__main__":
    main()
