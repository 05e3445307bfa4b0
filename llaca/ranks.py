"""The processes of one run: one alone, or those that torchrun or DeepSpeed started."""

import os

import torch
from accelerate import PartialState


def start(zero: str) -> None:
    """Joins the other processes, if any. Raises ValueError if DeepSpeed is asked for and nobody launched it."""
    if zero != "none":
        if "RANK" not in os.environ:
            raise ValueError("DeepSpeed needs a launcher: bash train_continual.sh --launcher torchrun or deepspeed")
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    cpu = not torch.cuda.is_available()
    if cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    PartialState(cpu=cpu, **({"backend": "gloo"} if cpu and "RANK" in os.environ else {}))


def count() -> int:
    """How many processes there are."""
    return PartialState().num_processes


def first() -> bool:
    """Whether this is the process that writes."""
    return PartialState().is_main_process


def wait() -> None:
    """Waits until every process is here."""
    PartialState().wait_for_everyone()
