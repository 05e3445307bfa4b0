"""An evaluation, told to W&B or TensorBoard where the recipe logs there: matrix, figures of the run, page, pictures."""

import hashlib
import json
from typing import Any

import numpy as np

from eval.run_statistics import stories
from eval.runs import EvaluatedRun
from eval.scored import output_folder
from eval.tables import read_matrix
from llaca.tracking import remembered, tracker_of


def publish(run: EvaluatedRun, metrics: dict[str, Any]) -> None:
    """Tells the tracker of the run's recipe, once for every outcome, what its folder holds after `eval.report`."""
    if run.recipe.run.report_to == "none":
        return
    A, stages, tasks = read_matrix(output_folder(run) / "matrix.csv")
    known = [[None if np.isnan(value) else float(value) for value in row] for row in A]
    rows = [[stage, *values] for stage, values in zip(stages, known, strict=True)]
    told = {key: value for key, value in metrics.items() if isinstance(value, int | float)}
    told |= {f"final/{task}": value for task, value in metrics["per_task"].items() if value is not None}
    prefix = "" if (run.split, run.scoring) == ("test", "official") else f"{run.split}-{run.scoring}/"
    digest = hashlib.sha256(json.dumps([prefix, rows, told]).encode()).hexdigest()[:16]
    known = remembered(run.folder)
    if digest in known.get("published", []):
        return
    tracker, step = tracker_of(run.recipe, run.folder), sum(story["steps"] for story in stories(run))
    try:
        figures = {path.stem: path for path in sorted((output_folder(run) / "figures").glob("*.png"))}
        tracker.tell(step, {f"{prefix}{key}": value for key, value in told.items()})
        tracker.publish(step, (["stage", *tasks], rows), figures, output_folder(run) / "report.html")
        tracker.published(digest)
    finally:
        tracker.finish()
