"""What a run ran on: cores, devices, driver, hosts, launcher, versions."""

import os
import platform
import re
import socket
from collections import Counter
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import joblib
import torch

from llaca import ranks
from llaca.processes import launcher

PACKAGES = ("torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes", "tokenizers", "sentencepiece",
            "safetensors", "numpy", "scikit-learn", "pillow")  # fmt: skip
DRIVER = Path("/proc/driver/nvidia/version")


def cores() -> int:
    """CPU cores that this process may use: fewer than the machine has where affinity or a container says so."""
    return joblib.cpu_count()


def side_by_side() -> int:
    """How many processes of OMP_NUM_THREADS threads (1, if unset) the cores hold, at least 1.

    Raises ValueError for an OMP_NUM_THREADS that is no number of threads.
    """
    threads = os.environ.get("OMP_NUM_THREADS") or "1"
    first = threads.split(",")[0].strip()  # a list is of nested regions
    if not first.isdecimal() or int(first) < 1:
        raise ValueError(f"OMP_NUM_THREADS is {threads!r} in the environment; it must be a number of threads, as 1")
    return max(1, cores() // int(first))


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """The installed version of each package."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def device() -> str:
    """The name and memory of what this process computes on: its GPU, or the CPU."""
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(torch.cuda.current_device())
        return f"{found.name}, {found.total_memory / 2**30:.1f} GiB"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"{cpu_model()}, {cores()} of {os.cpu_count()} cores, {memory / 2**30:.1f} GiB"


def cpu_model() -> str:
    """The CPU's name."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    named = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return named[1] if named else platform.processor() or platform.machine()


def driver(text: str) -> str:
    """The driver's version in what NVIDIA's kernel module tells of itself in DRIVER."""
    found = re.search(r"\b\d+\.\d+(\.\d+)?\b", text.splitlines()[0] if text else "")
    return found[0] if found else "unknown"


def gpu_software() -> dict[str, str]:
    """CUDA, NCCL and the driver; empty without a GPU."""
    if not torch.cuda.is_available():
        return {}
    told = DRIVER.read_text(encoding="utf-8") if DRIVER.is_file() else ""
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else "none"
    return {"cuda": str(torch.version.cuda), "nccl": nccl, "driver": driver(told)}


def processes() -> dict:
    """Who trains this run: {launcher, processes, hosts: {host: processes}, devices: {device: processes}}.

    Every rank has to call it.
    """
    names, devices = zip(*ranks.everyone((socket.gethostname(), device())), strict=True)
    return {
        "launcher": launcher(),
        "processes": ranks.count(),
        "hosts": dict(Counter(names)),
        "devices": dict(Counter(devices)),
    }
