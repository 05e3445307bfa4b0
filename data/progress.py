"""How far long work has come: a bar on a terminal, a line a minute in a log."""

import io
import os
import sys
from collections.abc import Iterable
from typing import Any, TextIO

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


class Bar(tqdm):
    """A bar for a terminal that several processes write to, each at its own `position` below the cursor's line.

    tqdm goes down, writes and comes back in three writes, between which another process's may come. Here each time is
    one write, which a terminal takes whole; the cursor is where it was before. What a bar leaves at its end stands
    above the others: a line is put in, so that each process finds its bar where it was, below the cursor.
    """

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Write the bar, or `msg` in its place, `pos` lines below the cursor. False if the terminal is too low."""
        lines, rows = abs(self.pos) if pos is None else pos, self.nrows or 0
        if 1 < rows <= lines + 1:  # fewer: the terminal does not know its size
            return False
        text = str(self) if msg is None else msg
        self.fp.write("\n" * lines + f"\r{text}\x1b[K" + "\x1b[A" * lines)
        self.fp.flush()
        return True

    def close(self) -> None:
        """Empty the bar's line; what it leaves goes to a line of its own above."""
        if self.disable:  # closed before, or never shown
            return
        lines = abs(self.pos)
        out, self.fp = self.fp, io.StringIO()
        try:
            super().close()
        finally:
            last, self.fp = self.fp.getvalue(), out
            if last:
                above = "\n" * lines + "\r\x1b[2K" + "\x1b[A" * lines + "\r\x1b[L" if last.endswith("\n") else ""
                out.write(above + last)
                out.flush()


def progress(items: Iterable | None = None, **settings: Any) -> tqdm:
    """A Bar on a terminal; Lines where standard error is none."""
    return (Bar if sys.stderr.isatty() else Lines)(items, **settings)


def say(text: str, file: TextIO | None = None) -> None:
    """Print a line; on a terminal above the bars of all processes that share it."""
    out = file or sys.stdout
    if out.isatty() and sys.stderr.isatty():
        columns = os.get_terminal_size(out.fileno()).columns or 80
        lines = sum(max(1, -(-len(line) // columns)) for line in text.split("\n"))
        text = f"\r\x1b[{lines}L{text}"
    out.write(f"{text}\n")
    out.flush()
