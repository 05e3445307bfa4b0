"""Where else a run's figures go: W&B or TensorBoard, one run there a run folder, stages and all.

    runs/NAME/tracking.json     {"id": of the run at W&B, "step": the last told, "published": evaluations told}

The step is that of the whole stream. A run that is killed and started again goes on under the same id. What a killed
process told may be lost, as W&B writes late: everything since the last orderly end is told again, from the training
log, in the same words. W&B is offline unless WANDB_MODE says otherwise; an offline run that is started again makes a
second file of the same id, which `wandb sync` joins.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import yaml

from llaca.config import Recipe
from llaca.stream import Stage, write_atomically

FILE = "tracking.json"


class Tracker:
    """Tells nobody."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Figures at a step."""

    def tell(self, step: int, values: Mapping[str, Any]) -> None:
        """What holds of the whole run, as known at a step."""

    def publish(self, step: int, table: tuple[list[str], list[list]], figures: Mapping[str, Path], page: Path) -> None:
        """An evaluation: the matrix of accuracies (columns, rows), figures by name, and the page of the run."""

    def published(self, digest: str) -> None:
        """That evaluation is not told again."""

    def finish(self) -> None:
        """Nothing more follows from this process."""


def remembered(folder: Path) -> dict[str, Any]:
    """What the file of a run folder holds; nothing without one."""
    path = folder / FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


class Remembering(Tracker):
    """A tracker that knows which steps were told, also by processes before it that came to an orderly end."""

    def __init__(self, folder: Path):
        self.folder, self.known = folder, remembered(folder)
        self.known.setdefault("id", uuid4().hex[:12])
        self.keep()
        self.last = self.known.get("step", 0)

    def published(self, digest: str) -> None:
        self.known.setdefault("published", []).append(digest)
        self.keep()

    def keep(self) -> None:
        """Writes what is known."""
        write_atomically(self.folder / FILE, json.dumps(self.known) + "\n")

    def is_new(self, step: int) -> bool:
        """Whether a step was not told before; it is, from now on."""
        new, self.last = step > self.last, max(step, self.last)
        return new

    def finish(self) -> None:
        self.known["step"] = self.last
        self.keep()


class WandB(Remembering):
    """A run at W&B."""

    def __init__(self, recipe: Recipe, folder: Path):
        super().__init__(folder)
        import wandb

        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "llaca"),
            name=recipe.run.run,
            id=self.known["id"],
            dir=str(folder),
            config=recipe.flat(),
            resume="allow",
            mode=os.environ.get("WANDB_MODE", "offline"),
            settings=wandb.Settings(silent=True, console="off"),
        )
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")  # W&B's own starts anew where an offline run goes on

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if self.is_new(step):
            self.run.log({"step": step, **values})

    def tell(self, step: int, values: Mapping[str, Any]) -> None:
        self.run.summary.update(dict(values))

    def publish(self, step: int, table: tuple[list[str], list[list]], figures: Mapping[str, Path], page: Path) -> None:
        import wandb

        columns, rows = table
        shown = {name: wandb.Image(str(path)) for name, path in figures.items()}
        content = {"accuracy": wandb.Table(columns=columns, data=rows), "report": wandb.Html(str(page)), **shown}
        self.run.log({"step": step, **content})

    def finish(self) -> None:
        self.run.finish()
        super().finish()


class TensorBoard(Remembering):
    """Event files in the run's folder."""

    def __init__(self, recipe: Recipe, folder: Path):
        super().__init__(folder)
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"))
        if "step" not in self.known:
            self.writer.add_text("recipe", "    " + yaml.safe_dump(recipe.flat()).replace("\n", "\n    "), 0)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if self.is_new(step):
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)
            self.writer.flush()

    def tell(self, step: int, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, int | float):
                self.writer.add_scalar(name, value, step)

    def publish(self, step: int, table: tuple[list[str], list[list]], figures: Mapping[str, Path], page: Path) -> None:
        import numpy as np
        from PIL import Image

        columns, rows = table
        lines = [columns, ["---"] * len(columns), *([*map(cell, row)] for row in rows)]
        self.writer.add_text("accuracy", "\n".join(f"| {' | '.join(line)} |" for line in lines), step)
        for name, path in figures.items():
            with Image.open(path) as picture:
                self.writer.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def finish(self) -> None:
        self.writer.close()
        super().finish()


def cell(value: Any) -> str:
    """A value in a table of text."""
    return "" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)


def tracker_of(recipe: Recipe, folder: Path) -> Tracker:
    """That of a recipe's `report_to`."""
    known = {"none": lambda recipe, folder: Tracker(), "wandb": WandB, "tensorboard": TensorBoard}
    return known[recipe.run.report_to](recipe, folder)


def told_values(logs: Mapping[str, Any], stage: int) -> dict[str, float]:
    """The figures of a line of the log, and the stage's number."""
    return {"stage": stage, **{k: float(v) for k, v in logs.items() if isinstance(v, int | float) and k != "step"}}


def tell_again(tracker: Tracker, stage: Stage, log: Path, before: int) -> None:
    """The lines that a stage's log has already, `before` steps on; the tracker knows which of them it has told."""
    if log.is_file():
        for line in map(json.loads, log.read_text(encoding="utf-8").splitlines()):
            if "loss" in line:
                tracker.log(before + line["step"], told_values(line, stage.index))
