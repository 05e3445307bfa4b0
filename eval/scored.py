"""A run's scores: what is written into its folder, and what tables, figures and pages know of it."""

import json
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

from eval.figures import accuracy_heatmap
from eval.metrics import forward_transfer, text_figures
from eval.run_statistics import majority_notes, stories
from eval.runs import BASE, EvaluatedRun
from eval.score import QuestionSet, TaskScore, majority_score, read_answers, score_task
from eval.tables import write_matrix, write_metrics
from eval.tasks import MODES, task_of
from eval.tasks.rouge import RougeL


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


def baseline(run: EvaluatedRun) -> tuple[dict[str, float], list[str]]:
    """The question-only majority baseline of every task, in percent, on the run's test sets and by its scoring, and
    the lines under a table on what it left out."""
    found = {task: majority_score(question_set(run, task), run.scoring) for task in run.recipe.stream.tasks}
    left_out = {task: answers for task, (_, answers) in found.items()}
    return {task: accuracy for task, (accuracy, _) in found.items()}, majority_notes(left_out)


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
