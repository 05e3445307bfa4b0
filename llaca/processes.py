"""The processes of a launcher: so many runs at once, ended by signals, none left behind; and of a run, who began it.

Light: neither torch nor what brings it along.
"""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise

import psutil

STOPS = {signal.SIGTERM, signal.SIGINT}
WORKERS = ("llaca.train", "eval.predict")


def run_all(lines: list[list[str]], side_by_side: int) -> int:
    """Runs the commands, at most `side_by_side` at once; returns the first exit status that is not 0.

    When one run fails, those that are under way finish and no other starts. SIGTERM and SIGINT end the runs, and the
    status is 128 + the signal. The first one reaches every training process once, which saves and ends; the second
    changes nothing; the third kills. So the runs are sessions of their own: what a terminal, `timeout` or a scheduler
    sends to all of the launcher's group would reach torchrun twice, and its second signal leaves its workers alone.
    """
    waiting, active, status, stops = list(lines), {}, 0, []
    adopt_orphans()
    os.environ["LLACA_LAUNCHER"] = str(os.getpid())
    with noticed(STOPS | {signal.SIGCHLD}) as next_signal:
        while True:
            for line in sorted(set(range(side_by_side)) - set(active)):
                if waiting and not status and not stops:
                    environment = {**os.environ, "LLACA_BAR": str(line)}
                    active[line] = subprocess.Popen(
                        waiting.pop(0), env=environment, preexec_fn=die_with_launcher, start_new_session=True
                    )
            if not active and not trainers(descendants()):
                break
            number = next_signal()
            if number in STOPS:
                stops.append(number)
                stop(len(stops), signal.Signals(number).name)
            for line, child in reap(active):
                status = status or (child.returncode if child.returncode >= 0 else 128 - child.returncode)
                del active[line]
    return 128 + stops[0] if stops else status


@contextmanager
def noticed(numbers: Collection[int]) -> Iterator[Callable[[], int]]:
    """Yields what waits for a signal and returns its number; meanwhile these do nothing else.

    None is lost, whichever thread of the process the system gives it to (a progress bar's, a library's): its number
    goes through a pipe.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = {number: signal.signal(number, lambda *_: None) for number in numbers}
    wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    try:
        yield lambda: os.read(reading, 1)[0]
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(reading)
        os.close(writing)


def stop(time: int, name: str) -> None:
    """What the first, second and third signal do."""
    found = descendants()
    if time == 1:
        print(f"{name}: every run saves after its step and ends; the third signal kills", file=sys.stderr, flush=True)
        # DeepSpeed's launcher would kill its processes after 30 seconds, and torchrun's passes the signal on.
        for process in trainers(found) or psutil.Process().children():
            signal_one(process, signal.SIGTERM)
    elif time == 2:
        print(f"{name}: the runs are saving; one more signal kills them", file=sys.stderr, flush=True)
    else:
        for process in found:
            signal_one(process, signal.SIGKILL)


def signal_one(process: psutil.Process, number: int) -> None:
    """Sends a signal to a process that may be gone."""
    with suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def descendants() -> list[psutil.Process]:
    """All that runs below this process."""
    return psutil.Process().children(recursive=True)


def trainers(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that train or answer: not the launchers between, nor what they start themselves to read ahead."""
    found = {}
    for process in processes:
        try:
            line, parent = process.cmdline(), process.ppid()
        except psutil.Error:  # gone, or a zombie
            continue
        if any(flag == "-m" and module in WORKERS for flag, module in pairwise(line)):
            found[process.pid] = (parent, process)
    return [process for parent, process in found.values() if parent not in found]


def adopt_orphans() -> None:
    """On Linux, makes this process the parent of those whose own parent, a launcher, has died: it waits for them."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER


def reap(active: dict[int, subprocess.Popen]) -> list[tuple[int, subprocess.Popen]]:
    """The runs of `active` that have ended; adopted processes that have are buried."""
    own = {child.pid for child in active.values()}
    while True:
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            ended = None
        if ended is None:
            return []
        if ended.si_pid in own:
            break
        os.waitpid(ended.si_pid, 0)
    return [(line, child) for line, child in active.items() if child.poll() is not None]


def launcher() -> str:
    """What started this process: python, torchrun, deepspeed, or another one that sets RANK."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torchrun"
    if "CROSS_SIZE" in os.environ:  # deepspeed/launcher/launch.py sets it
        return "deepspeed"
    return "another" if "RANK" in os.environ else "python"


def die_with_launcher() -> None:
    """On Linux, ends this process when the launcher that started it is killed: nobody trains unseen."""
    process = os.environ.get("LLACA_LAUNCHER")
    if process and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        # What died before the line above sends no signal; its children are adopted by the launcher, or by init.
        starter = launcher()
        adopted = os.getppid() == int(process) if starter in ("torchrun", "deepspeed") else False
        if adopted or (starter == "python" and os.getppid() != int(process)):
            sys.exit(f"what started this process ({starter}, for process {process}) is gone")


def leave_at_once() -> None:
    """Lets SIGTERM and SIGINT end the process where it is, whatever library code it is in: 128 + signal in a shell.

    Nothing is lost by that: what is not whole has no COMPLETE or DONE, and is made again.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
