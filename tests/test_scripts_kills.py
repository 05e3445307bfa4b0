"""The script of kills: it leaves no process, sees every difference, and counts."""

import json
import random
import sys
import time
from pathlib import Path

from scripts.kills import Machine, contents, table

# Two sessions, as torchrun and its workers are; the lower one outlives the upper one unless it is killed, too.
TREE = """
import subprocess, sys, time
code = "import pathlib, sys, time; pathlib.Path(sys.argv[1]).touch(); time.sleep(600)"
subprocess.Popen([sys.executable, "-c", code, sys.argv[1]], start_new_session=True)
time.sleep(600)
"""


def test_all_processes_of_a_command_are_killed_at_once(tmp_path):
    machine, there = Machine(), tmp_path / "there"
    started = machine.start([sys.executable, "-c", TREE, str(there)], tmp_path / "log")
    while not there.exists():
        time.sleep(0.02)
    found = machine.processes(started)
    rng = random.Random(1)  # its first number is below 0.25
    rng.random()
    assert len(found) == 2 and machine.kill(started, rng) == "all"
    left = [process for process in found if process.is_running() and process.status() != "zombie"]
    assert not left and started.returncode == -9


def run_folder(folder: Path) -> Path:
    stage = folder / "stages" / "01-GQA"
    (stage / "adapter").mkdir(parents=True)
    (stage / "adapter" / "weights").write_bytes(b"abc")
    (stage / "stage.json").write_text(json.dumps({"steps": 3, "seconds": random.random()}))
    (stage / "train_log.jsonl").write_text(f'{{"loss": 1.0}}\n{{"train_runtime": {random.random()}}}\n')
    (folder / "recipe.yaml").write_text(f"run: {folder.name}\nseed: 0\n")
    (folder / "matrix.csv").write_text("1\n")
    return folder


def test_what_a_run_makes_from_its_seed_is_compared_and_its_times_are_not(tmp_path):
    whole, same = (contents(run_folder(tmp_path / name)) for name in ("whole", "same"))
    assert whole == same and len(whole) == 6
    changes = {
        "stages/01-GQA/adapter/weights": "abd",
        "stages/01-GQA/stage.json": '{"steps": 4}',
        "stages/01-GQA/train_log.jsonl": '{"loss": 1.1}\n',
        "recipe.yaml": "run: x\nseed: 1\n",
        "matrix.csv": "2\n",
        "answers/01-GQA/GQA.jsonl": "{}\n",
    }
    for number, (name, text) in enumerate(changes.items()):
        folder = run_folder(tmp_path / str(number))
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
        found = contents(folder)
        assert [key for key in whole.keys() | found.keys() if whole.get(key) != found.get(key)] == [name]


def test_the_table_counts(tmp_path):
    row = {"engine": "DDP x2", "moment": "checkpoint", "who": "all", "hit": True, "checkpoint": True, "failed": False}
    rows = [{**row, "identical": True}, {**row, "identical": True, "who": "one", "hit": False}]
    rows += [
        {**row, "moment": "start", "identical": False},
        {**row, "moment": "start", "failed": True, "identical": False},
    ]
    lines = table(rows).splitlines()
    assert lines[2:] == [
        "| DDP x2 | checkpoint | 2 | 1 | 1 | 2 | 0 | 2 |",
        "| DDP x2 | start | 2 | 2 | 2 | 2 | 1 | 0 |",
    ]
