"""How far long work has come: a bar on a terminal, a line a minute in a log."""

import os
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


class Lines(tqdm):
    """A bar that writes lines: at the start, at most every MININTERVAL seconds, and at the end."""

    MININTERVAL = 60.0

    def __init__(self, *given: Any, **settings: Any):
        if "TQDM_MININTERVAL" not in os.environ:
            settings.setdefault("mininterval", self.MININTERVAL)
        super().__init__(*given, **{**settings, "position": 0, "leave": True, "miniters": 1})

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Writes a line; the last one ends in `close`."""
        self.fp.write(f"{self}" if self.disable else f"{self}\n")
        self.fp.flush()
        return True


def progress(items: Iterable | None = None, **settings: Any) -> tqdm:
    """tqdm's bar on a terminal; Lines where standard error is none."""
    return (tqdm if sys.stderr.isatty() else Lines)(items, **settings)
