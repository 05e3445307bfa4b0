"""Answers that tasks share: what may be kept by luck of a common vocabulary.

    python -m eval.overlap --runs-dir runs --run NAME ... [--split dev]

prints, for every two tasks, what the column's test set would score with the best of the row's training answers; then,
for every method, how closely that goes with what is left of a task's accuracy when the row's task has been trained:
Spearman's rank correlation over the cells below the diagonal, of all its runs. eval_all.sh first.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from data.benchmark import image_root
from eval.runs import EvaluatedRun, arguments, chosen_runs
from eval.score import training_turns
from eval.scored import method_label, output_folder, question_set
from eval.tables import read_matrix
from eval.tasks import task_of

QUESTIONS, ANSWERS = 500, 300


def answer_overlap(run: EvaluatedRun) -> pd.DataFrame:
    """What each task's test set [columns] would score, in percent by the official rule, if every question got the best
    of another task's training answers [rows]. The first QUESTIONS of a test set and a task's ANSWERS most frequent
    answers count."""
    stream, tasks = run.recipe.stream, run.tasks
    found = pd.DataFrame(index=tasks, columns=tasks, dtype=float)
    answers = {task: frequent_answers(run, task) for task in tasks}
    for asked in tasks:
        task = task_of(stream.data_root, asked)
        references = task.read_references(stream.data_root, stream.instructions, run.split)
        asked_of = question_set(run, asked)
        counted = [
            a.reference
            for a in references.asked.values()
            if task.counts(a.reference) and not (asked_of.limit and a.position >= asked_of.limit)
        ][:QUESTIONS]
        if task.joint:
            continue  # no answer has a score by itself
        for trained in tasks:
            best = [max(task.official(text, reference) for text in answers[trained]) for reference in counted]
            found.loc[trained, asked] = 100 * float(np.mean(best))
    return found


def frequent_answers(run: EvaluatedRun, task: str) -> list[str]:
    """The answers of a task's training records, the most frequent first."""
    stream = run.recipe.stream
    path = task_of(stream.data_root, task).train_file(stream.data_root, stream.instructions)
    records, _ = training_turns(path, image_root(stream.data_root), stream.unchecked)
    given = pd.Series([answer.strip() for turns in records for _, answer in turns])
    return given.value_counts().index[:ANSWERS].tolist()


def kept(A: np.ndarray, tasks: Sequence[str], overlap: pd.DataFrame) -> list[tuple[float, float]]:
    """(overlap, what is left of the accuracy right after its own stage) of every cell below the diagonal."""
    return [
        (float(overlap.loc[tasks[stage], tasks[task]]), float(A[stage, task] / A[task, task]))
        for stage in range(len(A))
        for task in range(stage)
        if A[task, task] > 0
    ]


def correlation(cells: Sequence[tuple[float, float]]) -> float:
    """Spearman's, of overlap and what is left."""
    return float(stats.spearmanr(*zip(*cells, strict=True)).statistic)


def main(given: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m eval.overlap", description=__doc__.splitlines()[0])
    arguments(parser)
    options = parser.parse_args(given)
    overlaps: dict[tuple, pd.DataFrame] = {}
    cells: dict[str, list[tuple[float, float]]] = defaultdict(list)
    try:
        for run in chosen_runs(options):
            A, _, tasks = read_matrix(output_folder(run) / "matrix.csv")
            stream = run.recipe.stream
            key = (stream.data_root, stream.instructions, tuple(tasks))
            if key not in overlaps:
                overlaps[key] = answer_overlap(run)
                print(f"{stream.data_root}, {stream.instructions} instructions")
                print(overlaps[key].to_string(float_format="%.0f"), end="\n\n")
            if len(A) > 1:
                cells[method_label(run)] += kept(A, tasks, overlaps[key])
    except (ValueError, OSError) as error:
        sys.exit(f"eval.overlap: {error}")
    for method, pairs in cells.items():
        print(f"{method}: {correlation(pairs):+.2f} over {len(pairs)} cells")


if __name__ == "__main__":
    main()
