"""What lies behind a table: the facts of its runs, what they cost, how rows differ, and the lines under it."""

import json

import numpy as np
import pandas as pd

from eval.metrics import BESIDE, KEYS
from eval.runs import EvaluatedRun
from eval.score import Majority


def run_statistics(methods: dict[str, list[EvaluatedRun]], metrics: dict[str, dict]) -> pd.DataFrame:
    """What lies behind a table, a row per run: commit, cost of training, figures, and how often beta fell back.

    Seconds per step are of the stages' whole time, what a method does after its last step included. A run that was
    continued at another commit has both.
    """
    rows = []
    for label, run in ((label, run) for label, members in methods.items() for run in members):
        told = stories(run)
        first = json.loads((run.folder / "environment.json").read_text(encoding="utf-8"))
        commits = dict.fromkeys(story.get("environment", first)["commit"] for story in told) or [first["commit"]]
        averaged = [story for story in told if "beta_median" in story]
        rows.append(
            {
                "run": run.name,
                "method": label,
                "seed": run.seed,
                "commit": " ".join(commits),
                "minutes": sum(story["seconds"] for story in told) / 60,
                "steps": (steps := sum(story["steps"] for story in told)),
                "trained parameters": most(told, "trained_parameters"),
                "seconds per step": sum(story["seconds"] for story in told) / steps if steps else None,
                "peak GB": most(told, "peak_memory_bytes", 1e9),
                **{key: metrics[run.name][key] for key in (*KEYS, *BESIDE) if key in metrics[run.name]},
                "dropped records": sum(story["dropped_records"] for story in told),
                "averaged stages": len(averaged),
                **{
                    key: np.average([s[key] for s in averaged], weights=[s["steps"] for s in averaged])
                    for key in ("beta_median", "beta_fallback_share")
                    if averaged
                },
            }
        )
    kinds = {"trained parameters": "Int64", "seconds per step": float, "peak GB": float}
    return pd.DataFrame(rows).astype(kinds)


def stories(run: EvaluatedRun) -> list[dict]:
    """What stage.json tells of every stage."""
    return [json.loads((stage.folder / "stage.json").read_text(encoding="utf-8")) for stage in run.stages]


def most(told: list[dict], key: str, unit: int = 1) -> float | None:
    """The largest of the stages' figures; None without one, as in runs of before it was recorded."""
    return max((story[key] / unit for story in told if key in story), default=None)


def costs(behind: pd.DataFrame) -> str:
    """What each method took, as a GitHub table: means over the runs of `run_statistics`, the largest peak of memory. A
    dash: recorded by none of them."""
    groups = behind.groupby("method", sort=False)
    lines = [["Method", "Trained parameters", "Steps", "Seconds per step", "Minutes", "Peak memory, GB"], ["---"]]
    lines[1] += ["---:"] * 5
    forms = {
        "trained parameters": ",.0f",
        "steps": ",.0f",
        "seconds per step": ".3f",
        "minutes": ".1f",
        "peak GB": ".2f",
    }
    for method, runs in groups:
        mean = runs.mean(numeric_only=True)
        mean["peak GB"] = runs["peak GB"].max()
        if mean["steps"]:
            told = [format(mean[key], form) if pd.notna(mean[key]) else "-" for key, form in forms.items()]
            lines.append([method, *told])
    notes = [
        "Seconds per step: the stages' whole time by their steps, with what the method does between and after them.",
        "Peak memory: of the process with most; on a GPU what torch allocated, else resident, libraries included.",
    ]
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", *(f"- {note}" for note in notes), ""])


def scoring_notes(scoring: str, printed: bool) -> list[str]:
    """By which rules the answers are scored, and the lines that the paper printed, if there are any."""
    rules = {
        "official": "the rule of each benchmark",
        "legacy": "as the released evaluators do",
        "lenient": "the form of an answer forgiven",
    }
    notes = [f"Scoring: {scoring}, {rules[scoring]} (docs/BENCHMARKS.md)."]
    told = "The paper's lines were scored by the released evaluators; --scoring legacy scores these runs so."
    return [*notes, told] if printed and scoring != "legacy" else notes


def majority_notes(found: dict[str, Majority]) -> list[str]:
    """What of each task's training file the question-only majority could not use, for the lines under the table."""
    notes = []
    for task, answers in found.items():
        if answers.records_left_out:
            notes.append(
                f"Question-only majority: {answers.records_left_out:,} broken records of {task} were left out."
            )
        if answers.answers_left_out:
            notes.append(
                f"Question-only majority: {answers.answers_left_out:,} training answers of {task} that are no box were "
                "left out."
            )
    return notes


def blind_notes(behind: pd.DataFrame, metrics: dict[str, dict], majority: dict[str, float]) -> list[str]:
    """Of each method the tasks that it answers no better, right after their own stage, than the question-only majority
    does, which never sees a picture or a text."""
    notes = []
    for label, members in behind.groupby("method", sort=False)["run"]:
        told = [metrics[run]["learnt"] for run in members if metrics[run].get("learnt")]
        means = {task: float(np.mean([own[task] for own in told])) for task in (told[0] if told else ())}
        if blind := [
            f"{task} {mean:.1f} (majority {majority[task]:.1f})"
            for task, mean in means.items()
            if mean <= majority[task]
        ]:
            notes.append(
                f"{label}: no better than the question-only majority right after the task's own stage, "
                f"{len(blind)} of {len(means)} tasks: {', '.join(blind)}. More records or steps, or a base "
                "that sees such inputs."
            )
    return notes


def format_notes(behind: pd.DataFrame, metrics: dict[str, dict]) -> list[str]:
    """Of each method the share of answers in the form that their task asks for, where it is not all of them: what is
    lost there may be the form of an answer, not its content. And the records and questions that were left out."""
    notes = []
    for label, members in behind.groupby("method", sort=False):
        known = pd.DataFrame([metrics[run].get("format", {}) for run in members["run"]])
        if told := [f"{task} {rate:.1f}" for task, rate in known.mean().items() if rate < 99.95]:
            notes.append(f"{label}: answers in the task's form, where not all, in percent: {', '.join(told)}.")
        if dropped := int(members["dropped records"].sum()):
            notes.append(f"{label}: {dropped:,} broken records were left out of training.")
    unscored = {task: n for run in behind["run"] for task, n in metrics[run].get("left_out", {}).items() if n}
    notes += [f"{task}: {n:,} questions that cannot be scored were left out." for task, n in unscored.items()]
    return notes


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
