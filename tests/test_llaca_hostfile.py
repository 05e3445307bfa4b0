"""What DeepSpeed's own launcher makes of our commands: hostfiles, --num-gpus, CUDA_VISIBLE_DEVICES."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llaca.hostfile import is_here, read_hostfile
from llaca.launch import announce, choose_launcher, commands, main

ROOT = Path(__file__).parents[1]
# Stands in for the training: every process tells who it is.
STUB = """
import json, os, sys
told = {key: os.environ[key] for key in ("RANK", "WORLD_SIZE")}
open(f"told-{told['RANK']}.json", "w").write(json.dumps({**told, "arguments": sys.argv[1:]}))
"""
# Stands in for another machine: the command runs here.
SSH = '#!/bin/bash\nwhile [ "${1#-}" != "$1" ]; do shift 2; done\nshift\nexec bash -c "$*"\n'
PDSH = """#!/bin/bash
while [ "${1#-}" != "$1" ]; do
    case "$1" in -w) hosts=${2//,/ }; shift 2 ;; -f) shift 2 ;; *) shift ;; esac
done
number=0
for host in $hosts; do
    command="$*"
    bash -c "${command//%n/$number}" &
    number=$((number + 1))
done
wait
"""


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder whose llaca.train is the stub, and ssh and pdsh that come back to this machine."""
    monkeypatch.setattr("llaca.launch.USUAL", tmp_path / "no-hostfile")
    for name, text in (("llaca/__init__.py", ""), ("llaca/train.py", STUB), ("bin/ssh", SSH), ("bin/pdsh", PDSH)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path


def hosts(folder, text):
    path = folder / "hosts"
    path.write_text(text)
    return str(path)


def start(folder, launcher, *arguments):
    """What the processes told, by rank, and the launcher's output."""
    done = subprocess.run(
        launcher.line(["--run", "r", *arguments]),
        cwd=folder,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(path.read_text()) for path in sorted(folder.glob("told-*.json"))], done.stdout


GOOD = {
    "a slots=2\nb slots=4\n": {"a": 2, "b": 4},
    "# the cluster\n\n  worker-0   slots=8 max_slots=8\n10.0.0.7\tslots=1\r\nuser@c slots=2": {
        "worker-0": 8,
        "10.0.0.7": 1,
        "user@c": 2,
    },
}
BAD = {
    "": "names no host",
    "# a slots=2\n\n": "names no host",
    "a slots=2\na slots=4\n": r"hosts, line 2: a stands in an earlier line",
    "a slots=2\n\nb\n": r"hosts, line 3: 'b' cannot be read; a line is HOST slots=N",
    "a slots=two\n": "line 1",
    "a slots = 2\n": "line 1",
    "a:2\n": "line 1",
    "slots=2\n": "line 1",
}
OURS = {"a slots=0\n": "a has no slots", "a slots=4x\n": "line 1", "a slots=1.5\n": "line 1"}


def test_a_hostfile_means_what_deepspeeds_own_parser_reads(tmp_path):
    runner = pytest.importorskip("deepspeed.launcher.runner")
    for text, expected in GOOD.items():
        path = hosts(tmp_path, text)
        assert read_hostfile(Path(path)) == dict(runner.fetch_hostfile(path)) == expected
    for text, message in BAD.items():
        path = hosts(tmp_path, text)
        with pytest.raises(ValueError):
            runner.fetch_hostfile(path)
        with pytest.raises(ValueError, match=message):
            read_hostfile(Path(path))
    for text, message in OURS.items():  # DeepSpeed reads 0, 4 and 1
        path = hosts(tmp_path, text)
        assert runner.fetch_hostfile(path)
        with pytest.raises(ValueError, match=message):
            read_hostfile(Path(path))


def test_without_its_hostfile_nothing_starts(tmp_path, monkeypatch):
    for name in ("none", ""):
        with pytest.raises(FileNotFoundError, match=r"--hostfile .*no such file"):
            choose_launcher(None, None, name and str(tmp_path / name), "2")
    line = ["--method", "lora", "--zero", "2", "--runs-dir", str(tmp_path / "r"), "--hostfile", str(tmp_path / "none")]
    monkeypatch.setattr(sys, "argv", ["train_continual.sh", *line])
    with pytest.raises(SystemExit, match="none: no such file"):
        main()
    assert not (tmp_path / "r").exists()


@pytest.mark.slow
def test_the_slots_of_a_hostfile_are_the_processes(elsewhere, capsys):
    launcher = choose_launcher(None, None, hosts(elsewhere, "localhost slots=2\n"), "2")
    assert (launcher.name, launcher.processes, launcher.hosts) == ("deepspeed", 2, {"localhost": 2})
    announce(commands([]), launcher, 1)
    assert "2 processes a run, started by deepspeed: 2 on localhost" in capsys.readouterr().out
    told, _ = start(elsewhere, launcher, "--data-root", "a folder")
    assert [(t["RANK"], t["WORLD_SIZE"]) for t in told] == [("0", "2"), ("1", "2")]
    assert told[0]["arguments"] == ["--run", "r", "--data-root", "a folder"]


@pytest.mark.slow
def test_hosts_with_different_slots(elsewhere):
    launcher = choose_launcher("deepspeed", None, hosts(elsewhere, "one slots=1\nother slots=2\n"), "2")
    told, _ = start(elsewhere, launcher)
    assert [t["RANK"] for t in told] == ["0", "1", "2"] and {t["WORLD_SIZE"] for t in told} == {"3"}


def test_fewer_processes_than_slots_are_those_that_deepspeed_starts(elsewhere):
    runner = pytest.importorskip("deepspeed.launcher.runner")
    launcher = choose_launcher("deepspeed", 1, hosts(elsewhere, "one slots=1\nother slots=2\n"), "2")
    assert launcher.hosts == {"one": 1, "other": 1} and launcher.processes == 2
    asked = runner.parse_args(launcher.line([])[3:])
    slots = runner.parse_inclusion_exclusion(runner.fetch_hostfile(asked.hostfile), asked.include, asked.exclude)
    started = runner.apply_num_nodes_and_gpus(slots, asked.num_nodes, asked.num_gpus)
    assert {host: len(numbers) for host, numbers in started.items()} == launcher.hosts


@pytest.mark.slow
def test_a_single_host_that_is_another_machine_is_not_replaced_by_this_one(elsewhere):
    """DeepSpeed's runner starts a single host's processes where it runs itself."""
    launcher = choose_launcher("deepspeed", None, hosts(elsewhere, "worker.invalid slots=1\n"), "2")
    (elsewhere / "bin/pdsh").write_text('#!/bin/bash\necho "pdsh $*"\n')
    told, printed = start(elsewhere, launcher)
    assert re.search(r"^pdsh .*-w worker\.invalid ", printed, re.MULTILINE) and not told


def test_more_processes_than_a_hosts_slots_are_refused(elsewhere):
    with pytest.raises(ValueError, match=r"--num-gpus 2 is more than the 1 slots of b in .*hosts"):
        choose_launcher("deepspeed", 2, hosts(elsewhere, "a slots=2\nb slots=1\n"), "2")


def test_programs_that_deepspeed_needs_are_named(elsewhere, monkeypatch):
    monkeypatch.setenv("PATH", str(elsewhere))
    for text, program in (("localhost slots=1\n", "ssh"), ("a slots=1\nb slots=1\n", "ssh")):
        with pytest.raises(ValueError, match=f"starts its hosts with {program}, which is not installed"):
            choose_launcher("deepspeed", None, hosts(elsewhere, text), "2")
    (elsewhere / "ssh").write_text(SSH)
    (elsewhere / "ssh").chmod(0o755)
    assert choose_launcher("deepspeed", None, hosts(elsewhere, "localhost slots=1\n"), "2").processes == 1
    with pytest.raises(ValueError, match="pdsh, which is not installed"):
        choose_launcher("deepspeed", None, hosts(elsewhere, "a slots=1\nb slots=1\n"), "2")


def test_this_machine_is_known_by_its_names_and_addresses():
    for name in ("localhost", "127.0.0.1", "me@localhost", socket.gethostname()):
        assert is_here(name)
    for name in ("192.0.2.1", "worker.invalid"):  # RFC 5737 and 6761: never a machine's own
        assert not is_here(name)


def test_the_hostfile_that_deepspeed_looks_for_by_itself_is_announced(elsewhere, monkeypatch):
    monkeypatch.setattr("llaca.launch.USUAL", Path(hosts(elsewhere, "localhost slots=3\n")))
    assert choose_launcher("deepspeed", None, None, "2").hosts == {"localhost": 3}
    assert choose_launcher("torchrun", None, None, "2").hosts is None


@pytest.mark.parametrize(
    ("shown", "gpus", "expected"),
    [
        ("", None, []),
        ("", 2, ["--num_gpus", "2"]),
        ("2,3", None, []),
        ("2,3,5", 2, ["--include", "localhost:2,3"]),
        ("2,3", 2, []),
    ],
)
def test_cuda_visible_devices_are_the_gpus_that_deepspeed_takes(elsewhere, monkeypatch, shown, gpus, expected):
    """The runner's own functions, fed with a machine of eight GPUs."""
    runner = pytest.importorskip("deepspeed.launcher.runner")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(shown.split(",")) if shown else 8)
    launcher = choose_launcher("deepspeed", gpus, None, "2")
    assert list(launcher.own) == expected
    told = runner.parse_args(launcher.line([])[3:])
    include = told.include
    if shown and not include and told.num_gpus < 0:  # as in its main
        include = f"localhost:{shown}"
    found = runner.parse_inclusion_exclusion({"localhost": 8}, include, told.exclude)
    found = runner.apply_num_nodes_and_gpus(found, told.num_nodes, told.num_gpus)["localhost"]
    visible = [int(number) for number in shown.split(",")] if shown else list(range(8))
    assert found == visible[: launcher.processes] and launcher.processes == (gpus or len(visible))


@pytest.mark.parametrize("shown", ["GPU-8f9c1a2b", "0,MIG-7", "0,9"])
def test_gpus_that_are_not_named_by_number_are_for_torchrun(elsewhere, monkeypatch, shown):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=f"CUDA_VISIBLE_DEVICES is '{shown}'.*--launcher torchrun"):
        choose_launcher("deepspeed", None, None, "2")
    assert choose_launcher("torchrun", None, None, "2").processes == 1


def test_numbers_of_processes_that_cannot_be(monkeypatch):
    for gpus in (0, -2):
        with pytest.raises(ValueError, match=f"--num-gpus {gpus}: a run has at least one process"):
            choose_launcher(None, gpus, None, "none")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="--num-gpus 3: this machine shows 2 GPUs"):
        choose_launcher(None, 3, None, "none")
    monkeypatch.setenv("NNODES", "2")
    assert choose_launcher(None, None, None, "none").processes == 4
    monkeypatch.setenv("NNODES", "2:4")
    with pytest.raises(ValueError, match="NNODES is '2:4'"):
        choose_launcher(None, None, None, "none")
