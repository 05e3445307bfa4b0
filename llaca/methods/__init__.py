"""The methods by name. To add one: write its file and name it here."""

from typing import TYPE_CHECKING

from llaca.methods.agem import AGEM
from llaca.methods.averaged_pgp import AveragedPGP
from llaca.methods.base import WHOLE_TENSORS, Method
from llaca.methods.bema import BEMA
from llaca.methods.blocks import InfLoRA, OLoRA, StackedLoRA
from llaca.methods.ccfi import CCFI
from llaca.methods.dgg import DGG
from llaca.methods.distilled import Corrective, Recyclable
from llaca.methods.dsee import DSEE
from llaca.methods.eproj import EProj
from llaca.methods.ewc import EWC
from llaca.methods.keeplora import KeepLoRA
from llaca.methods.l2 import L2
from llaca.methods.llaca import FixedEMA, LLaCA
from llaca.methods.lwf import LwF
from llaca.methods.merging import CoFiMA, CoMA, TaskMerge
from llaca.methods.model_tailor import ModelTailor
from llaca.methods.moelora import MoELoRA
from llaca.methods.oft import OFT
from llaca.methods.osf import OSF
from llaca.methods.pace import PACE
from llaca.methods.pathweave import PathWeave
from llaca.methods.pgp import PGP
from llaca.methods.rcl import RCL
from llaca.methods.reference import LoRA, LoraLowLr, LoraPerTask, LoraStable, MultiTask, ZeroShot
from llaca.methods.reglora import RegLoRA
from llaca.methods.replay import Replay
from llaca.methods.router import DiscriminantRouter, PrototypeRouter
from llaca.methods.safe import SAFE
from llaca.methods.sd_lora import SDLoRA
from llaca.methods.smoothing import Smoothing
from llaca.methods.task_vectors import MagMax, Ties

if TYPE_CHECKING:  # the recipe knows the methods
    from llaca.config import Recipe

METHODS: dict[str, type[Method]] = {
    "zero_shot": ZeroShot,
    "multi_task": MultiTask,
    "lora": LoRA,
    "lora_low_lr": LoraLowLr,
    "lora_stable": LoraStable,
    "lora_per_task": LoraPerTask,
    "prototype_router": PrototypeRouter,
    "ewc": EWC,
    "l2": L2,
    "reglora": RegLoRA,
    "lwf": LwF,
    "recyclable": Recyclable,
    "corrective": Corrective,
    "safe": SAFE,
    "smoothing": Smoothing,
    "pace": PACE,
    "replay": Replay,
    "ccfi": CCFI,
    "agem": AGEM,
    "dgg": DGG,
    "pgp": PGP,
    "rcl": RCL,
    "osf": OSF,
    "coma": CoMA,
    "cofima": CoFiMA,
    "task_merge": TaskMerge,
    "magmax": MagMax,
    "ties": Ties,
    "bema": BEMA,
    "model_tailor": ModelTailor,
    "stacked_lora": StackedLoRA,
    "olora": OLoRA,
    "inflora": InfLoRA,
    "keeplora": KeepLoRA,
    "sd_lora": SDLoRA,
    "pathweave": PathWeave,
    "oft": OFT,
    "dsee": DSEE,
    "moelora": MoELoRA,
    "eproj": EProj,
    "fixed_ema": FixedEMA,
    "llaca": LLaCA,
    "averaged_pgp": AveragedPGP,
    "discriminant_router": DiscriminantRouter,
}


def method_of(recipe: "Recipe") -> Method:
    """The method of a recipe. Raises ValueError if it cannot follow the recipe's settings, model or engine."""
    name, zero = recipe.method.method, recipe.engine.zero
    method = METHODS[name](recipe.settings)
    if zero not in method.engines:
        works = f"{', '.join(method.engines)} (none: one process or DDP)"
        raise ValueError(f"method {name} does not work with --zero {zero}; it does with {works}")
    if method.edits_gradients and zero not in WHOLE_TENSORS:
        raise ValueError(f"method {name} changes gradients, which --zero {zero} never shows together: take --zero 2")
    clipping = [recipe.train.max_grad_norm, *(own.get("max_grad_norm", 0) for own in recipe.train.per_task.values())]
    if method.edits_gradients and any(clipping):
        raise ValueError(
            f"method {name} changes gradients, and engines clip them at different times: give --max_grad_norm 0"
        )
    if method.rests:
        decays = [recipe.train.weight_decay, *(own.get("weight_decay", 0) for own in recipe.train.per_task.values())]
        if any(decays):
            raise ValueError(f"weight_decay would move what method {name} leaves at rest: take 0")
        if recipe.method.grouping and recipe.method.new_group_start != "fresh":
            raise ValueError(f"method {name} needs groups that start empty: give --new_group_start fresh")
    if method.compares and recipe.train.batch_size == 1 and recipe.train.global_batch_size in (0, 1):
        raise ValueError(f"method {name} compares the records of a micro-batch: take --batch_size 2 or more")
    if method.takes_local and recipe.train.loss_normalisation != "local":
        raise ValueError(f"method {name} works on a micro-batch's mean loss: give --loss_normalisation local")
    method.check_model(recipe.model)
    return method
