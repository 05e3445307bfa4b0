"""Progress in a log: whole lines, one a minute; on a terminal: bars of several processes, each on its line."""

import io
import os
import pty
import re
import subprocess
import sys
import termios
from contextlib import suppress
from pathlib import Path

import pyte
import pytest

from data import progress as module
from data.progress import Bar, Lines, progress


def test_a_log_gets_a_line_at_the_start_and_one_at_the_end(monkeypatch):
    monkeypatch.delenv("TQDM_MININTERVAL", raising=False)
    log = io.StringIO()
    with Lines(total=500, desc="runs", unit="step", file=log, position=3, leave=False, disable=False) as bar:
        for number in range(500):
            bar.set_postfix_str(f"loss {number}", refresh=False)
            bar.update()
    lines = log.getvalue().splitlines()
    assert len(lines) == 2 and log.getvalue().endswith("\n") and "\r" not in log.getvalue()
    assert "0/500" in lines[0] and "500/500" in lines[1] and "loss 499" in lines[1] and "\x1b" not in log.getvalue()


def test_time_makes_a_line(monkeypatch):
    monkeypatch.delenv("TQDM_MININTERVAL", raising=False)
    now = [0.0]
    log = io.StringIO()
    bar = Lines(total=10, file=log, disable=False)
    bar._time = lambda: now[0]
    bar.start_t = bar.last_print_t = 0.0
    for _ in range(10):
        now[0] += 25
        bar.update()
    bar.close()
    done = [line.split("|")[2].split()[0] for line in log.getvalue().splitlines()]
    assert done == ["0/10", "3/10", "6/10", "9/10", "10/10"], "every 75 seconds, the first that are a minute"


class Out(io.StringIO):
    """Standard error, of a terminal or not."""

    def __init__(self, terminal: bool):
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


def test_a_terminal_gets_a_bar_and_a_log_gets_lines(monkeypatch):
    for terminal, kind in ((True, Bar), (False, Lines)):
        monkeypatch.setattr(module.sys, "stderr", Out(terminal))
        bar = progress(range(3), desc="x")
        assert type(bar) is kind and list(bar) == [0, 1, 2]


RUN = """
import sys
from data.progress import progress, say
name, line, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with progress(total=steps, desc=name, unit="step", position=line, mininterval=0, disable=False) as bar:
    for number in range(steps):
        bar.set_postfix_str("x" * (number % 17), refresh=False)
        bar.update()
        if number == 1000:
            say(f"{name}: half" + "o" * 157)
"""
SAID = re.compile(r"(run-[01]: half)?o* *")  # 168 signs: a line and a part of the next
BAR = re.compile(r"(run-[01]): +\d+%\|.+\| (\d+)/2000 \[.*step/s.*\]")


@pytest.mark.parametrize("rows", [24, 5])
def test_bars_of_two_processes_share_a_terminal(rows):
    """At every moment every line of the screen is a whole bar, and no run has two that are under way."""
    main, shared = pty.openpty()
    termios.tcsetwinsize(shared, (rows, 100))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TQDM")}
    settings = {"stdout": shared, "stderr": shared, "cwd": Path(__file__).parents[1], "env": environment}
    runs = [subprocess.Popen([sys.executable, "-c", RUN, f"run-{i}", str(i), "2000"], **settings) for i in (0, 1)]
    os.close(shared)
    written = b""
    with suppress(OSError):  # of a terminal that the last process has closed
        while part := os.read(main, 65536):
            written += part
    assert [run.wait() for run in runs] == [0, 0]
    screen = pyte.Screen(100, rows)
    stream, bars = pyte.Stream(screen), 0
    for frame in re.split(r"(?=(?<!\n)\n*\r(?!\n))", written.decode().replace("\r\n", "\n")):
        stream.feed(frame.replace("\n", "\r\n"))
        shown = [line.rstrip() for line in screen.display if not SAID.fullmatch(line)]
        found = [BAR.fullmatch(line) for line in shown]
        assert all(found), f"torn: {shown}, by {frame!r}"
        under_way = [bar[1] for bar in found if bar[2] != "2000"]
        assert len(set(under_way)) == len(under_way), shown
        bars += 1
    assert bars > 1000 and sorted(line[:5] for line in shown) == ["run-0", "run-1"]
    assert all("| 2000/2000 [" in line for line in shown)
