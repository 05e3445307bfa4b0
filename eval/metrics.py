"""The paper's and CoIN's figures, all functions of the accuracy matrix.

A[j, i] is the accuracy in percent on task i after training stage j; both are counted in training order,
so A is (tasks, tasks) and NaN above the diagonal, and where a cell was not asked for. A run without stages (zero-shot,
multi-task) has the single row of its one evaluation: nothing is newly learnt or forgotten there. A figure that lacks a
cell is None.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

KEYS = ("Avg.ACC", "Forgetting", "New.ACC", "MAA", "BWT")
RETAINED_KEYS = ("Retained", "Retained (base)", "Retained loss", "Retained loss (base)")
TEXT_KEYS = ("AR", "FWT (no base)", "BWT (T-1)")  # of text streams: Table 8's AR, FWT and BWT
BESIDE = ("FWT", *RETAINED_KEYS, *TEXT_KEYS)  # what A alone does not give
DEFINITIONS = {
    "Avg.ACC": "mean accuracy over all tasks after the last stage; higher is better",
    "Forgetting": "mean over all tasks but the last of (best accuracy at any stage before the last, from the "
    "task's own on) - (accuracy after the last stage); lower is better",
    "New.ACC": "mean accuracy on each task right after its own stage; higher is better",
    "MAA": "mean over the stages of the mean accuracy on the tasks seen so far (CoIN); higher is better",
    "BWT": "mean over all tasks, the last as 0, of (accuracy after the last stage) - "
    "(accuracy after the task's own stage) (CoIN); negative is forgetting",
    "FWT": "mean over all tasks but the first of (accuracy right before the task's own stage) - (accuracy of the base "
    "model); higher is better",
    "Retained": "mean accuracy, after the last stage, over the tasks of the benchmark that says what the base can do, "
    "which no stage trains; higher is better",
    "Retained (base)": "that of the base, before any stage",
    "Retained loss": "mean nats a token of the benchmark's texts, after the last stage; lower is better",
    "Retained loss (base)": "that of the base, before any stage",
    "AR": "mean ROUGE-L over all tasks after the last stage; higher is better",
    "FWT (no base)": "mean over all tasks but the first of the ROUGE-L right before the task's own stage (Table 8's "
    "FWT, from which nothing is subtracted); higher is better",
    "BWT (T-1)": "mean over all tasks but the last of (ROUGE-L after the last stage) - (ROUGE-L after the task's own "
    "stage) (Table 8's BWT); negative is forgetting",
}


def check_matrix(A: np.ndarray) -> np.ndarray:
    """A as float64, (T, T) with values on and below the diagonal, or one row (1, T).

    Raises ValueError for another shape, no value at all, a value above the diagonal or outside 0..100.
    """
    A = np.asarray(A, dtype=np.float64)
    if A.ndim != 2 or A.size == 0 or A.shape[0] not in (1, A.shape[1]):
        raise ValueError(f"accuracy matrix of shape {A.shape}: needs one row a task, or a single row")
    if not is_single(A) and len(above := np.argwhere(np.triu(~np.isnan(A), 1))):
        stage, task = above[0]
        raise ValueError(f"accuracy matrix: stage {stage + 1}, task {task + 1} lies above the diagonal: leave it empty")
    if np.isnan(A).all():
        raise ValueError("accuracy matrix: no cell has a value; evaluate one")
    if np.nanmin(A) < 0 or np.nanmax(A) > 100:
        raise ValueError("accuracy matrix: accuracies are in percent, 0 to 100")
    return A


def is_single(A: np.ndarray) -> bool:
    """Whether A is the single row of a run without stages."""
    return len(A) == 1


def average_accuracy(A: np.ndarray) -> float:
    """Avg.ACC = 1/T sum_i A[T, i]."""
    return float(A[-1].mean())


def new_accuracy(A: np.ndarray) -> float:
    """New.ACC = 1/T sum_i A[i, i]."""
    return float(np.diag(A).mean())


def forgetting(A: np.ndarray) -> float:
    """Forgetting = 1/(T-1) sum_{i<T} ( max_{i<=j<=T-1} A[j, i] - A[T, i] ), (T, T) with T > 1."""
    best = [A[i:-1, i].max() for i in range(len(A) - 1)]  # nan if one of them is
    return float((best - A[-1, :-1]).mean())


def mean_average_accuracy(A: np.ndarray) -> float:
    """MAA = 1/T sum_j ( 1/j sum_{i<=j} A[j, i] )."""
    return float(np.mean([A[j, : j + 1].mean() for j in range(len(A))]))


def backward_transfer(A: np.ndarray) -> float:
    """BWT = 1/T sum_i ( A[T, i] - A[i, i] ), CoIN's: the last task's zero is one of the T terms."""
    return float((A[-1] - np.diag(A)).mean())


def forward_transfer(full: np.ndarray, base: np.ndarray) -> float:
    """FWT = 1/(T-1) sum_{i>1} ( a[i-1, i] - b[i] ), how much the stages before a task lift it above the base model.

    `full` (T, T) has values above the diagonal, too; `base` (T,) is the accuracy before the first stage.
    """
    return float((np.diag(full, 1) - base[1:]).mean())


def text_figures(full: np.ndarray) -> dict[str, float | None]:
    """TEXT_KEYS of a (T, T) matrix of ROUGE-L, or of the single row of a run without stages.

        AR = 1/T sum_i a[T, i]     FWT = 1/(T-1) sum_{i>1} a[i-1, i]     BWT = 1/(T-1) sum_{i<T} ( a[T, i] - a[i, i] )

    None where a cell is missing.
    """
    average = float(full[-1].mean())
    if len(full) == 1:
        found = (average, np.nan, np.nan)
    else:
        found = (average, float(np.diag(full, 1).mean()), float((full[-1] - np.diag(full))[:-1].mean()))
    return {key: None if np.isnan(value) else value for key, value in zip(TEXT_KEYS, found, strict=True)}


def summarise(A: np.ndarray, tasks: Sequence[str]) -> dict[str, float | dict[str, float | None] | None]:
    """All figures of one run: KEYS in percent, and per_task, the accuracy on each task after the last stage.

    Raises ValueError for a matrix that check_matrix refuses or that does not fit `tasks`.
    """
    A = check_matrix(A)
    if A.shape[1] != len(tasks) or len(set(tasks)) != len(tasks):
        raise ValueError(f"accuracy matrix has {A.shape[1]} columns for the tasks {', '.join(tasks)}")
    several = not is_single(A)
    figures = {
        "Avg.ACC": average_accuracy(A),
        "Forgetting": forgetting(A) if several else np.nan,
        "New.ACC": new_accuracy(A) if several else np.nan,
        "MAA": mean_average_accuracy(A) if several else average_accuracy(A),
        "BWT": backward_transfer(A) if several else np.nan,
    }
    figures = {key: None if np.isnan(value) else value for key, value in figures.items()}
    return figures | {"per_task": {t: None if np.isnan(a) else a for t, a in zip(tasks, A[-1].tolist(), strict=True)}}
