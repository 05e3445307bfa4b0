"""Engines: what one process, DDP and DeepSpeed show of the trainable tensors around an optimizer step.

Under DeepSpeed the engine steps inside `accelerator.backward`, so that every callback of the Trainer comes too late:
the parameters have moved and no gradient is left. But whatever the engine, in the end one torch optimizer steps on
tensors whose `.grad` is the reduced and unscaled gradient: the parameters themselves (one process, DDP, ZeRO 0), or
flat float32 partitions of them, one optimizer call after the other (ZeRO 1 to 3, offloaded or not). torch's own step
hooks sit there.

A step that the engine skips for an overflow calls no optimizer, so the method does not see it. Who calls the method is
llaca/callbacks.py.
"""

from typing import TYPE_CHECKING

from llaca.engines.deepspeed import DeepSpeed
from llaca.engines.plain import Engine

if TYPE_CHECKING:  # brings in PEFT and, where installed, bitsandbytes
    from llava.trainer import LlavaTrainer


def engine_of(trainer: "LlavaTrainer") -> Engine:
    """What trains the model of a trainer that has prepared it. Raises ValueError for one that is not supported."""
    if trainer.is_fsdp_enabled or trainer.args.n_gpu > 1:
        raise ValueError("FSDP and DataParallel are not supported: use DDP (--launcher torchrun) or DeepSpeed")
    return DeepSpeed(trainer) if trainer.is_deepspeed_enabled else Engine(trainer)
