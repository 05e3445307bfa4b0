"""A run folder as evaluation sees it: which stage's parameters answer which test set.

    runs/<name>/answers[-dev|-retained/<benchmark>]/<stage whose parameters answered>/<Task>.jsonl

A cell of the accuracy matrix is one such file. With grouping many cells share a file: a parameter set that a stage did
not change is not asked again.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import yaml

from data.benchmark import open_benchmark
from eval.questions import Questions, run_questions
from eval.tasks import task_of
from llaca import ranks
from llaca.config import Recipe
from llaca.methods import METHODS
from llaca.pool import Pool
from llaca.sections import StreamConfig
from llaca.stream import Stage, ordered, stages_of

BASE = "base"  # stands for the base model, before any stage
CELLS = ("final", "diagonal", "triangle", "next", "full")
Row = tuple[str, dict[str, str]]  # (stage, {task: stage whose parameters answer it})


@dataclass
class EvaluatedRun:
    """A run folder as evaluation sees it: only stages that are DONE. `cells` is one of CELLS:

    final: the last row; diagonal: that and each task right after its own stage; triangle: every stage and the tasks
    trained so far; next: that and the task whose turn is next; full: every stage and every task, and the base model.
    `scoring` is one of eval.tasks.MODES.
    """

    folder: Path
    recipe: Recipe
    stages: list[Stage]
    split: str
    cells: str = "triangle"
    scoring: str = "official"

    @property
    def trains(self) -> bool:
        return METHODS[self.recipe.method.method].trains

    @property
    def complete(self) -> bool:
        """Whether every task of the stream has been trained (or nothing is to be trained)."""
        return not self.trains or sum(len(stage.tasks) for stage in self.stages) == len(self.tasks)

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def seed(self) -> int:
        return self.recipe.run.seed

    @property
    def tasks(self) -> list[str]:
        """The columns of the matrix: the tasks in training order."""
        return ordered(self.recipe.stream.tasks, self.recipe.stream.order)

    @property
    def answers(self) -> Path:
        return self.folder / ("answers" if self.split == "test" else f"answers-{self.split}")

    @property
    def questions(self) -> Mapping[str, Questions]:
        """The questions of every task that this run answers, shared with the other runs that ask them."""
        return run_questions(self.recipe, self.split)

    def instructions(self, task: str) -> list[str]:
        """What chooses the parameters that answer a test set."""
        return self.questions[task].wordings(self.recipe.method.grouping)

    @cached_property
    def rows(self) -> list[Row]:
        """The rows of the accuracy matrix as far as `cells` asks for them; with `full`, BASE's first."""
        if not self.trains:
            return [(BASE, dict.fromkeys(self.tasks, BASE))]
        rows, seen = [], []
        instructions = {task: self.instructions(task) for task in self.tasks}
        for stage in self.stages:
            seen += stage.tasks
            pool = Pool.from_json((stage.folder / "codebook.json").read_text(encoding="utf-8"))
            row, last = {}, stage is self.stages[-1]
            ahead = {"full": len(self.tasks), "next": len(seen) + 1}.get(self.cells, len(seen))
            for task in self.tasks[:ahead]:
                if self.cells in ("final", "diagonal") and not last and task not in stage.tasks:
                    continue
                if self.cells == "final" and not last:
                    continue
                if METHODS[self.recipe.method.method].route:
                    row[task] = stage.name
                    continue
                row[task], matched = pool.holder_for(instructions[task], task)
                if not matched and task in seen and ranks.first():
                    print(f"{self.name}, {stage.name}: {task} matches no group; the nearest, {row[task]}, answers")
            rows.append((stage.name, row))
        return [(BASE, dict.fromkeys(self.tasks, BASE)), *rows] if self.cells == "full" else rows

    def answer_limit(self, task: str) -> int:
        """Tokens of an answer at most: as many as the benchmark says, fewer where the recipe does."""
        stream = self.recipe.stream
        own = task_of(stream.data_root, task).spec.max_new_tokens
        return min(own, stream.max_new_tokens or own)

    def answer_file(self, holder: str, task: str) -> Path:
        """Where the answers to `task` with the parameters of stage `holder` are."""
        return self.answers / holder / f"{task}.jsonl"

    def missing(self) -> list[tuple[str, str]]:
        """(stage whose parameters answer, task) of the answer files that the rows need and that are not there."""
        wanted = dict.fromkeys((holder, task) for _, row in self.rows for task, holder in row.items())
        return [cell for cell in wanted if not self.answer_file(*cell).is_file()]


def open_run(folder: Path, split: str = "test", cells: str = "triangle") -> EvaluatedRun:
    """Reads a run folder; of its stages those that are DONE. Raises FileNotFoundError where there is no run."""
    if not (folder / "recipe.yaml").is_file():
        raise FileNotFoundError(f"{folder}: no recipe.yaml, so no run; train one with train_continual.sh")
    recipe = Recipe.from_flat(yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8")))
    method = METHODS[recipe.method.method]
    stages = [stage for stage in stages_of(recipe, method.joint, folder) if stage.done] if method.trains else []
    return EvaluatedRun(folder, recipe, stages, split, cells)


@dataclass
class RetainedRun(EvaluatedRun):
    """A run as it answers another benchmark's test sets, which no stage trains: the base and every stage, each of them
    by the parameters that the first INSTRUCTIONS of their instructions choose."""

    INSTRUCTIONS: ClassVar[int] = 20

    @property
    def answers(self) -> Path:
        return self.folder / "answers-retained" / Path(self.recipe.stream.data_root).resolve().name

    def instructions(self, task: str) -> list[str]:
        return super().instructions(task)[: self.INSTRUCTIONS]


def retained(run: EvaluatedRun, root: str | None = None) -> RetainedRun | None:
    """The run on the benchmark `root`, without it on what its recipe calls `retained`; None where there is none, or
    nothing is trained. Raises FileNotFoundError if that is no folder."""
    root = root or run.recipe.run.retained
    if not root or not run.trains:
        return None
    if not Path(root).is_dir():
        raise FileNotFoundError(f"retained: {root} is no folder: make it, or name another with --retained")
    stream = StreamConfig(data_root=root, tasks=list(open_benchmark(root).tasks))
    return RetainedRun(run.folder, replace(run.recipe, stream=stream), run.stages, "test", "full")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say what is answered."""
    parser.add_argument("--run", nargs="+", default=[], help="names of runs; without: every folder with a recipe")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    parser.add_argument("--split", choices=["test", "dev"], default="test")
    parser.add_argument("--cells", choices=CELLS, default="triangle", help="of the accuracy matrix")
    batch = "questions answered at once by one process; default: what the GPU's free memory holds, without a GPU 64"
    parser.add_argument("--batch-size", type=int, help=batch)
    parser.add_argument(
        "--retained", metavar="DIR", help="measure what stays of the base on this benchmark; default: the recipe's"
    )


def chosen_runs(options: argparse.Namespace) -> list[EvaluatedRun]:
    """The runs that the flags name. Raises FileNotFoundError if there is none."""
    names = options.run or sorted(p.parent.name for p in options.runs_dir.glob("*/recipe.yaml"))
    if not names:
        raise FileNotFoundError(f"{options.runs_dir}: no runs; train one with: bash train_continual.sh")
    return [open_run(options.runs_dir / name, options.split, options.cells) for name in names]
