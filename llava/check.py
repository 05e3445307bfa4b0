"""The check of a benchmark with what a base model makes of its records: `python -m llava.check --root DIR --base DIR`.

As `python -m data.check`, and also: answers that the base's tokenizer cannot express, records that the maximum length
cuts, and with --grouping prompts without an instruction. train_continual.sh runs it with the recipe's base.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.check import command, execute
from data.columns import Columns, TrainingColumns
from data.records import Problem
from llava.backbone import AS_IS, Backbone, BaseOptions
from llava.backbones import open_backbone
from llava.conversation import Vocabulary
from llava.dataset import picture_problems, unusable


@dataclass(frozen=True)
class Reader:
    """What a run on a base makes of the records (a data.check.Reader); `max_length` in tokens by task."""

    backbone: Backbone
    max_length: Mapping[str, int]
    grouping: bool = False

    @property
    def encoder(self) -> Vocabulary:
        """That of the base."""
        return self.backbone.vocabulary

    @property
    def digest(self) -> str:
        """What tells readers apart."""
        settings = (self.backbone.digest, sorted(self.max_length.items()), self.grouping)
        return hashlib.sha256(repr(settings).encode()).hexdigest()

    def problems(self, task: str, columns: Columns, rows: np.ndarray, image_root: Path) -> list[Problem]:
        """Return the records of these rows that the base or, in training, the maximum length makes unusable."""
        if not isinstance(columns, TrainingColumns):
            return picture_problems(self.backbone, columns, rows, image_root)
        return unusable(self.backbone, columns, rows, image_root, self.max_length[task])


def reader_of(base: Path | str, max_length: Mapping[str, int], grouping: bool, options: BaseOptions = AS_IS) -> Reader:
    """The reader that a base model's folder gives. Raises FileNotFoundError or ValueError where it is none."""
    return Reader(open_backbone(base, options), max_length, grouping)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; exits with 1 if there is a problem."""
    parser = command("llava.check")
    parser.add_argument("--base", type=Path, required=True, help="folder of a base model")
    parser.add_argument("--max-length", type=int, default=2048, help="tokens of a record")
    parser.add_argument("--grouping", action="store_true", help="every prompt needs an instruction")
    options = parser.parse_args(arguments)
    lengths = options.max_length
    execute(options, lambda tasks: reader_of(options.base, dict.fromkeys(tasks, lengths), options.grouping))


if __name__ == "__main__":
    main()
