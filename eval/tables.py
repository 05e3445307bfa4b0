"""Files and tables of the accuracy matrix: matrix.csv, metrics.json, the layout of the paper's table 1."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from eval.metrics import BESIDE, DEFINITIONS, RETAINED_KEYS, TEXT_KEYS, check_matrix, summarise
from eval.tasks import TASKS

PAPER_TABLE_1 = Path(__file__).parent / "paper" / "table1_llava7b.csv"
TABLE_METRICS = ("Avg.ACC", "Forgetting", "New.ACC")
ALL_METRICS = (*TABLE_METRICS, *BESIDE)  # BESIDE only where a row has it
BASELINE_LABEL = "Question-only majority"
EMPTY = "-"
_CSV_DIGITS = 10  # digits enough for every accuracy a test set can have, few enough to hide binary noise


# --- a run's files ---


def write_matrix(path: Path | str, A: np.ndarray, stages: Sequence[str], tasks: Sequence[str]) -> None:
    """Write A (stages, tasks), percent, as CSV: header `stage` and the tasks, empty above the diagonal."""
    A = check_matrix(A)
    frame = pd.DataFrame(A, columns=list(tasks), index=pd.Index(list(stages), name="stage"))
    frame.to_csv(path, float_format=f"%.{_CSV_DIGITS}g")


def read_matrix(path: Path | str) -> tuple[np.ndarray, list[str], list[str]]:
    """(A, stages, tasks) of a matrix.csv; ValueError naming the file if it is no accuracy matrix."""
    frame = pd.read_csv(path, dtype={"stage": str})
    if frame.columns[0] != "stage":
        raise ValueError(f"{path}: the first column must be 'stage', it is '{frame.columns[0]}'")
    frame = frame.set_index("stage")
    try:
        A = check_matrix(frame.to_numpy(dtype=np.float64))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return A, frame.index.tolist(), frame.columns.tolist()


def write_metrics(
    path: Path | str, A: np.ndarray, tasks: Sequence[str], extra: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """Write `summarise(A, tasks)` and `extra` as JSON (None as null) and return it."""
    metrics = summarise(A, tasks) | dict(extra or {})
    Path(path).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    return metrics


# --- rows: a method's figures over its seeds ---


@dataclass(frozen=True)
class Row:
    """A line of a table: figures in percent by column (task or metric) and, over seeds, their deviation."""

    method: str
    mean: Mapping[str, float | None]
    deviation: Mapping[str, float]
    seeds: int = 1

    @property
    def label(self) -> str:
        """The method, with the number of seeds where there are several."""
        return self.method if self.seeds == 1 else f"{self.method} (n={self.seeds})"

    def cell(self, column: str) -> str:
        """Two decimals, "mean ± deviation" over seeds, EMPTY where the figure is not defined."""
        if self.mean[column] is None:
            return EMPTY
        text = f"{self.mean[column]:.2f}"
        return f"{text} ± {self.deviation[column]:.2f}" if column in self.deviation else text


def method_row(method: str, runs: Sequence[Mapping[str, Any]]) -> Row:
    """One row from the metrics (`summarise`) of one method's seeds: mean and sample deviation (ddof=1).

    Raises ValueError if there is no run, or the runs differ in their tasks or in which metrics they have.
    """
    if not runs:
        raise ValueError(f"{method}: no run to tabulate")
    flat = [dict(run["per_task"]) | {metric: run.get(metric) for metric in ALL_METRICS} for run in runs]
    frame = pd.DataFrame(flat, dtype=np.float64)
    present = frame.notna()
    if any(set(run) != set(flat[0]) for run in flat) or not (present.all() == present.any()).all():
        raise ValueError(f"{method}: its runs differ in tasks or metrics; they are not seeds of one recipe")
    mean = {column: float(frame[column].mean()) if present[column].all() else None for column in frame}
    several = len(runs) > 1
    spread = frame.std(ddof=1)
    deviation = {column: float(spread[column]) for column in frame if several and mean[column] is not None}
    return Row(method, mean, deviation, len(runs))


def baseline_row(baseline: Mapping[str, float]) -> Row:
    """The question-only majority baseline (percent by task) as a row; it neither learns nor forgets."""
    average = sum(baseline.values()) / len(baseline)
    mean = dict(baseline) | {**dict.fromkeys(ALL_METRICS), "Avg.ACC": average, "AR": average}
    return Row(BASELINE_LABEL, mean, {})


def paper_rows(path: Path = PAPER_TABLE_1) -> list[Row]:
    """The rows the paper prints, as read from its table."""
    frame = pd.read_csv(path).set_index("method")
    return [
        Row(
            f"{method} (paper)",
            dict.fromkeys(ALL_METRICS) | {k: None if pd.isna(v) else v for k, v in row.items()},
            {},
        )
        for method, row in frame.to_dict("index").items()
    ]


# --- tables ---


@dataclass(frozen=True)
class Table:
    """Rows with common columns, and the lines printed under them."""

    rows: tuple[Row, ...]
    columns: tuple[str, ...]
    notes: tuple[str, ...]

    def frame(self) -> pd.DataFrame:
        """The printed cells: a column for the method, the tasks, the metrics."""
        cells = [[row.label, *map(row.cell, self.columns)] for row in self.rows]
        return pd.DataFrame(cells, columns=["Method", *self.columns])

    def text(self) -> str:
        """For the terminal."""
        frame = self.frame()
        width = frame["Method"].str.len().max()
        frame = frame.assign(Method=frame["Method"].str.ljust(width)).rename(columns={"Method": "Method".ljust(width)})
        return "\n".join([frame.to_string(index=False), "", *self.notes, ""])

    def markdown(self) -> str:
        """A GitHub table."""
        frame = self.frame()
        lines = [list(frame.columns), ["---", *["---:"] * len(self.columns)], *frame.to_numpy().tolist()]
        table = [f"| {' | '.join(line)} |" for line in lines]
        return "\n".join([*table, "", *[f"- {note}" for note in self.notes], ""])

    def csv(self) -> str:
        """Unrounded numbers, with their deviation (sd) beside them where there are seeds; notes behind #."""
        spread = any(row.deviation for row in self.rows)
        records = [
            {"method": row.method, **{column: row.mean[column] for column in self.columns}}
            | ({"seeds": row.seeds} if spread else {})
            | ({f"{column} sd": row.deviation.get(column) for column in self.columns} if spread else {})
            for row in self.rows
        ]
        notes = "".join(f"# {note}\n" for note in self.notes)
        return pd.DataFrame(records).to_csv(index=False, float_format=f"%.{_CSV_DIGITS}g") + notes

    def latex(self) -> str:
        """A tabular with booktabs rules, the notes below it."""
        tabular = self.frame().to_latex(index=False, escape=True, column_format="l" + "r" * len(self.columns))
        plain = [re.sub(r"([&%$#_{}])", r"\\\1", note) for note in self.notes]
        notes = [f"\n\\smallskip\n{{\\footnotesize {note}}}\\par" for note in plain]
        return (tabular + "".join(notes) + "\n").replace("±", r"$\pm$")


def results_table(rows: Sequence[Row], baseline: Mapping[str, float], paper: bool = False) -> Table:
    """The layout of the paper's table 1: method, final accuracy on each task, Avg.ACC, Forgetting, New.ACC; of a text
    stream's rows, Table 8's AR, FWT and BWT instead.

    `baseline` is the question-only majority accuracy in percent by task; its row stands below the methods,
    and with `paper` the paper's own rows below that. Tasks stand in the canonical order, whatever the
    training order was. Raises ValueError if a row has other tasks than the baseline.
    """
    lines = [*rows, baseline_row(baseline), *(paper_rows() if paper else ())]
    tasks = canonical_order(baseline)
    for row in lines:
        if differing := sorted(set(row.mean) ^ {*tasks, *ALL_METRICS}):
            raise ValueError(f"{row.label}: differs from the baseline's tasks in {', '.join(differing)}")
    told = {metric for metric in ALL_METRICS if any(row.mean[metric] is not None for row in rows)}
    usual = TEXT_KEYS if "AR" in told else (*TABLE_METRICS, "FWT")
    metrics = [m for m in (*usual, *RETAINED_KEYS) if m in (*TABLE_METRICS, *TEXT_KEYS) or m in told]
    return Table(tuple(lines), (*tasks, *metrics), table_notes(rows, metrics))


def canonical_order(tasks: Iterable[str]) -> list[str]:
    """Tasks in the paper's order, unknown ones last as they come."""
    order = list(TASKS)
    return sorted(tasks, key=lambda task: order.index(task) if task in order else len(order))


def table_notes(rows: Sequence[Row], metrics: Sequence[str]) -> tuple[str, ...]:
    """What the columns mean: one line each, and one on the spread where there are seeds."""
    notes = [f"Task columns: {'ROUGE-L' if 'AR' in metrics else 'accuracy'} in percent after the last stage."]
    notes += [f"{metric}: {DEFINITIONS[metric]}." for metric in metrics]
    notes += [
        f"{BASELINE_LABEL}: answers every question with the most frequent training answer to its text, "
        "the picture unseen."
    ]
    if any(row.seeds > 1 for row in rows):
        notes += ["mean ± sample standard deviation (ddof=1) over n seeds."]
    return tuple(notes)
