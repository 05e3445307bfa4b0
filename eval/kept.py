"""Rows of a table that an earlier call made, perhaps on another machine, as the files in the table's folder tell them:

runs.csv        a line a run (eval/run_statistics.py)
matrices.csv    every cell of its matrix of accuracies
recipes.json    what it was trained by and how it was scored, {"all": what the runs share, "runs": {name: its own}}
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from data.checksums import checksum
from data.references import files_of
from eval.metrics import BESIDE, summarise
from eval.runs import EvaluatedRun
from eval.scored import output_folder
from eval.tables import read_matrix
from llaca.config import Recipe
from llaca.stream import NO_MATTER, frozen, input_checksums, write_atomically

FILES = ("runs.csv", "matrices.csv", "recipes.json")
RETAINED = "retained.csv"


@dataclass(frozen=True)
class KeptRun:
    """A run of an earlier call: its matrix A of accuracies with the names of its rows and columns, its line of
    runs.csv, and, as a flat recipe with the inputs' checksums, what it was trained by, where that was recorded.

    form: percentage of answers in their task's form after the last stage, by task, where that was recorded. retained:
    accuracy of the base and after every stage on what says what the base can do, where that was measured.
    """

    A: np.ndarray
    stages: list[str]
    tasks: list[str]
    told: Mapping[str, Any]
    recipe: Mapping[str, Any] | None
    form: Mapping[str, float]
    retained: pd.DataFrame | None

    @property
    def name(self) -> str:
        return self.told["run"]

    @property
    def seed(self) -> int:
        return int(self.told["seed"])

    @property
    def metrics(self) -> dict:
        """As eval.scored.score_run tells them, without what needs the answers."""
        learnt = {"learnt": dict(zip(self.tasks, np.diag(self.A).tolist(), strict=True))} if len(self.A) > 1 else {}
        beside = {key: float(self.told[key]) for key in BESIDE if pd.notna(self.told.get(key))}
        return summarise(self.A, self.tasks) | beside | learnt | ({"format": dict(self.form)} if self.form else {})

    @property
    def line(self) -> dict:
        """Its line of runs.csv, with the figures as the matrix gives them: those of the file are rounded."""
        return dict(self.told) | {key: value for key, value in self.metrics.items() if key in self.told}

    def differs(self, recipe: Recipe, **scored: str) -> list[str]:
        """In what a recipe, or the files it names, would train another run, or `scored` (split, scoring, cells) and the
        questions are others: a line for each. A field that was not there yet counts as its default, and what was not
        recorded of the answers as the same."""
        if self.recipe is None:
            return []
        then = Recipe.from_flat(self.recipe).flat() | {"inputs": self.recipe["inputs"]}
        before, now = (described(one) for one in (then, recipe.flat() | {"inputs": input_checksums(recipe)}))
        before |= {f"checksum of {name}": value for name, value in before.pop("inputs").items()}
        now |= {f"checksum of {name}": value for name, value in now.pop("inputs").items()}
        before, now = before | {key: self.recipe.get(key, value) for key, value in scored.items()}, now | scored
        if "questions" in self.recipe and before["split"] == now["split"]:
            before |= {f"checksum of {task}'s questions": told for task, told in self.recipe["questions"].items()}
            asked = question_checksums(recipe, scored["split"])
            now |= {f"checksum of {task}'s questions": told for task, told in asked.items()}
        keys = sorted({*before, *now} - {"run"})
        return [f"{k}: {before.get(k)!r} there, {now.get(k)!r} now" for k in keys if before.get(k) != now.get(k)]


def question_checksums(recipe: Recipe, split: str) -> dict[str, str]:
    """SHA-256 of the file with every task's questions."""
    stream = recipe.stream
    files = {task: files_of(stream.data_root, task) for task in stream.tasks}
    return {
        task: checksum(own.question_file(stream.data_root, stream.instructions, split)) for task, own in files.items()
    }


def described(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What determines a run's result, of a flat recipe and the checksums of its inputs."""
    return json.loads(json.dumps({key: value for key, value in recipe.items() if key not in NO_MATTER}))


def named_matrix(run: EvaluatedRun | KeptRun) -> tuple[np.ndarray, list[str], list[str]]:
    """Its matrix of accuracies, the names of its rows, and of its columns."""
    if isinstance(run, KeptRun):
        return run.A, run.stages, run.tasks
    return read_matrix(output_folder(run) / "matrix.csv")


def write_runs(behind: pd.DataFrame, runs: Sequence[EvaluatedRun | KeptRun], out: Path) -> None:
    """FILES of a table, the first of them last: `behind` is what run_statistics tells of `runs`."""
    cells, recipes = [], {}
    for run in runs:
        A, stages, tasks = named_matrix(run)
        if isinstance(run, KeptRun):
            recipe, form = run.recipe, {(stages[-1], task): share for task, share in run.form.items()}
        else:
            recipe = described(frozen(run.folder)) | {"split": run.split, "scoring": run.scoring, "cells": run.cells}
            recipe["questions"] = question_checksums(run.recipe, run.split)
            told = json.loads((output_folder(run) / "scores.json").read_text(encoding="utf-8"))
            form = {(cell["stage"], cell["task"]): cell["format_rate"] for cell in told if cell["stage"] == stages[-1]}
        found = pd.DataFrame(A, index=stages, columns=tasks).stack().dropna()
        cells += [(run.name, *place, accuracy, form.get(place)) for place, accuracy in found.items()]
        recipes |= {run.name: recipe} if recipe else {}
    frame = pd.DataFrame(cells, columns=["run", "stage", "task", "accuracy", "form"])
    write_atomically(out / FILES[1], frame.to_csv(index=False, float_format="%.10g"))
    first = next(iter(recipes.values()), {})
    shared = {key: value for key, value in first.items() if all(key in r and r[key] == value for r in recipes.values())}
    own = {name: {k: v for k, v in recipe.items() if k not in shared} for name, recipe in recipes.items()}
    write_atomically(out / FILES[2], json.dumps({"all": shared, "runs": own}, indent=1) + "\n")
    write_atomically(out / FILES[0], behind.to_csv(index=False, float_format="%.6g"))


def read_runs(folder: Path) -> dict[str, list[KeptRun]]:
    """The runs of a table by row. Raises FileNotFoundError without its files, and ValueError for those that do not fit
    together."""
    for name in FILES[:2]:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name}: no table was written there; leave --keep out")
    behind, cells = (pd.read_csv(folder / name) for name in FILES[:2])
    recipes = {"all": {}, "runs": {}}  # a table of before they were recorded
    if (folder / FILES[2]).is_file():
        recipes = json.loads((folder / FILES[2]).read_text(encoding="utf-8"))
    retained = pd.read_csv(path) if (path := folder / RETAINED).is_file() else None
    found: dict[str, list[KeptRun]] = {}
    for line in behind.to_dict("records"):
        own = cells[cells["run"] == line["run"]]
        if own.empty:
            raise ValueError(f"{folder}: {line['run']} is in {FILES[0]} and not in {FILES[1]}; leave --keep out")
        stages = own["stage"].unique().tolist()
        last = own[own["stage"] == stages[-1]]
        tasks = last["task"].tolist()
        A = own.pivot(index="stage", columns="task", values="accuracy").loc[stages, tasks].to_numpy()
        recipe = recipes["all"] | recipes["runs"][line["run"]] if line["run"] in recipes["runs"] else None
        form = dict(zip(tasks, last["form"], strict=True)) if "form" in last and last["form"].notna().all() else {}
        matrix = None if retained is None else table_of(retained[retained["run"] == line["run"]])
        found.setdefault(line["method"], []).append(KeptRun(A, stages, tasks, line, recipe, form, matrix))
    return found


def table_of(cells: pd.DataFrame) -> pd.DataFrame | None:
    """The accuracies of lines of RETAINED [stages, tasks], both in the order of the lines; None of none."""
    if cells.empty:
        return None
    found = cells.pivot(index="stage", columns="task", values="accuracy")
    return found.loc[cells["stage"].unique(), cells["task"].unique()]
