"""Draws docs/coin_mini.png: two samples of each task. `python -m data.mini.gallery [FILE]`."""

import random
import sys
import textwrap

from matplotlib.figure import Figure

from data.mini.tasks import TASKS
from data.mini.world import MINI, draw


def gallery(path: str, seed: int = 2) -> None:
    """A column per task, two pictures with question and answer in each."""
    figure = Figure(figsize=(14, 4.6), layout="constrained")
    for column, (axes, (task, make)) in enumerate(zip(figure.subplots(2, len(TASKS)).T, TASKS.items(), strict=True)):
        rng = random.Random(f"{seed}/{task}")
        for row, cell in enumerate(axes):
            sample = make(MINI, rng)
            while sample.scene is None:
                sample = make(MINI, rng)
            question, answer = sample.turns[0]
            question = question or "(name the object)"
            lines = [part for line in question.splitlines() for part in textwrap.wrap(line, 24)]
            cell.imshow(draw(sample.scene), interpolation="nearest")
            cell.set_xlabel("\n".join(lines) + f"\n→ {answer}", fontsize=8.5)
            cell.set_xticks([])
            cell.set_yticks([])
            if row == 0:
                cell.set_title(f"{column + 1}. {task}", fontsize=11)
    figure.savefig(path, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    gallery(sys.argv[1] if len(sys.argv) > 1 else "docs/coin_mini.png")
