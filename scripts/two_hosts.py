"""Two hosts on one machine: runs a command on both, with NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT set.

    python -m scripts.two_hosts [--local] -- COMMAND ...

Each host is a set of Linux namespaces: it has its own network interface, host name (host-0, host-1), /etc/hosts and
processes, and shares the file system. Nothing of it outlives its processes, so nothing is left behind whatever happens.
It needs root, `ip` and `unshare` (Debian: iproute2, util-linux).

--local   no namespaces: both hosts are this machine, at 127.0.0.1

Ends when both hosts have ended, with the first exit status that is not 0. It writes `host-0: process N` and
`host-1: process N` to standard error, and takes these signals:

    SIGTERM, SIGINT   go on to the command on both hosts
    SIGUSR1, SIGUSR2  kill -9 of everything on host-0, on host-1
    SIGKILL           of it ends everything on both hosts; of one of the two processes everything on that host
"""

import argparse
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

ADDRESSES = ("10.77.0.1", "10.77.0.2")
SIGNALS = {signal.SIGUSR1: 0, signal.SIGUSR2: 1}
NAMESPACES = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]


def possible() -> bool:
    """Whether this process may make namespaces and a network between them."""
    if not all(map(shutil.which, ("ip", "unshare"))):
        return False
    trial = [*NAMESPACES, "ip", "link", "add", "trial0", "type", "veth", "peer", "name", "trial1"]
    return subprocess.run(trial, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False).returncode == 0


def die_with_parent() -> None:
    """Ends this process when the one that started it is killed."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class Host:
    """The command on host `number`; `process` is gone when everything on the host is gone."""

    def __init__(self, number: int, command: list[str], local: bool, port: int):
        self.local = local
        address = "127.0.0.1" if local else ADDRESSES[0]
        names = {"NNODES": "2", "NODE_RANK": str(number), "MASTER_ADDR": address, "MASTER_PORT": str(port)}
        inside = [sys.executable, __file__, "--inside", str(number)]
        inside += ["--local"] if local else []
        self.process = subprocess.Popen(
            [*([] if local else NAMESPACES), *inside, "--", *command],
            env={**os.environ, **names},
            stdin=subprocess.PIPE,
            preexec_fn=die_with_parent,
            start_new_session=True,  # the terminal's SIGINT comes once, from here
        )
        print(f"host-{number}: process {self.process.pid}", file=sys.stderr, flush=True)

    def separate(self) -> bool:
        """Whether it has left this process's network."""
        own, its = (os.readlink(f"/proc/{pid}/ns/net") for pid in ("self", self.process.pid))
        return own != its

    def begin(self) -> None:
        """Lets the command start."""
        self.process.stdin.write(b"\n")
        self.process.stdin.close()

    def send(self, signum: int) -> None:
        """A signal for the command."""
        for child in psutil.Process(self.process.pid).children() or [self.process]:
            child.send_signal(signum)

    def kill(self) -> None:
        """kill -9 of everything there: a host's processes end with the one that made its namespaces."""
        everything = psutil.Process(self.process.pid).children(recursive=True) if self.local else []
        self.process.kill()
        for process in everything:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def connect(hosts: list[Host]) -> None:
    """One cable between the two."""
    while not all(host.separate() for host in hosts):
        time.sleep(0.01)
    ends = [["name", "eth0", "netns", str(host.process.pid)] for host in hosts]
    subprocess.run(["ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1]], check=True)


def run(command: list[str], local: bool = False) -> int:
    """Runs the command on both hosts; returns the first exit status that is not 0."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    hosts = [Host(number, command, local, port) for number in range(2)]

    def forward(signum, _):
        for host in hosts:
            if host.process.poll() is None:
                host.send(signum)

    def kill(signum, _):
        if hosts[SIGNALS[signum]].process.poll() is None:
            hosts[SIGNALS[signum]].kill()

    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, forward)
    for signum in SIGNALS:
        signal.signal(signum, kill)
    try:
        if not local:
            connect(hosts)
        for host in hosts:
            host.begin()
        found = [host.process.wait() for host in hosts]
    except BaseException:
        for host in hosts:
            if host.process.poll() is None:
                host.kill()
        raise
    return next((status if status > 0 else 128 - status for status in found if status), 0)


def inside(number: int, command: list[str], local: bool) -> int:
    """What the first process of a host does: its name, its address, then the command."""
    if not sys.stdin.readline():
        return 1  # there is no network
    if not local:
        setup = [
            f"hostname host-{number}",
            "ip link set lo up",
            f"ip addr add {ADDRESSES[number]}/24 dev eth0",
            "ip link set eth0 up",
        ]
        for line in setup:
            subprocess.run(line.split(), check=True)
        names = [f"{address} host-{n}" for n, address in enumerate(ADDRESSES)]
        files = {"hosts": "\n".join(["127.0.0.1 localhost", *names]) + "\n", "resolv.conf": ""}
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/mnt"], check=True)
        for name, content in files.items():
            Path("/mnt", name).write_text(content)
            subprocess.run(["mount", "--bind", f"/mnt/{name}", f"/etc/{name}"], check=True)
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=die_with_parent)
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda number, _: child.send_signal(number))
    status = child.wait()
    return status if status >= 0 else 128 - status


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--local", action="store_true")
    parser.add_argument("--inside", type=int, help=argparse.SUPPRESS)
    parser.add_argument("command", nargs="+")
    args = parser.parse_args()
    if args.inside is not None:
        sys.exit(inside(args.inside, args.command, args.local))
    if not args.local and not possible():
        sys.exit("two_hosts: namespaces cannot be made here; it needs root, ip and unshare, or --local")
    sys.exit(run(args.command, args.local))


if __name__ == "__main__":
    main()
