"""Stands in for srun and scontrol in tests/test_slurm.py, with what SLURM 22.05.8 was seen to do:

srun starts the command once a node, and its status is the highest of the tasks' (128 + the signal for a killed one).
When the first process of a task has ended, SLURM kills the others of that task.

    python tests/slurm_stand_in.py srun [--OPTION ...] COMMAND ...
    python tests/slurm_stand_in.py scontrol show hostnames LIST | requeue JOB

STAND_IN names a folder: srun writes its command and environment there, scontrol what it was asked for; with
STAND_IN_STATUS srun starts nothing and ends with that status.
"""

import ctypes
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import psutil

from scripts.two_hosts import possible


def one_node(command: list[str]) -> int:
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: what the task leaves behind is below this process
    status = subprocess.Popen(command, env={**os.environ, "SLURM_NODEID": "0"}).wait()
    for process in psutil.Process().children(recursive=True):
        process.kill()
    return status if status >= 0 else 128 - status


def two_nodes(command: list[str]) -> int:
    own = " ".join(f"{name}={shlex.quote(os.environ[name])}" for name in ("NNODES", "MASTER_ADDR", "MASTER_PORT"))
    task = f'export SLURM_NODEID=$NODE_RANK {own}; unset NODE_RANK; exec "$@"'
    place = [] if possible() else ["--local"]
    line = [sys.executable, "-m", "scripts.two_hosts", *place, "--", "bash", "-c", task, "_", *command]
    return subprocess.run(line, check=False).returncode


def srun(arguments: list[str]) -> int:
    command = arguments[next(n for n, word in enumerate(arguments) if not word.startswith("--")) :]
    told = {"options": arguments[: -len(command)], "command": command, "environment": dict(os.environ)}
    Path(os.environ["STAND_IN"], "srun.json").write_text(json.dumps(told))
    if "STAND_IN_STATUS" in os.environ:
        return int(os.environ["STAND_IN_STATUS"])
    return one_node(command) if os.environ["SLURM_NNODES"] == "1" else two_nodes(command)


def scontrol(arguments: list[str]) -> int:
    with Path(os.environ["STAND_IN"], "scontrol").open("a") as file:
        file.write(" ".join(arguments) + "\n")
    if arguments[0] == "show":
        print(*(["host-0", "host-1"] if possible() and os.environ["SLURM_NNODES"] == "2" else ["localhost"]), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit({"srun": srun, "scontrol": scontrol}[sys.argv[1]](sys.argv[2:]))
