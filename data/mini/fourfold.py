"""CoIN-mini with four times the training records: `python -m data.mini.fourfold [--out DIR] [--seed N]`."""

import json
from pathlib import Path

from data.mini import build as mini
from data.mini.folder import STAMP, command


def sizes() -> dict[str, int]:
    """Of every task, by split."""
    return {**mini.SIZES, "train": 4 * mini.SIZES["train"]}


def is_built(root: Path) -> bool:
    """Whether `root` holds it, of whatever seed."""
    return mini.is_built(root) and json.loads((root / STAMP).read_text())["samples"] == sizes()


def build(root: Path, seed: int = 0) -> bool:
    """As `data.mini.build.build`."""
    return mini.build(root, seed, sizes())


if __name__ == "__main__":
    command(__doc__.splitlines()[0], build, Path("data/coin_mini_fourfold"))
