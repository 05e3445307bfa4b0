"""The methods by name. To add one: write its file, name it here, and give it a line in configs/methods/."""

from llaca.methods.agem import AGEM
from llaca.methods.average import MovingAverage
from llaca.methods.base import Method
from llaca.methods.ewc import EWC
from llaca.methods.lwf import LwF
from llaca.methods.merging import CoFiMA, CoMA
from llaca.methods.model_tailor import ModelTailor
from llaca.methods.moelora import MoELoRA
from llaca.methods.pgp import PGP
from llaca.methods.reference import LoraPerTask, MultiTask, ZeroShot
from llaca.methods.replay import Replay

METHODS: dict[str, type[Method]] = {
    "zero_shot": ZeroShot,
    "multi_task": MultiTask,
    "lora": Method,
    "lora_low_lr": Method,
    "lora_per_task": LoraPerTask,
    "ewc": EWC,
    "lwf": LwF,
    "replay": Replay,
    "agem": AGEM,
    "pgp": PGP,
    "coma": CoMA,
    "cofima": CoFiMA,
    "model_tailor": ModelTailor,
    "moelora": MoELoRA,
    "eproj": Method,
    "fixed_ema": MovingAverage,
    "llaca": MovingAverage,
}
