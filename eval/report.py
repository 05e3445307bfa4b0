"""Answers, scores, tables and figures of runs: `python -m eval.report [--run NAME ...]` (without: every run).

Writes runs/NAME/{matrix.csv,metrics.json,scores.json}, the official, legacy and lenient score of every answer under
scores/, and figures/, and prints one table with a row per method, the seeds of a method taken together. Runs whose
streams differ get tables of their own. With --cells full, also matrix_full.csv, with the base model's row on top, and
FWT.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections import defaultdict
from dataclasses import asdict, fields, replace
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from eval.figures import (
    accuracy_heatmap,
    accuracy_heatmaps,
    accuracy_over_stages,
    average_vs_forgetting,
    beta_moves,
    beta_over_steps,
)
from eval.metrics import forward_transfer, text_figures
from eval.predict import BASE, EvaluatedRun, answer_share, arguments, chosen_runs, merge_parts
from eval.run_statistics import (
    blind_notes,
    fallback_notes,
    format_notes,
    majority_notes,
    run_statistics,
    scoring_notes,
    stories,
)
from eval.score import QuestionSet, TaskScore, majority_score, read_answers, score_task
from eval.tables import Table, method_row, read_matrix, results_table, write_matrix, write_metrics
from eval.tasks import MODES, task_of
from eval.tasks.rouge import RougeL
from llaca import machine

ALONE = 4000  # questions that one process answers about as fast as two, which have to start first
LINES = 10  # that a figure can tell apart
FORMATS = {"txt": Table.text, "md": Table.markdown, "csv": Table.csv, "tex": Table.latex}


def output_folder(run: EvaluatedRun) -> Path:
    """Where a run's figures go: the run folder, or a folder in it for another split than the test sets and another
    scoring than the official one."""
    own = [name for name, usual in ((run.split, "test"), (run.scoring, "official")) if name != usual]
    return run.folder.joinpath(*own)


def question_set(run: EvaluatedRun, task: str) -> QuestionSet:
    """The questions of a task that the run answers."""
    stream = run.recipe.stream
    where = (stream.data_root, task, stream.instructions, run.split)
    return QuestionSet(*where, stream.max_test_samples, stream.unchecked)


def score_run(run: EvaluatedRun) -> dict:
    """Scores every cell and writes the run's files; returns its metrics, of the accuracies by `run.scoring`, and, as
    "format", the percentage of answers in the form that the task asks for, by task after the last stage, and, as
    "left_out", the number of each task's questions that cannot be scored, and, as "learnt", each task's accuracy right
    after its own stage, where there are several.

    A run that is not complete gets the matrix of its stages so far and, for want of a last row, no metrics.json.
    """
    folder = output_folder(run)
    folder.mkdir(parents=True, exist_ok=True)

    @cache  # with grouping, many cells are one file
    def score(holder: str, task: str) -> TaskScore:
        answers = read_answers(run.answer_file(holder, task))
        found = score_task(answers, question_set(run, task))
        each = folder / "scores" / holder / f"{task}.csv"
        each.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame.from_dict(found.per_question, orient="index").to_csv(each, index_label="question_id")
        return found

    scores = {(stage, task): score(holder, task) for stage, row in run.rows for task, holder in row.items()}
    cells = [
        {
            "stage": stage,
            "task": task,
            "parameters": holder,
            **{mode: scores[stage, task].accuracy[mode] for mode in MODES},
            "format_rate": scores[stage, task].format_rate,
            "questions": scores[stage, task].n,
            "missing": scores[stage, task].missing,
            "left_out": scores[stage, task].left_out,
        }
        for stage, row in run.rows
        for task, holder in row.items()
    ]
    (folder / "scores.json").write_text(json.dumps(cells, indent=1) + "\n", encoding="utf-8")
    stages = [stage for stage, _ in run.rows if stage != BASE or not run.trains]
    tasks = [task for stage in run.stages for task in stage.tasks] or run.tasks
    whole = pd.DataFrame(np.nan, index=[stage for stage, _ in run.rows], columns=run.tasks)
    for (stage, task), result in scores.items():
        whole.loc[stage, task] = result.accuracy[run.scoring]
    A = whole.loc[stages, tasks].to_numpy(copy=True)
    if len(A) > 1:
        A[np.triu_indices(len(A), 1)] = np.nan
    write_matrix(folder / "matrix.csv", A, stages, tasks)
    (folder / "figures").mkdir(exist_ok=True)
    accuracy_heatmap(A, tasks, run.name, folder / "figures" / "accuracy_matrix.png")
    (folder / "metrics.json").unlink(missing_ok=True)
    if not run.complete:
        return {}
    extra = {}
    if run.cells == "full" and run.trains:
        whole.to_csv(folder / "matrix_full.csv", index_label="stage", float_format="%.10g")
        if len(A) > 1:
            extra["FWT"] = forward_transfer(whole.loc[stages].to_numpy(), whole.loc[BASE].to_numpy())
    if all(isinstance(task_of(run.recipe.stream.data_root, task), RougeL) for task in tasks):
        extra |= text_figures(whole.loc[stages, tasks].to_numpy())
    metrics = write_metrics(folder / "metrics.json", A, tasks, extra)
    last = {task: scores[stages[-1], task] for task in tasks}
    told = {"format": {task: score.format_rate for task, score in last.items()}}
    if len(A) > 1:
        told["learnt"] = dict(zip(tasks, np.diag(A).tolist(), strict=True))
    return metrics | told | {"left_out": {task: score.left_out for task, score in last.items()}}


def method_label(run: EvaluatedRun) -> str:
    """What a table calls the run's method: its name, the rule of its average, grouping, and what else was chosen."""
    method, own = run.recipe.method, asdict(run.recipe.settings)
    own.pop("beta_trace", None)  # changes no result
    rules = [own.pop("average")] if "average" in own else []
    chosen = {f.name: getattr(method, f.name) for f in fields(method) if getattr(method, f.name) != f.default}
    chosen = {key: value for key, value in (chosen | own).items() if value is not None}
    shown = [f"{key} {value}" for key, value in chosen.items() if key not in ("method", "grouping")]
    rule = ", ".join(rules + shown)
    return method.method + (f" ({rule})" if rule else "") + (" + grouping" if method.grouping else "")


def learning_rates(run: EvaluatedRun) -> str:
    """Those of LoRA and of the projector."""
    return f"{run.recipe.train.learning_rate:g} and {run.recipe.train.projector_learning_rate:g}"


def by_method(runs: list[EvaluatedRun]) -> dict[str, list[EvaluatedRun]]:
    """The runs of each row of a table: seeds of one method with the same settings and learning rates."""
    methods, rates = defaultdict(list), defaultdict(set)
    for run in runs:
        rates[method_label(run)].add(learning_rates(run))
    for run in runs:
        label = method_label(run)
        if len(rates[label]) > 1:
            label += f" (learning rates {learning_rates(run)})"
        seeds = [other.recipe.run.seed for other in methods[label]]
        methods[f"{label} [{run.name}]" if run.recipe.run.seed in seeds else label].append(run)
    return methods


def comparable(run: EvaluatedRun) -> tuple[tuple[str, str], ...]:
    """(field, value) of what runs of one table have in common; the learning rates may be a method's own."""
    recipe, rates = run.recipe, ("learning_rate", "projector_learning_rate")
    told = asdict(recipe.stream) | asdict(recipe.model) | asdict(recipe.train) | {"split": run.split}
    return tuple((name, str(value)) for name, value in told.items() if name not in rates)


def summary(runs: list[EvaluatedRun], metrics: dict[str, dict], out: Path, paper: bool = False) -> str:
    """The table over comparable runs, seeds taken together; files and figures into `out`."""
    methods = by_method(runs)
    rows = [method_row(label, [metrics[run.name] for run in members]) for label, members in methods.items()]
    majority, left_out = baseline(runs[0])
    table = results_table(rows, majority, paper)
    behind = run_statistics(methods, metrics)
    notes = [*scoring_notes(runs[0].scoring, paper), *table.notes, *left_out]
    notes += [*format_notes(methods, metrics), *blind_notes(methods, metrics, majority), *fallback_notes(behind)]
    table = replace(table, notes=tuple(notes))
    write_table(table, behind, runs, out)
    draw(methods, metrics, out)
    return table.text()


def baseline(run: EvaluatedRun) -> tuple[dict[str, float], list[str]]:
    """The question-only majority baseline of every task, in percent, on the run's test sets and by its scoring, and
    the lines under a table on what it left out."""
    found = {task: majority_score(question_set(run, task), run.scoring) for task in run.recipe.stream.tasks}
    left_out = {task: answers for task, (_, answers) in found.items()}
    return {task: accuracy for task, (accuracy, _) in found.items()}, majority_notes(left_out)


def write_table(table: Table, behind: pd.DataFrame, runs: list[EvaluatedRun], out: Path) -> None:
    """table.{txt,md,csv,tex}, and what lies behind it: runs.csv (`run_statistics`) and matrices.csv, all cells of all
    runs."""
    out.mkdir(parents=True, exist_ok=True)
    for suffix, render in FORMATS.items():
        (out / f"table.{suffix}").write_text(render(table), encoding="utf-8")
    behind.to_csv(out / "runs.csv", index=False, float_format="%.4g")
    cells = []
    for run in runs:
        A, stages, tasks = read_matrix(output_folder(run) / "matrix.csv")
        found = pd.DataFrame(A, index=stages, columns=tasks).stack().dropna()
        cells += [(run.name, stage, task, accuracy) for (stage, task), accuracy in found.items()]
    frame = pd.DataFrame(cells, columns=["run", "stage", "task", "accuracy"])
    frame.to_csv(out / "matrices.csv", index=False, float_format="%.10g")


def draw(methods: dict[str, list[EvaluatedRun]], metrics: dict[str, dict], out: Path) -> None:
    """The figures over methods: every matrix (mean over seeds), accuracy over the stages (if the lines can be told
    apart), Avg.ACC against Forgetting, and beta over the steps of the first run of each method whose beta moves."""
    lines, points, betas = {}, {}, {}
    for label, members in methods.items():
        matrices = [read_matrix(output_folder(run) / "matrix.csv")[0] for run in members]
        lines[label] = (np.mean(matrices, axis=0), members[0].tasks)
        if metrics[members[0].name]["Forgetting"] is not None:
            points[label] = np.array([[metrics[m.name][k] for k in ("Avg.ACC", "Forgetting")] for m in members])
        traces = beta_traces(members[0])
        if beta_moves(traces):
            betas[f"{label}, seed {members[0].recipe.run.seed}"] = traces
    if len(lines) <= LINES:
        accuracy_over_stages(lines, out / "accuracy_over_stages.png")
    if points:
        accuracy_heatmaps(lines, out / "accuracy_matrices.png")
        average_vs_forgetting(points, out / "average_vs_forgetting.png")
    if betas:
        beta_over_steps(betas, out / "beta_over_steps.png")


def beta_traces(run: EvaluatedRun) -> list[tuple[str, int, pd.DataFrame | None]]:
    """(task, optimizer steps, beta.csv) of every stage, as `beta_over_steps` takes them."""
    found = []
    for stage, story in zip(run.stages, stories(run), strict=True):
        path = stage.folder / "beta.csv"
        trace = pd.read_csv(path) if path.is_file() else None
        if trace is not None and "tensor" in trace:  # --beta_trace full
            steps = trace.groupby("step")
            quantiles = steps["beta"].quantile([0.05, 0.5, 0.95]).unstack()
            trace = quantiles.set_axis(["beta_q05", "beta_q50", "beta_q95"], axis=1)
            trace = trace.assign(fallback_share=steps["fallback"].mean()).reset_index()
        found.append((stage.task, story["steps"], trace))
    return found


def main(given: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="eval_all.sh", description=__doc__.splitlines()[0])
    arguments(parser)
    parser.add_argument("--num-gpus", type=int, help="processes that answer; default: one a GPU, or one a CPU core")
    parser.add_argument(
        "--out", type=Path, help="folder for the tables and figures over runs; default: RUNS_DIR/tables[-SCORING]"
    )
    parser.add_argument("--paper", action="store_true", help="add the rows of the paper's Table 1")
    parser.add_argument("--scoring", choices=MODES, default="official", help="of answers, see docs/BENCHMARKS.md")
    options = parser.parse_args(given)
    try:
        report(options)
    except (ValueError, OSError) as error:
        if os.environ.get("LLACA_TRACEBACK"):
            raise
        sys.exit(f"eval.report: {error}\n(LLACA_TRACEBACK=1 shows where)")


def answer(runs: list[EvaluatedRun], options: argparse.Namespace) -> None:
    """Fills the answer files that are missing, with several processes where there is work for them."""
    cells = [(run, task) for run in runs for _, task in run.missing()]
    questions = sum(len(run.questions[task]) for run, task in cells)
    if not cells:
        return
    processes = options.num_gpus or torch.cuda.device_count() or machine.side_by_side()
    if questions < ALONE and options.num_gpus is None:
        processes = 1
    print(
        f"{len(runs)} runs, {len(cells)} test sets, {questions:,} questions to answer with {processes} processes; "
        "CoIN-mini takes about a minute for 20,000",
        flush=True,
    )
    if processes == 1:
        answer_share(runs, 0, 1, options.batch_size)
        return merge_parts(runs)
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    line += ["-m", "--", "eval.predict"]
    line += ["--runs-dir", str(options.runs_dir), "--run", *[run.name for run in runs]]
    line += ["--split", options.split, "--cells", options.cells]
    line += ["--batch-size", str(options.batch_size)] if options.batch_size else []
    if status := subprocess.call(line):
        sys.exit(status)


def report(options: argparse.Namespace) -> None:
    """Answers and scores the runs and prints a table for every set of comparable ones."""
    runs, metrics = [], {}
    for run in chosen_runs(options):
        run.scoring = options.scoring
        if not run.complete:
            print(f"{run.name}: {len(run.stages)} stages are done, the stream is not; it is in no table yet")
        if run.complete or run.stages:
            runs.append(run)
    answer(runs, options)
    for run in runs:
        metrics[run.name] = score_run(run)
    tables: dict[tuple, list[EvaluatedRun]] = defaultdict(list)
    for run in runs:
        if run.complete:
            tables[comparable(run)].append(run)
    usual = "tables" if options.scoring == "official" else f"tables-{options.scoring}"
    out = options.out or options.runs_dir / usual
    for key, members in tables.items():
        stream, name = members[0].recipe.stream, hashlib.sha256(repr(key).encode()).hexdigest()[:6]
        where = out if len(tables) == 1 else out / f"{Path(stream.data_root).name}-{name}"
        print(f"\n{stream.data_root}, {stream.order} order, {stream.instructions} instructions, {options.split} split")
        if apart := [
            f"{field} {value}" for field, value in key if any((field, value) not in other for other in tables)
        ]:
            print(f"Runs that differ in these stand in tables of their own: {', '.join(apart)}")
        print(summary(members, metrics, where, options.paper))
        print(f"Tables (txt, md, csv, tex) and figures: {where}")


if __name__ == "__main__":
    main()
