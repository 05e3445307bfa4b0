"""A run, and a table of runs, as one page each: `python -m eval.page [--run NAME ...]`, after eval_all.sh.

    runs/NAME/report.html            the accuracy matrix, curves, beta, groups, every question with its answers, costs
    runs/tables/report.html          the table, Avg.ACC against Forgetting, links to the runs' pages

A page is one file and asks the network for nothing: style, script, charts (Vega-Lite, bundled by vl-convert) and
pictures are in it. What comes from data or a model is set as text, never as markup (eval/pages/). Pictures stand in it
up to PICTURES bytes, those of questions that changed first; of a large test set the questions that changed and a
sample, up to QUESTIONS.
"""

import argparse
import base64
import io
import json
import random
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from data.benchmark import open_benchmark
from eval.answered import Answered, answered
from eval.charts import beta_chart, line_chart, scatter
from eval.kept import KeptRun
from eval.metrics import DEFINITIONS
from eval.page_template import embedded, part, rendered
from eval.retained import matrix_of
from eval.run_statistics import stories
from eval.runs import EvaluatedRun, arguments, chosen_runs
from eval.scored import baseline, beta_traces, method_label, output_folder
from eval.tables import Table
from llaca.pool import Pool
from llaca.stream import write_atomically

PICTURES = 5_000_000  # bytes of base64 in a page
QUESTIONS = 1500  # of a task
SIDE = 192  # pixels of a picture that is too large to be taken as it is
AS_IT_IS = 12_000  # bytes of a file
MODES = ("official", "lenient")
ORIGIN = ("commit", "started", "machine", "torch", "transformers", "peft")


# --- a run ---


def run_page(run: EvaluatedRun, metrics: dict[str, Any], majority: dict[str, float]) -> Path:
    """Writes the page of a run that is answered and scored, and returns its path."""
    stages = {stage.name: stage for stage in run.stages}
    rows = [
        {"stage": name, "tasks": list(stages[name].tasks) if name in stages else [], "holders": holders}
        for name, holders in run.rows
    ]
    tests = [answered(run, task, dict.fromkeys(row["holders"][task] for row in rows if task in row["holders"]))
             for task in run.tasks if any(task in row["holders"] for row in rows)]  # fmt: skip
    shown = [chosen_questions(run, one, rows) for one in tests]
    pictures, numbers = embedded_pictures(tests, shown, rows)
    tasks = [task_data(one, own, numbers) for one, own in zip(tests, shown, strict=True)]
    traces = beta_traces(run)
    kept = matrix_of(run)
    charts = {
        "curves": line_chart(accuracies(run, tests, rows), "task"),
        "beta": beta_chart(traces),
        "retained": None if kept is None else line_chart(kept, "skill"),
    }
    told, stream = stories(run), run.recipe.stream
    environment = json.loads((run.folder / "environment.json").read_text(encoding="utf-8"))
    content = {
        "tasks": tasks,
        "rows": rows,
        "pictures": pictures,
        "charts": charts,
        "first": int(np.argmax([len(changed(one, rows)) for one in tests])),
    }
    page = rendered(
        "run.html.j2",
        run={
            "name": run.name,
            "label": method_label(run),
            "benchmark": open_benchmark(stream.data_root).name,
            "order": stream.order,
            "instructions": stream.instructions,
            "split": run.split,
            "scoring": run.scoring,
        },
        tasks=[one.task for one in tests],
        figures=key_figures(metrics),
        notes=page_notes(run, tests, shown, pictures),
        matrix=matrix_rows(run, tests, rows),
        majority=[f"{majority[one.task]:.1f}" for one in tests],
        has_beta=charts["beta"] is not None,
        kept=[]
        if kept is None
        else [(name, f"{column.iloc[0]:.1f}", f"{column.iloc[-1]:.1f}") for name, column in kept.items()],
        groups=group_rows(run),
        similarities=[
            {"stage": story["stage"], "scores": ", ".join(f"{value:.2f}" for value in story["similarity"])}
            for story in told
            if story["similarity"]
        ],
        costs=cost_rows(told),
        origin=[(key, environment[key]) for key in ORIGIN if key in environment],
        again=again(run),
        data=embedded(content),
        script=part("charts.js", "run.js"),
    )
    path = output_folder(run) / "report.html"
    write_atomically(path, page)
    return path


def key_figures(metrics: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(name, value, meaning) of the run's figures that are defined."""
    return [
        (name, f"{metrics[name]:.1f}", meaning)
        for name, meaning in DEFINITIONS.items()
        if metrics.get(name) is not None
    ]


def right(one: Answered, holder: str, place: int) -> bool:
    """Whether an answer is right by the official score, as the page counts it."""
    return (one.scores[holder]["official"][place] or 0) >= 0.5


def own_and_last(task: str, rows: Sequence[dict]) -> tuple[str, str]:
    """Whose parameters answer a task right after its own stage, and at the end."""
    holders = [row["holders"][task] for row in rows if task in row["holders"]]
    own = [row["holders"][task] for row in rows if task in row["tasks"] and task in row["holders"]]
    return (own or holders)[0], holders[-1]


def changed(one: Answered, rows: Sequence[dict]) -> list[int]:
    """Places of the questions that were right after the task's own stage and are wrong at the end."""
    own, last = own_and_last(one.task, rows)
    return [place for place in range(len(one.ids)) if right(one, own, place) and not right(one, last, place)]


def chosen_questions(run: EvaluatedRun, one: Answered, rows: Sequence[dict]) -> list[int]:
    """Places of the questions that the page holds: all, or those that changed and a sample of the others."""
    every = range(len(one.ids))
    if len(every) <= QUESTIONS:
        return list(every)
    draw = random.Random(f"{run.seed} {one.task}")
    first = changed(one, rows)
    first = draw.sample(first, min(len(first), QUESTIONS // 2))
    rest = draw.sample(sorted(set(every) - set(first)), QUESTIONS - len(first))
    return sorted([*first, *rest])


def embedded_pictures(
    tests: Sequence[Answered], shown: Sequence[list[int]], rows: Sequence[dict]
) -> tuple[list[str], dict[Path, int]]:
    """Pictures as data URLs, up to PICTURES bytes, and the number of each by its path. Of every task in turn, those of
    questions that changed first."""
    queues = []
    for one, own in zip(tests, shown, strict=True):
        first = set(changed(one, rows))
        order = [*(place for place in own if place in first), *(place for place in own if place not in first)]
        queues.append([one.pictures[place] for place in order if one.pictures[place] is not None])
    found, numbers, size = [], {}, 0
    for turn in range(max(map(len, queues), default=0)):
        for queue in queues:
            path = queue[turn] if turn < len(queue) else None
            if path is None or path in numbers:
                continue
            try:
                url = data_url(path)
            except OSError:  # it was there when it was asked about; its name stands in the page
                continue
            if size + len(url) > PICTURES:
                return found, numbers
            numbers[path] = len(found)
            found.append(url)
            size += len(url)
    return found, numbers


def data_url(path: Path) -> str:
    """A picture in a data URL: a small PNG or JPEG as it is, else a JPEG of SIDE pixels."""
    content, kind = path.read_bytes(), {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg"}.get(path.suffix.lower())
    if kind is None or len(content) > AS_IT_IS:
        with Image.open(io.BytesIO(content)) as picture:
            small = picture.convert("RGB")
        small.thumbnail((SIDE, SIDE))
        out, kind = io.BytesIO(), "jpeg"
        small.save(out, "jpeg", quality=80)
        content = out.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def task_data(one: Answered, shown: Sequence[int], numbers: dict[Path, int]) -> dict[str, Any]:
    """What the page's script knows of a task."""

    def taken(values):
        return [values[place] for place in shown]

    pictures = taken(one.pictures)
    return {
        "name": one.task,
        "total": len(one.ids),
        "ids": taken(one.ids),
        "texts": taken(one.texts),
        "right": taken(one.right),
        "pictures": [numbers.get(path) for path in pictures],
        "names": [None if path is None else path.name for path in pictures],
        "answers": {holder: taken(texts) for holder, texts in one.answers.items()},
        "scores": {
            holder: {mode: [None if v is None else round(v, 3) for v in taken(scores[mode])] for mode in MODES}
            for holder, scores in one.scores.items()
        },
    }


def accuracies(run: EvaluatedRun, tests: Sequence[Answered], rows: Sequence[dict]) -> pd.DataFrame:
    """Percent by stage and task, NaN where nothing was asked, of the scores that the run is scored by."""
    mode = "official" if run.scoring == "legacy" else run.scoring
    found = pd.DataFrame(np.nan, index=[row["stage"] for row in rows], columns=[one.task for one in tests])
    for row in rows:
        for one in tests:
            if (holder := row["holders"].get(one.task)) is not None:
                values = [value or 0.0 for value in one.scores[holder][mode]]
                found.loc[row["stage"], one.task] = 100 * float(np.mean(values))
    return found


def matrix_rows(run: EvaluatedRun, tests: Sequence[Answered], rows: Sequence[dict]) -> list[dict]:
    """The heat map's rows: a cell has its task, its value, and its shade between 0 and 1."""
    found = accuracies(run, tests, rows)
    return [
        {
            "stage": stage,
            "cells": [
                None if np.isnan(value) else {"task": task, "value": f"{value:.1f}", "share": f"{value / 100:.3f}"}
                for task, value in cells.items()
            ],
        }
        for stage, cells in found.iterrows()
    ]


def group_rows(run: EvaluatedRun, most: int = 3) -> list[dict[str, Any]]:
    """What each parameter set was trained on, and some of the instructions that lead to it."""
    if not run.stages:
        return []
    pool = Pool.from_json((run.stages[-1].folder / "codebook.json").read_text(encoding="utf-8"))
    texts = pool.codebook.groups if pool.grouping else [[] for _ in pool.holders]
    return [
        {"holder": holder, "members": members, "instructions": own[:most], "more": max(0, len(own) - most)}
        for holder, members, own in zip(pool.holders, pool.members, texts, strict=True)
    ]


def cost_rows(told: Sequence[dict]) -> list[dict[str, str]]:
    """What every stage took."""
    return [
        {
            "stage": story["stage"],
            "samples": f"{story['samples']:,}",
            "steps": f"{story['steps']:,}",
            "seconds": f"{story['seconds']:,.0f}",
            "memory": f"{story['peak_memory_bytes'] / 1e9:.2f}" if "peak_memory_bytes" in story else "-",
            "start": story["start"] or "untrained LoRA",
            "fallback": f"{100 * story['beta_fallback_share']:.1f} %" if "beta_fallback_share" in story else "-",
        }
        for story in told
    ]


def page_notes(
    run: EvaluatedRun, tests: Sequence[Answered], shown: Sequence[list[int]], pictures: Sequence[str]
) -> list[str]:
    """What the page leaves out, and what is not done."""
    notes = [] if run.complete else [f"{len(run.stages)} stages are done; the stream is not."]
    total, held = sum(len(one.ids) for one in tests), sum(map(len, shown))
    if held < total:
        notes.append(f"The page holds {held:,} of {total:,} questions: those that changed, and a sample.")
    wanted = {one.pictures[place] for one, own in zip(tests, shown, strict=True) for place in own} - {None}
    if len(pictures) < len(wanted):
        notes.append(f"{len(pictures):,} of {len(wanted):,} pictures stand in it; of the others their file's name.")
    if run.scoring == "legacy":
        notes.append("The released evaluators score whole files; questions are shown by their official scores.")
    return notes


def again(run: EvaluatedRun) -> str:
    """The commands that train, evaluate and show the run once more."""
    folder = shlex.quote(str(run.folder))
    train = f"bash train_continual.sh --recipe {folder}/recipe.yaml --run {shlex.quote(run.name)}-again"
    return f"{train}\nbash eval_all.sh --run {shlex.quote(run.name)}-again"


# --- a table of runs ---


def tables_page(
    table: Table, methods: dict[str, list[EvaluatedRun | KeptRun]], metrics: dict[str, dict], out: Path
) -> Path:
    """Writes the page of a table, whose rows are `methods` and others', and returns its path."""
    every = [(label, run) for label, members in methods.items() for run in members]
    points = [
        {"method": label, "run": run.name, "seed": run.seed,
         **{key: metrics[run.name][key] for key in ("Avg.ACC", "Forgetting", "New.ACC")}}
        for label, run in every
        if metrics[run.name].get("Forgetting") is not None
    ]  # fmt: skip
    runs = [{"label": label, "name": run.name, "link": link(run, out)} for label, run in every]
    frame = table.frame()
    page = rendered(
        "tables.html.j2",
        title=out.name,
        columns=list(frame.columns),
        lines=[list(map(str, line)) for line in frame.itertuples(index=False)],
        notes=list(table.notes),
        runs=runs,
        has_points=bool(points),
        data=embedded({"charts": {"scatter": scatter(points) if points else None}}),
        script=part("charts.js", "tables.js"),
    )
    path = out / "report.html"
    write_atomically(path, page)
    return path


def link(run: EvaluatedRun | KeptRun, out: Path) -> str | None:
    """The way from a folder of tables to a run's page; None where it has none, or lies elsewhere."""
    if isinstance(run, KeptRun):
        return None
    page, runs = output_folder(run).resolve() / "report.html", run.folder.parent.resolve()
    if not page.is_file() or not out.resolve().is_relative_to(runs):
        return None
    up = [".."] * len(out.resolve().relative_to(runs).parts)
    return Path(*up, page.relative_to(runs)).as_posix()


def main(given: list[str] | None = None) -> None:
    """Command line: pages of runs that eval_all.sh has scored."""
    parser = argparse.ArgumentParser(prog="python -m eval.page", description=__doc__.splitlines()[0])
    arguments(parser)
    options = parser.parse_args(given)
    try:
        for run in chosen_runs(options):
            metrics = json.loads((output_folder(run) / "metrics.json").read_text(encoding="utf-8"))
            print(run_page(run, metrics, baseline(run)[0]))
    except (ValueError, OSError) as error:
        sys.exit(f"eval.page: {error}")


if __name__ == "__main__":
    main()
