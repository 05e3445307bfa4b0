"""Answers, scores, tables and figures of runs: `python -m eval.report [--run NAME ...]` (without: every run).

Writes runs/NAME/{matrix.csv,metrics.json,scores.json} and figures/, and prints one table with a row per method, the
seeds of a method taken together. Runs whose streams differ get tables of their own.
"""

import argparse
import json
import os
import sys
from collections import defaultdict
from dataclasses import fields, replace
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

from eval.figures import accuracy_heatmap, accuracy_over_stages, average_vs_forgetting
from eval.predict import Run, answer_file, missing_cells, open_run, predict
from eval.score import majority_baseline, read_answers, score_task
from eval.tables import Table, method_row, read_matrix, results_table, write_matrix, write_metrics
from eval.tasks import MODES

FORMATS = {"txt": Table.text, "md": Table.markdown, "csv": Table.csv, "tex": Table.latex}


def output_folder(run: Run) -> Path:
    """Where a run's figures go: the run folder, or a folder of the split's own for the development split."""
    return run.folder if run.split == "test" else run.folder / run.split


def score_run(run: Run) -> dict:
    """Answers what is missing, scores every cell, writes the run's files; returns its metrics.

    A run that is not complete gets the matrix of its stages so far and, for want of a last row, no metrics.json.
    """
    rows = predict(run)
    stream, folder = run.recipe.stream, output_folder(run)
    folder.mkdir(exist_ok=True)

    @cache  # with grouping, many cells are one file
    def score(holder: str, task: str):
        answers = read_answers(answer_file(run, holder, task))
        return score_task(task, answers, stream.data_root, stream.instructions, run.split, stream.max_test_samples)

    tasks = list(rows[-1][1])
    A = np.full((len(rows), len(tasks)), np.nan)
    cells = []
    for j, (stage, row) in enumerate(rows):
        for task, holder in row.items():
            result = score(holder, task)
            A[j, tasks.index(task)] = result.accuracy["official"]
            accuracies = {mode: result.accuracy[mode] for mode in MODES}
            cells.append(
                {
                    "stage": stage,
                    "task": task,
                    "parameters": holder,
                    **accuracies,
                    "format_rate": result.format_rate,
                    "questions": result.n,
                    "missing": result.missing,
                }
            )
    (folder / "scores.json").write_text(json.dumps(cells, indent=1) + "\n", encoding="utf-8")
    write_matrix(folder / "matrix.csv", A, [stage for stage, _ in rows], tasks)
    (folder / "figures").mkdir(exist_ok=True)
    accuracy_heatmap(A, tasks, run.name, folder / "figures" / "accuracy_matrix.png")
    (folder / "metrics.json").unlink(missing_ok=True)
    return write_metrics(folder / "metrics.json", A, tasks) if run.complete else {}


def method_label(run: Run) -> str:
    """What a table calls the run's method: its name, the rule of its average, grouping, and what else was chosen."""
    method = run.recipe.method
    hidden = {"method", "grouping", "average"}
    told = [f for f in fields(method) if f.name not in hidden and getattr(method, f.name) != f.default]
    chosen = [f"{f.name} {getattr(method, f.name)}" for f in told]
    rule = ", ".join([*([method.average] if method.average else []), *chosen])
    return method.method + (f" ({rule})" if rule else "") + (" + grouping" if method.grouping else "")


def comparable(run: Run) -> tuple:
    """Runs with the same key stand in one table."""
    return tuple(map(str, (run.recipe.stream, run.recipe.model, run.recipe.train, run.split)))


def summary(runs: list[Run], metrics: dict[str, dict], out: Path, paper: bool = False) -> str:
    """The table over comparable runs, seeds taken together; files and figures into `out`."""
    stream, split = runs[0].recipe.stream, runs[0].split
    methods: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        label = method_label(run)
        seeds = [other.recipe.run.seed for other in methods[label]]
        methods[f"{label} [{run.name}]" if run.recipe.run.seed in seeds else label].append(run)
    baseline = {
        t: majority_baseline(t, stream.data_root, stream.instructions, split, stream.max_test_samples)
        for t in stream.tasks
    }
    rows = [method_row(label, [metrics[run.name] for run in members]) for label, members in methods.items()]
    table = results_table(rows, baseline, paper)
    behind = facts(runs, metrics)
    table = replace(table, notes=(*table.notes, *fallback_notes(behind)))
    out.mkdir(parents=True, exist_ok=True)
    for suffix, render in FORMATS.items():
        (out / f"table.{suffix}").write_text(render(table), encoding="utf-8")
    behind.to_csv(out / "runs.csv", index=False, float_format="%.4g")
    draw(methods, metrics, out)
    return table.text()


def facts(runs: list[Run], metrics: dict[str, dict]) -> pd.DataFrame:
    """What lies behind a table, a row per run: commit, minutes of training, figures, and how often beta fell back."""
    rows = []
    for run in runs:
        stories = [json.loads((stage.folder / "stage.json").read_text(encoding="utf-8")) for stage in run.stages]
        averaged = [story for story in stories if story["averaged"]]
        rows.append(
            {
                "run": run.name,
                "method": method_label(run),
                "seed": run.recipe.run.seed,
                "commit": json.loads((run.folder / "environment.json").read_text(encoding="utf-8"))["commit"],
                "minutes": sum(story["seconds"] for story in stories) / 60,
                "steps": sum(story["steps"] for story in stories),
                **{key: metrics[run.name][key] for key in ("Avg.ACC", "Forgetting", "New.ACC", "MAA", "BWT")},
                "averaged stages": len(averaged),
                **{
                    key: np.average([s[key] for s in averaged], weights=[s["steps"] for s in averaged])
                    for key in ("beta_median", "beta_fallback_share")
                    if averaged
                },
            }
        )
    return pd.DataFrame(rows)


def fallback_notes(behind: pd.DataFrame) -> list[str]:
    """How often the rule of each averaging method gave no beta in its range, for the lines under the table."""
    if "beta_fallback_share" not in behind:
        return []
    means = behind.dropna(subset=["beta_fallback_share"]).groupby("method", sort=False).mean(numeric_only=True)
    return [
        f"{method}: beta fell back in {100 * row['beta_fallback_share']:.1f} % of tensor-steps; "
        f"median beta {row['beta_median']:.4g}."
        for method, row in means.iterrows()
    ]


def draw(methods: dict[str, list[Run]], metrics: dict[str, dict], out: Path) -> None:
    """The figures over methods: accuracy over the stages (mean over seeds), Avg.ACC against Forgetting."""
    lines, points = {}, {}
    for label, members in methods.items():
        matrices = [read_matrix(output_folder(run) / "matrix.csv")[0] for run in members]
        lines[label] = (np.mean(matrices, axis=0), members[0].tasks)
        if metrics[members[0].name]["Forgetting"] is not None:
            points[label] = np.array([[metrics[m.name][k] for k in ("Avg.ACC", "Forgetting")] for m in members])
    accuracy_over_stages(lines, out / "accuracy_over_stages.png")
    if points:
        average_vs_forgetting(points, out / "average_vs_forgetting.png")


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="eval_all.sh", description=__doc__.splitlines()[0])
    parser.add_argument("--run", nargs="+", default=[], help="names of runs; without: every folder with a recipe")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    parser.add_argument("--split", choices=["test", "dev"], default="test")
    parser.add_argument(
        "--out", type=Path, help="folder for the tables and figures over runs; default: RUNS_DIR/tables"
    )
    parser.add_argument("--paper", action="store_true", help="add the rows of the paper's Table 1")
    options = parser.parse_args(arguments)
    names = options.run or sorted(p.parent.name for p in options.runs_dir.glob("*/recipe.yaml"))
    if not names:
        sys.exit(f"{options.runs_dir}: no runs; train one with: bash train_continual.sh")
    try:
        report([options.runs_dir / name for name in names], options)
    except (ValueError, OSError) as error:
        if os.environ.get("LLACA_TRACEBACK"):
            raise
        sys.exit(f"eval.report: {error}\n(LLACA_TRACEBACK=1 shows where)")


def report(folders: list[Path], options: argparse.Namespace) -> None:
    """Scores the runs and prints a table for every set of comparable ones."""
    runs, metrics = [], {}
    for folder in folders:
        run = open_run(folder, options.split)
        if not run.complete:
            print(f"{run.name}: {len(run.stages)} stages are done, the stream is not; it is in no table yet")
        if run.complete or run.stages:
            runs.append(run)
    cells = sum(len(missing_cells(run)) for run in runs)
    if cells:
        print(f"{len(runs)} runs, {cells} test sets to answer: CoIN-mini takes about a second each", flush=True)
    for run in runs:
        metrics[run.name] = score_run(run)
    tables: dict[tuple, list[Run]] = defaultdict(list)
    for run in runs:
        if run.complete:
            tables[comparable(run)].append(run)
    out = options.out or options.runs_dir / "tables"
    for number, members in enumerate(tables.values(), start=1):
        where = out if len(tables) == 1 else out / str(number)
        stream = members[0].recipe.stream
        print(f"\n{stream.data_root}, {stream.order} order, {stream.instructions} instructions, {options.split} split")
        print(summary(members, metrics, where, options.paper))
        print(f"Tables (txt, md, csv, tex) and figures: {where}")


if __name__ == "__main__":
    main()
