"""Two hosts: the bytes of one, also after one is killed; hosts that differ; hosts that fall silent."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import psutil
import pytest
from test_llaca_train import adapters, arguments, mini, three_stages  # noqa: F401
from torch.utils.cpp_extension import _get_build_directory

from llaca import ranks
from llaca.config import load_recipe
from llaca.train import run
from scripts.two_hosts import possible

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
# Where this machine does not let us make namespaces, two nodes at 127.0.0.1 stand in for the hosts.
PLACE = [] if possible() else ["--local"]
TWO_HOSTS = [sys.executable, "-m", "scripts.two_hosts", *PLACE]


class Hosts:
    """A command on two hosts, in the background; `tell` is what they print."""

    def __init__(self, command: list[str], log: Path):
        self.log = log
        with log.open("wb") as file:
            line = [*TWO_HOSTS, "--", *command]
            self.process = subprocess.Popen(line, cwd=ROOT, env=ENVIRONMENT, stdout=file, stderr=subprocess.STDOUT)

    @property
    def tell(self) -> str:
        return self.log.read_text(errors="replace")

    def until(self, condition) -> None:
        """Waits for it. Raises AssertionError with the log when the hosts end first."""
        while not condition():
            assert self.process.poll() is None, self.tell[-3000:]
            time.sleep(0.02)

    def processes(self, number: int) -> list[psutil.Process]:
        """All that run on a host."""
        (pid,) = re.findall(rf"host-{number}: process (\d+)", self.tell)
        return psutil.Process(int(pid)).children(recursive=True)

    def stop(self, number: int) -> None:
        """The host falls silent: its processes do nothing more and close nothing."""
        for process in self.processes(number):
            process.suspend()

    def resume(self, number: int) -> None:
        """It goes on."""
        for process in self.processes(number):
            process.resume()

    def end(self, seconds: float) -> int:
        """The exit status."""
        try:
            return self.process.wait(timeout=seconds)
        finally:
            self.process.kill()


MORE = ["--method", "llaca", "--grouping", "false", "--tasks", "TextVQA", "GQA", "--batch-size", "4"]
MORE += ["--save-steps", "2", "--zero", "2"]


def trains(arguments: list[str], name: str, processes: int, launcher: str = "torchrun") -> list[str]:  # noqa: F811
    line = [sys.executable, "-m", "llaca.launch", "--launcher", launcher, "--num-gpus", str(processes)]
    return [*line, *arguments[:-1], name, *MORE]


@pytest.fixture(scope="module")
def whole(tiny_base, mini, tmp_path_factory):  # noqa: F811
    """What two processes on one host hand on, never disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    line = trains(three_stages(folder, tiny_base, mini), "whole", 2)
    subprocess.run(line, cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True)
    found = adapters(folder / "runs" / "whole")
    assert len(found) >= 5
    return found


@pytest.mark.slow
def test_a_host_is_killed_and_the_same_command_goes_on_to_the_bytes_of_one_host(whole, arguments, tmp_path):  # noqa: F811
    """Under ZeRO 2. The other host ends soon and says why. (DDP on two hosts: tests/test_slurm.py)"""
    folder = tmp_path / "runs" / "r"
    hosts = Hosts(trains(arguments, "r", 1), tmp_path / "killed.log")
    hosts.until(lambda: list(folder.glob("stages/02-GQA.partial/trainer/checkpoint-2/COMPLETE")))
    hosts.process.send_signal(signal.SIGUSR2)
    assert hosts.end(60) != 0
    assert not (folder / "stages/02-GQA/DONE").exists()
    assert "another process of this run has gone" in hosts.tell, hosts.tell[-3000:]
    assert "the same command on every host goes on" in hosts.tell
    hosts = Hosts(trains(arguments, "r", 1), tmp_path / "again.log")
    assert hosts.end(600) == 0, hosts.tell[-3000:]
    assert adapters(folder) == whole


@pytest.mark.slow
def test_two_processes_of_one_host_are_killed_and_started_again(whole, arguments, tmp_path):  # noqa: F811
    """Also by DeepSpeed's own launcher, which hands its processes a --local_rank unless told not to."""
    folder, line = tmp_path / "runs" / "r", trains(arguments, "r", 2)
    process = subprocess.Popen(line, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(folder.glob("stages/02-*.partial/trainer/checkpoint-2")) and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (folder / "stages/02-GQA/DONE").exists()
    by_deepspeed = trains(arguments, "r", 2, "deepspeed")
    done = subprocess.run(by_deepspeed, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert adapters(folder) == whole
    story = json.loads((folder / "stages/02-GQA/stage.json").read_text())
    assert story["engine"] == "DeepSpeed ZeRO 2" and story["averaged"]
    assert [story[key] for key in ("processes", "micro_batch", "accumulation", "global_batch")] == [2, 4, 1, 8]
    told = story["environment"]
    assert (told["launcher"], told["processes"], told["hosts"]) == ("deepspeed", 2, {socket.gethostname(): 2})
    assert list(told["devices"].values()) == [2]


@pytest.mark.slow
def test_processes_that_would_train_something_else_are_refused_on_every_host(arguments, tmp_path):  # noqa: F811
    runs, out = tmp_path / "runs", tmp_path / "told"
    worker = ["tests/hosts_worker.py", "alike", arguments[1], str(runs), str(out)]
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--", *worker]
    done = subprocess.run(line, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads(Path(f"{out}.{rank}").read_text()) for rank in (0, 1))
    for told in (first, second):
        assert told["same"] == "None" and told["left"] == "[]"
        assert "ValueError: every process has to train the same: " in told["seed"] and "--seed is 1 on " in told["seed"]
        assert "peft is '0.0.1' on " in told["version"] and "commit" not in told["version"]
        assert "the checksum of GQA is 'another' on " in told["data"]
        assert "cannot be seen from" in told["folder"] and "--runs-dir" in told["folder"]
    assert (first["result"], second["result"]) == ("0", "1")
    assert second["together"] == "FileNotFoundError: train.json is missing"
    assert re.match(r"ValueError: another process cannot go on; \S+: train.json is missing", first["together"])


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_a_host_that_falls_silent_is_not_waited_for(tmp_path, number):
    """Host 0 holds the store through which the signs of life go."""
    out = tmp_path / "begun"
    ranked = f"RANK=$NODE_RANK WORLD_SIZE=2 LOCAL_RANK=0 exec {sys.executable} tests/hosts_worker.py silent {out}"
    hosts = Hosts(["bash", "-c", f"{ranked} || exit $?"], tmp_path / "log")
    hosts.until(lambda: all(Path(f"{out}.{rank}").exists() for rank in (0, 1)))
    time.sleep(4)  # longer than the silence that is borne
    assert hosts.process.poll() is None, hosts.tell
    for host in (0, 1):
        hosts.stop(host)  # as a scheduler does that gives the machines to another job for a while
    time.sleep(4)
    for host in (0, 1):
        hosts.resume(host)
    time.sleep(2)
    assert hosts.process.poll() is None, hosts.tell
    hosts.stop(number)
    gone = f"no sign of life for 3 s from rank {number} on "
    hosts.until(lambda: gone in hosts.tell)
    hosts.process.send_signal((signal.SIGUSR1, signal.SIGUSR2)[number])
    assert hosts.end(30) != 0


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        ({}, True),
        ({"GLOO_SOCKET_IFNAME": "eth0"}, False),
        ({"LOCAL_WORLD_SIZE": "4"}, False),  # all are here
        ({"MASTER_ADDR": "localhost"}, False),
    ],
)
def test_a_host_whose_name_leads_to_itself_is_refused_before_the_others_wait_for_it(monkeypatch, change, refused):
    """Debian's /etc/hosts has `127.0.1.1 NAME`: gloo would listen there, and the other hosts' attempts fail."""
    around = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1", **change}
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    for name, value in around.items():
        monkeypatch.setenv(name, value)
    addresses = {socket.gethostname(): "127.0.1.1", "10.0.0.1": "10.0.0.1", "localhost": "127.0.0.1"}
    monkeypatch.setattr(socket, "gethostbyname", addresses.__getitem__)
    with pytest.raises(ValueError, match=r"127\.0\.1\.1.*GLOO_SOCKET_IFNAME") if refused else nullcontext():
        ranks.check_address()


def test_a_compilation_that_was_killed_is_not_waited_for(tmp_path):
    """torch marks a build by a file, which a killed process leaves behind, and waits until there is none."""
    name = "deepspeed_shm_comm"
    folder, built = tmp_path / name, Path(_get_build_directory(name, False))
    shutil.copytree(built, folder)  # what is built already need not be compiled again
    (folder / "lock").touch()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    one = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment = ENVIRONMENT | one | {"TORCH_EXTENSIONS_DIR": str(tmp_path)}
    line = [
        sys.executable,
        "-c",
        "from llaca import ranks; ranks.start('2'); import deepspeed; deepspeed.init_distributed('gloo')",
    ]
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and f"{name}_op built" in done.stdout, done.stderr
    assert not (folder / "lock").exists()


@pytest.mark.parametrize("module", ["llaca.train", "eval.predict"])
def test_processes_leave_their_group_at_the_end(arguments, tmp_path, module):  # noqa: F811
    """One that just exits may abort in a thread of it, and the whole run or its answers count as failed."""
    script = tmp_path / "script.py"
    script.write_text(
        f"import torch.distributed as dist\nfrom llaca import ranks\nfrom {module} import main\n"
        "ranks.start()\nassert dist.is_initialized()\nmain()\nassert not dist.is_initialized()\n"
    )
    line = [*arguments, "--method", "zero_shot"]
    if module == "eval.predict":
        folder = run(load_recipe(line))
        line = ["--runs-dir", str(folder.parent), "--cells", "final"]
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*start, "--", str(script), *line], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


FAREWELL = """
import os
import sys
import time
from llaca import ranks

ranks.start()
ranks.wait()
if ranks.rank() == 0:
    sys.stdout.flush()
    os._exit(0)
time.sleep(1)
ranks.leave()
print("left")
"""


def test_a_process_that_is_done_does_not_fail_for_one_that_has_gone():
    """All that had to be done together is done: which of them is the last to leave is chance."""
    around = {**os.environ, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        around["MASTER_PORT"] = str(free.getsockname()[1])
    started = [
        subprocess.Popen(
            [sys.executable, "-c", FAREWELL],
            env={**around, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    told = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0], told[1][1]
    assert told[1][0] == "left\n"
