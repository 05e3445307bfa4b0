"""Progress in a log: whole lines, one a minute."""

import io

from tqdm import tqdm

from data import progress as module
from data.progress import Lines, progress


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
    for terminal, kind in ((True, tqdm), (False, Lines)):
        monkeypatch.setattr(module.sys, "stderr", Out(terminal))
        bar = progress(range(3), desc="x")
        assert type(bar) is kind and list(bar) == [0, 1, 2]
