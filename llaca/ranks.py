"""The processes of one run: one alone, or those that torchrun or DeepSpeed started."""

import fcntl
import os
import resource
import socket
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState

T = TypeVar("T")
# Some platforms set these for a single process, too; accelerate would look for others.
PRESET = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def start(zero: str = "none", patience: timedelta = timedelta(minutes=30)) -> None:
    """Joins the other processes, if any; `patience` is how long one waits for another.

    Raises ValueError if DeepSpeed is asked for and nobody launched it.
    """
    if zero != "none":
        if not os.environ.keys() >= {"RANK", "MASTER_ADDR", "MASTER_PORT"}:
            raise ValueError("DeepSpeed needs a launcher: bash train_continual.sh --launcher torchrun or deepspeed")
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    elif int(os.environ.get("WORLD_SIZE", 1)) == 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
        for name in PRESET:
            os.environ.pop(name, None)
    cpu = not torch.cuda.is_available()
    if cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if cpu and zero != "none":
        build_operation()
    if cpu and "RANK" in os.environ:
        check_address()
    several = {"timeout": patience} if "RANK" in os.environ else {}
    PartialState(cpu=cpu, **several, **({"backend": "gloo"} if cpu and several else {}))


def check_address() -> None:
    """Raises ValueError where gloo would listen at an address of this host that other hosts cannot reach."""
    here = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE"))  # torchrun's, DeepSpeed's
    if here == os.environ["WORLD_SIZE"] or "GLOO_SOCKET_IFNAME" in os.environ:
        return
    own, first = (resolved(name) for name in (socket.gethostname(), os.environ["MASTER_ADDR"]))
    if own.startswith("127.") and not first.startswith("127."):
        raise ValueError(
            f"{socket.gethostname()} resolves to {own}, where no other host can reach it: set GLOO_SOCKET_IFNAME to "
            "the network interface that leads to the other hosts, or correct /etc/hosts"
        )


def resolved(name: str) -> str:
    """The IPv4 address of a host, empty if it has none."""
    try:
        return socket.gethostbyname(name)
    except OSError:
        return ""


def build_operation() -> None:
    """Has DeepSpeed compile what it needs on a CPU, before its own start would, under a lock that ends with its holder.

    torch's lock is a file. A process that is killed while it compiles leaves it there, and all later ones wait for
    ever.
    """
    import deepspeed
    from torch.utils.cpp_extension import _get_build_directory

    builder = deepspeed.accelerator.get_accelerator().create_op_builder("ShareMemCommBuilder")
    if not deepspeed.ops.__compatible_ops__.get(builder.NAME, False):
        return
    folder = Path(_get_build_directory(builder.name, False))
    with (folder / "holder").open("w") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        (folder / "lock").unlink(missing_ok=True)
        builder.load(verbose=False)


def count() -> int:
    """How many processes there are."""
    return PartialState().num_processes


def rank() -> int:
    """Which of them this is, from 0."""
    return PartialState().process_index


def first() -> bool:
    """Whether this is the process that writes."""
    return PartialState().is_main_process


def first_of_host() -> bool:
    """Whether this is the first process of its host."""
    return PartialState().is_local_main_process


def everyone(mine: T) -> list[T]:
    """What every process has, by rank."""
    found = [mine]
    if count() > 1:
        found = [None] * count()
        torch.distributed.all_gather_object(found, mine)
    return found


def agreed(value: Any, what: str) -> Any:
    """What the first processes of all hosts say; the others say None. Raises ValueError if they differ in `what`."""
    said = [one for one in everyone(value) if one is not None]
    if any(one != said[0] for one in said):
        raise ValueError(f"the hosts differ in {what}: all of them need the same data")
    return said[0]


def wait() -> None:
    """Waits until every process is here."""
    PartialState().wait_for_everyone()


def leave() -> None:
    """Ends the processes' group, when all of them are done: one that just exits may abort in a thread of it.

    For one that has gone before its farewell this process, which is done, does not fail: the other's own exit tells.
    """
    try:
        wait()
    except RuntimeError as error:
        if not lost(error):
            raise
    PartialState().destroy_process_group()


def lost(error: RuntimeError) -> bool:
    """Whether a collective failed because another process has gone."""
    return isinstance(error, torch.distributed.DistError) or "gloo/transport" in str(error)


def same(value):
    """The first process's value, on every one: what it has just written another host may not see at once."""
    if count() == 1:
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values)
    return values[0]


def add_up(tensors: Sequence[torch.Tensor]) -> None:
    """Puts the sum of the ranks' tensors into each of them, on every rank."""
    if count() > 1:
        for tensor in tensors:
            torch.distributed.all_reduce(tensor)


def peak_memory() -> int:
    """Bytes that a rank has held at most since it started, of the rank with most: allocated on its GPU, without one
    resident in memory, libraries included."""
    if torch.cuda.is_available():
        own = torch.cuda.max_memory_allocated()
    else:
        own = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = torch.tensor(own, device=PartialState().device)
    if count() > 1:
        torch.distributed.all_reduce(peak, op=torch.distributed.ReduceOp.MAX)
    return int(peak)
