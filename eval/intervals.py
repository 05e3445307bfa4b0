"""How sure a difference between two rows is: over seeds, and over the questions that were asked."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from eval.runs import EvaluatedRun
from eval.scored import output_folder

LEVEL = 0.95
RESAMPLES = 9999


class Interval(NamedTuple):
    """Ends of a two-sided interval of LEVEL."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.low:+.1f} to {self.high:+.1f}"


def over_seeds(values: Sequence[float]) -> Interval | None:
    """Student's interval of the mean; None for fewer than two values.

    Not a bootstrap, whose nominal 95 % cover 74 % at three seeds and 84 % at five.
    """
    if len(values) < 2:
        return None
    mean, error = float(np.mean(values)), float(stats.sem(values))
    reach = error * float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1))
    return Interval(mean - reach, mean + reach)


def over_questions(one: Sequence[EvaluatedRun], other: Sequence[EvaluatedRun]) -> Interval | None:
    """Percentile bootstrap of the difference in Avg.ACC, in points: the questions of every task are drawn anew, the
    same ones for both rows and all seeds, and the seeds that both have stay as they are.

    The runs are scored already. None without a common seed, and by legacy scoring, whose accuracies are no means over
    questions.
    """
    pairs = [(a, b) for a in one for b in other if a.seed == b.seed]
    if not pairs or pairs[0][0].scoring == "legacy":
        return None
    apart = []
    for task in pairs[0][0].tasks:
        seeds = [100 * (final_scores(a, task) - final_scores(b, task)) for a, b in pairs]
        apart.append(pd.concat(seeds, axis=1, verify_integrity=False).mean(axis=1).to_numpy())

    def average(*drawn, axis):
        return np.mean([scores.mean(axis=axis) for scores in drawn], axis=0)

    if all(np.ptp(scores) == 0 for scores in apart):
        return Interval(*[float(average(*apart, axis=0))] * 2)
    found = stats.bootstrap(
        apart, average, n_resamples=RESAMPLES, batch=100, confidence_level=LEVEL, method="percentile", rng=0
    ).confidence_interval
    return Interval(float(found.low), float(found.high))


def final_scores(run: EvaluatedRun, task: str) -> pd.Series:
    """The score in [0, 1] of every question of a task after the last stage, by its id."""
    holder = run.rows[-1][1][task]
    scores = pd.read_csv(output_folder(run) / "scores" / holder / f"{task}.csv", dtype={"question_id": str})
    return scores.set_index("question_id")[run.scoring]


def differences(
    behind: pd.DataFrame, pairs: dict[str, list[str]], runs: dict[str, list[EvaluatedRun]], metrics: Sequence[str]
) -> str:
    """Row minus row of `run_statistics`, seed by seed, as a GitHub table: mean ± sample standard deviation, in points,
    and what is known of the first metric's: Student's interval over seeds, the bootstrap's over questions, of `runs`
    whose answers are there."""
    first = metrics[0]
    head = ["", "Difference", *metrics, "Seeds", f"{first}, 95 % over seeds", f"{first}, 95 % over questions"]
    lines = [head, ["---", "---", *["---:"] * (len(head) - 2)]]
    for words, (one, other) in pairs.items():
        own, foil = (behind[behind["method"] == label].set_index("seed") for label in (one, other))
        apart = own[[*metrics]].sub(foil[[*metrics]]).dropna()
        spread = [f" ± {apart[metric].std(ddof=1):.1f}" if len(apart) > 1 else "" for metric in metrics]
        cells = [f"{apart[metric].mean():+.1f}{told}" for metric, told in zip(metrics, spread, strict=True)]
        sure = [over_seeds(apart[first]), over_questions(runs.get(one, []), runs.get(other, []))]
        told = ["-" if interval is None else str(interval) for interval in sure]
        lines.append([words, f"{one} - {other}", *cells, str(len(apart)), *told])
    notes = [
        "Over seeds: Student's t, for the mean of the differences. Over questions: percentile bootstrap of the test "
        "questions, drawn for both rows alike, of the seeds as they are.",
    ]
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", *(f"- {note}" for note in notes), ""])
