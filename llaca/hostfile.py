"""DeepSpeed's hostfile, read before its launcher reads it: that one goes on without a file that is not there."""

import re
import shutil
import socket
from pathlib import Path

# What DeepSpeed's own pattern (deepspeed/launcher/runner.py) takes, but no "4x" and no "4.5" as 4.
LINE = re.compile(r"(\S+)\s+slots=(\d+)(?:\s.*)?")
USUAL = Path("/job/hostfile")  # the runner reads it, where it is, without being told: DLTS_HOSTFILE


def read_hostfile(path: Path) -> dict[str, int]:
    """Host -> slots (processes, one a GPU), in the file's order.

    A line is `HOST slots=N`; blank lines and those that start with # are left out. Raises ValueError or
    FileNotFoundError naming the file and the line.
    """
    remedy = "a line is HOST slots=N, N processes, one a GPU"
    if not path.is_file():
        raise FileNotFoundError(f"--hostfile {path}: no such file")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"--hostfile {path}: not a text file ({error}); {remedy}") from None
    slots: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        where = f"--hostfile {path}, line {number}"
        match = LINE.fullmatch(line)
        if match is None:
            raise ValueError(f"{where}: {line!r} cannot be read; {remedy}")
        host, count = match[1], int(match[2])
        if host in slots:
            raise ValueError(f"{where}: {host} stands in an earlier line too; put its slots into one line")
        if count == 0:
            raise ValueError(f"{where}: {host} has no slots; leave the line out")
        slots[host] = count
    if not slots:
        raise ValueError(f"--hostfile {path}: names no host; {remedy}")
    return slots


def is_here(host: str) -> bool:
    """Whether `host` (or user@host) is this machine: its own name, or an address that a socket here can have."""
    name = host.rpartition("@")[2]
    if name in ("localhost", socket.gethostname()):
        return True
    try:
        found = socket.getaddrinfo(name, 0, type=socket.SOCK_DGRAM)
    except OSError:
        return False
    for family, kind, _, _, address in found:
        try:
            with socket.socket(family, kind) as own:
                own.bind(address)
                return True
        except OSError:
            continue
    return False


def runner_options(path: Path, gpus: int | None) -> tuple[dict[str, int], list[str]]:
    """Host -> processes, and what DeepSpeed's runner has to be told; `gpus`: fewer processes a host than its slots.

    Raises ValueError or FileNotFoundError for a file that cannot be followed, or without ssh or pdsh, which the runner
    starts the other hosts with.
    """
    slots, options = read_hostfile(path), ["--hostfile", str(path)]
    if gpus is not None:
        # DeepSpeed's --num_gpus takes the place of every host's slots, also of fewer.
        for host, count in slots.items():
            if gpus > count:
                raise ValueError(
                    f"--num-gpus {gpus} is more than the {count} slots of {host} in {path}: leave --num-gpus out, or "
                    "correct the file"
                )
        slots, options = dict.fromkeys(slots, gpus), [*options, "--num_gpus", str(gpus)]
    alone = len(slots) == 1 and is_here(next(iter(slots)))
    if len(slots) == 1 and not alone:
        options.append("--force_multi")  # else the runner starts the processes of a single host on this machine
    for program in ("ssh",) if alone else ("ssh", "pdsh"):
        if shutil.which(program) is None:
            raise ValueError(f"--hostfile {path}: DeepSpeed starts its hosts with {program}, which is not installed")
    return slots, options
