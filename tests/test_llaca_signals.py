"""Signals: one saves and ends, a second changes nothing, a third kills; at any time, to any process, without a hang."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from test_llaca_train import adapters, arguments, mini  # noqa: F401

ROOT = Path(__file__).parents[1]
LAUNCHER = "import json, sys; from llaca.processes import run_all; sys.exit(run_all(json.loads(sys.argv[1]), 2))"
SAVER = """
import os, pathlib, signal, sys, time
told = []
signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
pathlib.Path(sys.argv[1] + ".started").touch()
while not told:
    time.sleep(0.05)
time.sleep(1.5)
pathlib.Path(sys.argv[1]).write_text(str(len(told)))
sys.exit(143)
"""
DEAF = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
pathlib.Path(sys.argv[1] + ".started").touch()
time.sleep(600)
"""
# As torchrun and DeepSpeed's launcher do: the second signal makes it leave at once.
BETWEEN = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-m", "llaca.train", sys.argv[1]], cwd=sys.argv[2])
sys.exit(child.wait())
"""


def started(lines: list[list[str]], files: list[Path], **environment: str) -> subprocess.Popen:
    """A launcher in a process group of its own, when all of its children are there."""
    line = [sys.executable, "-c", LAUNCHER, json.dumps(lines)]
    launcher = subprocess.Popen(
        line, cwd=ROOT, process_group=0, stderr=subprocess.PIPE, env={**os.environ, **environment}
    )
    wait_for(lambda: all(Path(f"{file}.started").exists() for file in files), launcher)
    return launcher


def wait_for(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("pause", [0.0, 0.3])
def test_the_second_signal_neither_hangs_nor_loses_what_is_saved(tmp_path, number, pause):
    """Without a pause: what `timeout 60 bash train_continual.sh` sends, to the process and then to its group."""
    files = [tmp_path / "a", tmp_path / "b"]
    launcher = started([[sys.executable, "-c", SAVER, str(file)] for file in files], files)
    launcher.send_signal(number)
    time.sleep(pause)
    os.killpg(launcher.pid, number)
    assert launcher.wait(timeout=20) == 128 + number
    assert [file.read_text() for file in files] == ["1", "1"], "a run gets one signal, however many the launcher gets"


def test_signals_to_a_thread_that_was_there_before_are_noticed(tmp_path):
    """A progress bar leaves one behind, and so do libraries: the system may give it any signal of the process."""
    file = tmp_path / "a"
    thread = "import threading, time; threading.Thread(target=time.sleep, args=(600,), daemon=True).start(); "
    busy = "from llaca import processes; stop = processes.stop; "
    busy += "processes.stop = lambda *told: (stop(*told), time.sleep(1)); "
    line = [sys.executable, "-c", thread + busy + LAUNCHER, json.dumps([[sys.executable, "-c", SAVER, str(file)]])]
    launcher = subprocess.Popen(line, cwd=ROOT, process_group=0, stderr=subprocess.PIPE)
    wait_for(Path(f"{file}.started").exists, launcher)
    launcher.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    launcher.send_signal(signal.SIGTERM)  # while the first thread is at work on the one before
    assert launcher.wait(timeout=20) == 128 + signal.SIGTERM
    assert file.read_text() == "1"


AROUND = [
    ({}, False),
    ({"RANK": "0"}, False),  # some platforms set it for a single process
    ({"RANK": "0", "TORCHELASTIC_RUN_ID": "x"}, True),  # the launcher itself is no parent of these
    ({"RANK": "0", "CROSS_SIZE": "1"}, True),
]
FORKS = """
import json, os, sys
from llaca.processes import die_with_launcher
os.environ["LLACA_LAUNCHER"] = str(os.getpid())
for around in json.loads(sys.argv[1]):
    if not (child := os.fork()):
        os.environ.update(around)
        die_with_launcher()
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_a_process_whose_starter_died_while_it_was_loading_ends():
    """Else it waits for half an hour for a rendezvous that nobody holds any more."""
    line = [sys.executable, "-c", FORKS, json.dumps([around for around, _ in AROUND])]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    ends = [line != "0" for line in done.stdout.splitlines()]
    assert ends == [gone for _, gone in AROUND] and done.stderr.count("is gone") == sum(ends), done.stderr


def test_the_third_signal_kills(tmp_path):
    files = [tmp_path / "a", tmp_path / "b"]
    launcher = started([[sys.executable, "-c", DEAF, str(file)] for file in files], files)
    children = psutil.Process(launcher.pid).children(recursive=True)
    for _ in range(3):
        assert launcher.poll() is None
        launcher.send_signal(signal.SIGINT)
        time.sleep(0.3)
    assert launcher.wait(timeout=20) == 128 + signal.SIGINT
    assert len(children) == 2 and not any(child.is_running() for child in children)


def test_training_processes_get_the_signal_and_are_waited_for_though_what_is_between_dies(tmp_path):
    fake = tmp_path / "fake" / "llaca"
    fake.mkdir(parents=True)
    (fake / "__init__.py").touch()
    (fake / "train.py").write_text(SAVER)
    file = tmp_path / "a"
    launcher = started([[sys.executable, "-c", BETWEEN, str(file), str(fake.parent)]], [file])
    (middle,) = psutil.Process(launcher.pid).children()
    launcher.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    middle.kill()
    assert launcher.wait(timeout=20) == 128 + signal.SIGTERM
    assert file.read_text() == "1"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "number"),
    [("imports", signal.SIGTERM), ("recipe.yaml", signal.SIGINT), ("stages", signal.SIGTERM)],
)
def test_a_signal_before_the_first_step_ends_the_run_at_once(arguments, tmp_path, moment, number):  # noqa: F811
    """While it imports, when the run folder is there (records are read, the model comes), when the stage's is."""
    line = [sys.executable, "-m", "llaca.launch", *arguments, "--method", "lora", "--epochs", "100"]
    launcher = subprocess.Popen(line, cwd=ROOT, process_group=0, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    folder = tmp_path / "runs" / "r"
    if moment == "imports":
        wait_for(lambda: psutil.Process(launcher.pid).children(), launcher)
    else:
        wait_for((folder / moment).exists, launcher)
    os.killpg(launcher.pid, number)
    _, told = launcher.communicate(timeout=60)
    assert launcher.returncode == 128 + number
    assert b"Traceback" not in told and not list(folder.glob("stages/*/DONE"))
