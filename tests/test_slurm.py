"""scripts/slurm.sh between stand-ins for srun and scontrol, which behave as SLURM 22.05.8 was seen to.

And two processes, one of which is told to save.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from test_llaca_train import adapters, arguments, mini, three_stages  # noqa: F401

from llaca.launch import choose_launcher

ROOT = Path(__file__).parents[1]
DDP = ["--method", "llaca", "--grouping", "false", "--tasks", "TextVQA", "GQA", "--batch-size", "2", "--epochs", "10"]
OF_A_STEP = ("llaca.launch", "torch.distributed.run", "llaca.train")


@pytest.fixture
def cluster(tmp_path):
    """The environment of a job on a cluster whose commands write into `tmp_path`/cluster."""
    folder = tmp_path / "cluster"
    folder.mkdir()
    for name in ("srun", "scontrol"):
        line = f'#!/bin/sh\nexec {sys.executable} {ROOT}/tests/slurm_stand_in.py {name} "$@"\n'
        (folder / name).write_text(line)
        (folder / name).chmod(0o755)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    for name in ("MASTER_PORT", "MASTER_ADDR", "NNODES", "NODE_RANK"):
        environment.pop(name, None)
    return environment | {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "STAND_IN": str(folder),
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": "4711",
        "SLURM_NNODES": "1",
        "SLURM_JOB_NODELIST": "host-[0-1]",
        "SLURM_CPUS_ON_NODE": "2",
        "RECIPE": "configs/coin_mini.yaml",
    }


def submit(environment: dict[str, str], **more: str) -> subprocess.Popen:
    """The batch script, under way, in a process group of its own."""
    line = ["bash", str(ROOT / "scripts/slurm.sh")]
    return subprocess.Popen(
        line, env=environment | more, stderr=subprocess.PIPE, text=True, cwd="/", start_new_session=True
    )


def told(environment: dict[str, str]) -> dict:
    return json.loads(Path(environment["STAND_IN"], "srun.json").read_text())


def requeued(environment: dict[str, str]) -> bool:
    return "requeue 4711" in Path(environment["STAND_IN"], "scontrol").read_text().splitlines()


@pytest.mark.parametrize("status", [0, 1, 15, 137, 143])
def test_a_job_starts_again_when_its_run_was_told_to_save_and_only_then(cluster, status):
    job = submit(cluster, STAND_IN_STATUS=str(status))
    assert job.wait(timeout=60) == status, job.stderr.read()
    assert requeued(cluster) == (status == 143)


def test_what_srun_is_asked_to_start(cluster):
    given = {"STAND_IN_STATUS": "0", "SLURM_NNODES": "2", "METHOD": "ewc", "SEED": "3", "FLAGS": "--zero 2 --run a"}
    for more, gpus in (({}, []), ({"SLURM_GPUS_ON_NODE": "4"}, ["4"]), ({"GPUS_PER_NODE": "2"}, ["2"])):
        assert submit(cluster, **given, **more).wait(timeout=60) == 0
        found = told(cluster)
        words = found["command"][found["command"].index("--recipe") :]
        count = ["--num-gpus", *gpus] if gpus else []
        head = ["--recipe", "configs/coin_mini.yaml", "--method", "ewc", "--seed", "3", "--launcher", "torchrun"]
        assert words == [*head, *count, "--zero", "2", "--run", "a"]
    assert found["options"] == ["--kill-on-bad-exit=0"]
    around = found["environment"]
    assert (around["NNODES"], around["SRUN_CPUS_PER_TASK"]) == ("2", "2")
    assert around["MASTER_ADDR"] in ("host-0", "localhost")
    ports = set()
    for job in ("4711", "4712", "123456789"):
        submit(cluster, **given | {"SLURM_JOB_ID": job}).wait(timeout=60)
        ports.add(int(told(cluster)["environment"]["MASTER_PORT"]))
    assert len(ports) == 3 and min(ports) > 1024 and max(ports) < 32768  # where the system's own ports begin
    submit(cluster, **given, SLURM_CPUS_PER_TASK="7", MASTER_PORT="29500").wait(timeout=60)
    around = told(cluster)["environment"]
    assert (around["SRUN_CPUS_PER_TASK"], around["MASTER_PORT"]) == ("7", "29500")


def test_the_signal_goes_to_the_steps_and_the_log_outlives_the_next_start():
    text = (ROOT / "scripts" / "slurm.sh").read_text()
    asked = dict(
        line.split()[1:] for line in text.splitlines() if line.startswith("#SBATCH ") and len(line.split()) == 3
    )
    assert re.fullmatch(r"TERM@\d+", asked["--signal"]), "with B: the batch shell alone would get it"
    assert asked["--ntasks-per-node"] == "1" and asked["--open-mode"] == "append"
    assert "#SBATCH --requeue" in text


@pytest.fixture(scope="module")
def whole(tiny_base, mini, tmp_path_factory):  # noqa: F811
    """What two processes hand on, never disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    line = choose_launcher("torchrun", 2, None, "none").line([*three_stages(folder, tiny_base, mini), *DDP])
    subprocess.run(line, check=True, capture_output=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    return adapters(folder / "runs" / "r")


@pytest.mark.slow
def test_a_job_on_two_nodes_is_stopped_and_goes_on_as_one_on_one_node(whole, cluster, arguments, tmp_path):  # noqa: F811
    """SLURM sends SIGTERM to every process of the step, and kills what is left when the first one has ended."""
    flags = [*DDP, "--logging-steps", "4", "--runs-dir", str(tmp_path / "runs"), "--run", "job"]
    job, folder = {"RECIPE": arguments[1], "FLAGS": shlex.join(flags)}, tmp_path / "runs" / "job"
    first = submit(cluster, **job, SLURM_NNODES="2", GPUS_PER_NODE="1")
    try:
        log = folder / "stages" / "02-GQA.partial" / "train_log.jsonl"
        while not log.exists() and first.poll() is None:
            time.sleep(0.02)
        below = psutil.Process(first.pid).children(recursive=True)
        step = [process for process in below if set(OF_A_STEP) & set(process.cmdline())]
        assert len(step) >= 6, "on each node the launcher, torchrun and a trainer"
        for process in step:
            process.send_signal(signal.SIGTERM)
        assert first.wait(timeout=120) == 128 + signal.SIGTERM, first.stderr.read()[-3000:]
    finally:
        with suppress(ProcessLookupError):
            os.killpg(first.pid, signal.SIGKILL)
    assert requeued(cluster)
    assert list(folder.glob("stages/02-GQA.partial/trainer/*/COMPLETE"))
    second = submit(cluster, **job, SLURM_NNODES="1", GPUS_PER_NODE="2")
    _, said = second.communicate(timeout=600)
    assert second.returncode == 0, said[-3000:]
    assert adapters(folder) == whole


@pytest.mark.slow
def test_one_rank_gets_the_signal_and_both_stop_after_the_same_step(whole, arguments, tmp_path):  # noqa: F811
    """Long before a line of the log, and with signals to the other rank while it saves. The end is the whole run's."""
    launch = [sys.executable, "-m", "llaca.launch", "--launcher", "torchrun", "--num-gpus", "2"]
    line, folder = [*launch, *arguments, *DDP, "--logging-steps", "1000", "--save-steps", "7"], tmp_path / "runs" / "r"
    process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not list(folder.glob("stages/*.partial/trainer/*/COMPLETE")) and process.poll() is None:
        time.sleep(0.01)
    found = [
        p for p in psutil.Process(process.pid).children(recursive=True) if p.cmdline()[2:4] == ["-m", "llaca.train"]
    ]
    (second,) = [p for p in found if p.environ()["RANK"] == "1"]
    second.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM and "the same command goes on" in told
    (complete,) = folder.glob("stages/*.partial/trainer/*/COMPLETE")
    assert json.loads(complete.read_text())["step"] < 60
    again = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    assert again.returncode == 0, again.stderr
    assert adapters(folder) == whole
