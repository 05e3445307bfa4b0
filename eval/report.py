"""Answers, scores, tables and figures of runs: `python -m eval.report [--run NAME ...]` (without: every run).

Writes runs/NAME/{matrix.csv,metrics.json,scores.json}, the official, legacy and lenient score of every answer under
scores/, figures/ and report.html, a page to look at, and prints one table with a row per method, the seeds of a method
taken together, with a page of its own. Runs whose streams differ get tables of their own. With --cells full, also
matrix_full.csv, with the base model's row on top, and FWT.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import webbrowser
from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from eval.figures import (
    accuracy_heatmaps,
    accuracy_over_stages,
    average_vs_forgetting,
    beta_moves,
    beta_over_steps,
)
from eval.kept import KeptRun, named_matrix, write_runs
from eval.page import run_page, tables_page
from eval.predict import answer_share, merge_parts
from eval.published import publish
from eval.retained import score_retained
from eval.run_statistics import (
    blind_notes,
    fallback_notes,
    format_notes,
    run_statistics,
    scoring_notes,
)
from eval.runs import EvaluatedRun, RetainedRun, arguments, chosen_runs, retained
from eval.scored import baseline, beta_traces, method_label, score_run
from eval.tables import Table, method_row, results_table
from eval.tasks import MODES
from llaca import machine

ALONE = 4000  # questions that one process answers about as fast as two, which have to start first
LINES = 10  # that a figure can tell apart
FORMATS = {"txt": Table.text, "md": Table.markdown, "csv": Table.csv, "tex": Table.latex}


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
        seeds = [other.seed for other in methods[label]]
        methods[f"{label} [{run.name}]" if run.seed in seeds else label].append(run)
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
    notes += [*format_notes(behind, metrics), *blind_notes(behind, metrics, majority), *fallback_notes(behind)]
    table = replace(table, notes=tuple(notes))
    write_table(table, behind, runs, out)
    draw(methods, metrics, out)
    for run in runs:
        run_page(run, metrics[run.name], majority)
        publish(run, metrics[run.name])
    tables_page(table, methods, metrics, out)
    return table.text()


def write_table(table: Table, behind: pd.DataFrame, runs: list[EvaluatedRun | KeptRun], out: Path) -> None:
    """table.{txt,md,csv,tex}, and what lies behind it (eval/kept.py)."""
    out.mkdir(parents=True, exist_ok=True)
    for suffix, render in FORMATS.items():
        (out / f"table.{suffix}").write_text(render(table), encoding="utf-8")
    write_runs(behind, runs, out)


def draw(methods: dict[str, list[EvaluatedRun | KeptRun]], metrics: dict[str, dict], out: Path) -> None:
    """The figures over methods: every matrix (mean over seeds), accuracy over the stages (if the lines can be told
    apart), Avg.ACC against Forgetting, and beta over the steps of the first run of each method whose beta moves, and
    whose steps are still there."""
    lines, points, betas = {}, {}, {}
    for label, members in methods.items():
        lines[label] = (np.mean([named_matrix(run)[0] for run in members], axis=0), members[0].tasks)
        if metrics[members[0].name]["Forgetting"] is not None:
            points[label] = np.array([[metrics[m.name][k] for k in ("Avg.ACC", "Forgetting")] for m in members])
        traces = [] if isinstance(members[0], KeptRun) else beta_traces(members[0])
        if beta_moves(traces):
            betas[f"{label}, seed {members[0].seed}"] = traces
    if len(lines) <= LINES:
        accuracy_over_stages(lines, out / "accuracy_over_stages.png")
    if points:
        accuracy_heatmaps(lines, out / "accuracy_matrices.png")
        average_vs_forgetting(points, out / "average_vs_forgetting.png")
    if betas:
        beta_over_steps(betas, out / "beta_over_steps.png")


def main(given: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="eval_all.sh", description=__doc__.splitlines()[0])
    arguments(parser)
    parser.add_argument("--num-gpus", type=int, help="processes that answer; default: one a GPU, or one a CPU core")
    parser.add_argument(
        "--out", type=Path, help="folder for the tables and figures over runs; default: RUNS_DIR/tables[-SCORING]"
    )
    parser.add_argument("--open", action="store_true", help="print the page's address, and open it in a browser")
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
    """Fills the answer files that are missing, with several processes where there is work for them. The runs are all
    RetainedRuns, or none of them is."""
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
    if isinstance(runs[0], RetainedRun):
        line += ["--only-retained", *(["--retained", options.retained] if options.retained else [])]
    line += ["--batch-size", str(options.batch_size)] if options.batch_size else []
    if status := subprocess.call(line):
        sys.exit(status)


def report(options: argparse.Namespace) -> None:
    """Answers and scores the runs and prints a table for every set of comparable ones."""
    runs, metrics = [], {}
    for run in chosen_runs(options):
        run.scoring = options.scoring
        if not run.complete:
            done = len(run.stages)
            print(f"{run.name}: {done} stages are done, the stream is not; it is in no table yet, its page shows them")
        if run.complete or run.stages:
            runs.append(run)
    answer(runs, options)
    kept = {run.name: own for run in runs if (own := retained(run, options.retained))}
    if kept:
        answer(list(kept.values()), options)
    for run in runs:
        metrics[run.name] = score_run(run)
        if run.name in kept and run.complete:
            metrics[run.name] |= score_retained(kept[run.name])
        if not run.complete:
            run_page(run, {}, baseline(run)[0])
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
        print(f"Tables (txt, md, csv, tex) and figures: {where}; to look at: {where / 'report.html'}")
        if options.open:
            show(where / "report.html")


def show(page: Path) -> None:
    """Print a page's address, and open it where there is a screen to open it on."""
    address = page.resolve().as_uri()
    print(address)
    if sys.platform in ("darwin", "win32") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        webbrowser.open(address)


if __name__ == "__main__":
    main()
