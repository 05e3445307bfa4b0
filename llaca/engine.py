"""What an engine shows of its trainable tensors around an optimizer step: one process, DDP, DeepSpeed ZeRO 0 to 3.

Under DeepSpeed the engine steps inside `accelerator.backward`, so that every callback of the Trainer comes too late:
the parameters have moved and no gradient is left. But whatever the engine, in the end one torch optimizer steps on
tensors whose `.grad` is the reduced and unscaled gradient: the parameters themselves (one process, DDP, ZeRO 0), or
flat float32 partitions of them, one optimizer call after the other (ZeRO 1 to 3, offloaded or not). torch's own step
hooks sit there.

    Layout   which elements of which tensor this rank steps on
    Shards   those elements and their gradients, as a method sees them

A step that the engine skips for an overflow calls no optimizer, so the method does not see it. Who calls the method is
llaca/callbacks.py.
"""

import inspect
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

from llava.model import trainable_parameters

if TYPE_CHECKING:  # brings in PEFT and, where installed, bitsandbytes
    from llava.trainer import LlavaTrainer

PLAIN_LINEAR = functional.linear  # DeepSpeed replaces it for good where it shards the first tensor


def deepspeed_file(zero: str) -> Path:
    """DeepSpeed's configuration for a recipe's `zero`, which is not "none"."""
    return Path(__file__).parents[1] / "scripts" / f"zero{zero}.json"


def shards_weights(zero: str) -> bool:
    """Whether a rank holds 1/N of the weights under a recipe's `zero`."""
    return zero.startswith("3")


@contextmanager
def sharded_loading(zero: str, dtype: torch.dtype) -> Iterator[None]:
    """Models that `from_pretrained` makes meanwhile hold 1/N of each tensor on each rank, if `zero` shards weights.

    The first rank reads the file and sends each tensor round. What is attached later is whole until the engine
    prepares the model. `dtype` must be that of the model: DeepSpeed makes the tensors in the one that it is told.
    """
    if not shards_weights(zero):
        yield
        return
    blocks = json.loads(deepspeed_file(zero).read_text(encoding="utf-8"))
    told = HfDeepSpeedConfig(
        {
            "train_micro_batch_size_per_gpu": 1,  # DeepSpeed wants one; nothing is trained by this configuration
            "bf16": {"enabled": dtype == torch.bfloat16},
            "zero_optimization": blocks["zero_optimization"],
        }
    )
    try:  # transformers keeps a weak reference: `told` must live
        yield
    finally:
        unset_hf_deepspeed_config()
        del told


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """The module's weights whole on every rank meanwhile, to be read, and its linears computed as without sharding:
    DeepSpeed's own adds the bias in a step of its own, and rounds otherwise."""
    if not any(hasattr(parameter, "ds_id") for parameter in module.parameters()):
        yield
        return
    import deepspeed

    sharded_linear, functional.linear = functional.linear, PLAIN_LINEAR
    try:
        with deepspeed.zero.GatheredParameters(list(module.parameters())):
            yield
    finally:
        functional.linear = sharded_linear


def cast_for_engine(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts what is attached to a sharded model as DeepSpeed does with one that was loaded whole: it leaves this out
    where it meets a tensor that is sharded already."""
    for parameter in model.parameters():
        if not hasattr(parameter, "ds_id"):
            parameter.data = parameter.data.to(dtype)


def release(trainer: "LlavaTrainer") -> None:
    """Lets DeepSpeed forget the model of a trainer that has trained, so that it goes with the last of our references.

    `destroy` removes the hooks on the gradients' accumulators. At ZeRO 3 two more things of DeepSpeed's are global: the
    stack of modules whose forward pass is under way, which keeps the outermost one for ever, and a cache of what to
    release after a module, whose keys are the modules.
    """
    trainer.model_wrapped.destroy()
    if zero_stage(trainer) == 3:
        from deepspeed.runtime.zero import parameter_offload, partitioned_param_coordinator

        parameter_offload.FWD_MODULE_STACK.clear()
        coordinator = partitioned_param_coordinator.PartitionedParameterCoordinator
        decorated = coordinator._PartitionedParameterCoordinator__params_to_release
        inspect.getclosurevars(decorated).nonlocals["func"].cache_clear()


class Piece(NamedTuple):
    """Elements [start, start + numel) of the tensor `name`, which lie at `offset` of what the optimizer steps on."""

    name: str
    shape: torch.Size
    flat: Tensor | None  # None: this rank steps on no element of it
    offset: int
    start: int
    numel: int

    def of(self, tensor: Tensor) -> Tensor:
        """Its view of `flat`, or of a tensor like `flat`: in the full shape where nothing is sharded, else [numel]."""
        tensor = tensor.detach()
        if tensor.dim() == len(self.shape) and self.numel == tensor.numel():
            return tensor
        return tensor[self.offset : self.offset + self.numel]


@dataclass
class Shards:
    """This rank's part of the trainable tensors: `names`, `parameters` and, directly after a step, its `gradients`.

    Where nothing is sharded every rank has all of them, in their own shapes; else pieces of any length, also empty,
    float32. The parameters are live views.
    """

    layout: "Layout"
    parameters: list[Tensor]
    gradients: list[Tensor]

    @property
    def names(self) -> list[str]:
        return self.layout.names

    def sum(self, table: Tensor) -> Tensor:
        """The sum of the ranks' tables, where the ranks hold different elements: one small all-reduce."""
        if not self.layout.sharded:
            return table
        device = self.layout.device
        total = table.to(device, copy=True)
        dist.all_reduce(total)
        return total.to(table.device)


class Layout:
    """The pieces of this rank, in the model's order, and all tensors that its optimizer steps on."""

    def __init__(self, engine: str, pieces: list[Piece], flats: list[Tensor], sharded: bool, device: torch.device):
        self.engine, self.pieces, self.flats, self.sharded, self.device = engine, pieces, flats, sharded, device
        self.names = [piece.name for piece in pieces]
        self.nothing = flats[0].new_empty(0, dtype=torch.float32)

    def shards(self, gradients: dict[int, Tensor] | None = None) -> Shards:
        """The live parameters; `gradients` maps the id of each `flat` to its gradient."""
        parameters = [self.nothing if p.flat is None else p.of(p.flat) for p in self.pieces]
        if gradients is None:
            return Shards(self, parameters, [])
        grads = [self.nothing if p.flat is None else p.of(gradients[id(p.flat)]) for p in self.pieces]
        return Shards(self, parameters, grads)

    def cut(self, full: dict[str, Tensor]) -> list[Tensor]:
        """This rank's pieces of full tensors: the inverse of `gather`, views shaped like `shards().parameters`."""
        found = []
        for piece in self.pieces:
            flat = full[piece.name].reshape(-1)[piece.start : piece.start + piece.numel]
            whole = piece.flat is not None and piece.of(piece.flat).shape == piece.shape
            found.append(flat.view(piece.shape) if whole else flat)
        return found

    def gather(self, tensors: Iterable[Tensor]) -> dict[str, Tensor]:
        """name -> the full tensor, float32 on the CPU, of shards like `shards().parameters`; call it on every rank."""
        full = {}
        for piece, tensor in zip(self.pieces, tensors, strict=True):
            if self.sharded:
                whole = torch.zeros(piece.shape.numel(), device=self.device)
                whole[piece.start : piece.start + piece.numel] = tensor.to(self.device)
                dist.all_reduce(whole)  # the other ranks hold zeros there: exact
                tensor = whole
            # ZeRO's are flat with one rank, too
            full[piece.name] = tensor.detach().to("cpu", torch.float32, copy=True).view(piece.shape)
        return full

    @torch.no_grad()
    def write(self, full: dict[str, Tensor]) -> None:
        """Put full tensors into what the optimizer steps on. Float32 masters of a bfloat16 model need it to start from
        what was saved, not from its rounding."""
        for piece, values in zip(self.pieces, self.cut(full), strict=True):
            if piece.flat is not None:
                piece.of(piece.flat).copy_(values)


def coming_gradients(trainer: "LlavaTrainer", layout: Layout) -> Shards:
    """The gradients that the optimizer is about to use, to be changed in place: when it is first called in a step. Not
    for ZeRO 3.

    ZeRO 1 and 2 call it for one group of parameters after the other, and join and cast a group's gradient only then;
    here those of the later groups are joined and cast before. Clipping and unscaling come as late: not with them.
    """
    ready = {id(flat): flat.grad for flat in layout.flats if flat.grad is not None}
    if zero_stage(trainer) in (1, 2):
        fragments = trainer.model_wrapped.optimizer.averaged_gradients
        for group, flat in enumerate(layout.flats):
            if id(flat) not in ready:
                joined = torch.cat([fragment.flatten() for fragment in fragments[group]]).to(flat.dtype)
                fragments[group] = [joined]
                ready[id(flat)] = joined
    return layout.shards(ready)


def show_model(trainer: "LlavaTrainer", layout: Layout) -> None:
    """Puts what a method wrote into the weights that an optimizer has stepped on where the model computes with them.

    ZeRO 1 and 2 copy a group's float32 partition right after its step, and send all of them round after the last.
    """
    if zero_stage(trainer) in (1, 2):
        zero = trainer.model_wrapped.optimizer
        for group, flat in enumerate(layout.flats):
            mine = dist.get_rank(group=zero.real_dp_process_group[group])
            zero.parallel_partitioned_bit16_groups[group][mine].data.copy_(flat.data)


def zero_stage(trainer: "LlavaTrainer") -> int | None:
    """DeepSpeed's ZeRO stage, None without DeepSpeed."""
    return trainer.model_wrapped.zero_optimization_stage() if trainer.is_deepspeed_enabled else None


def layout_of(trainer: "LlavaTrainer") -> Layout:
    """The layout of a trainer that has prepared its model. Raises ValueError for an engine that is not supported."""
    stage, parameters = zero_stage(trainer), trainable_parameters(trainer.model)
    device, world = trainer.args.device, trainer.args.world_size
    if trainer.is_fsdp_enabled or trainer.args.n_gpu > 1:
        raise ValueError("FSDP and DataParallel are not supported: use DDP (--launcher torchrun) or DeepSpeed")
    if stage == 0 and (trainer.model_wrapped.bfloat16_enabled() or trainer.model_wrapped.fp16_enabled()):
        raise ValueError(
            "DeepSpeed at stage 0 in half precision trains to other weights than DDP and ZeRO 1 do (docs/ENGINES.md): "
            "use DDP (--launcher torchrun without --zero), which is the same computation, or --zero 1"
        )
    if not stage:
        pieces = [Piece(name, p.shape, p, 0, 0, p.numel()) for name, p in parameters.items()]
        engine = "DeepSpeed ZeRO 0" if stage == 0 else "DDP" if world > 1 else "one process"
        return Layout(engine, pieces, list(parameters.values()), False, device)
    deepspeed = trainer.model_wrapped
    if stage == 3:
        if deepspeed.optimizer.swap_optimizer:
            raise ValueError("ZeRO-Infinity (offload to NVMe) is not supported: offload to the CPU")
        pieces = [_piece_of_stage3(deepspeed.optimizer, *item) for item in parameters.items()]
        flats = list(deepspeed.optimizer.fp32_partitioned_groups_flat)
    else:
        flats = [group["params"][0] for group in deepspeed.basic_optimizer.param_groups]
        pieces = [_piece_of_stage12(flats, *item) for item in parameters.items()]
    return Layout(f"DeepSpeed ZeRO {stage}", pieces, flats, world > 1, device)


def _piece_of_stage12(flats: list[Tensor], name: str, parameter: Tensor) -> Piece:
    mapping = parameter._hp_mapping  # what deepspeed.utils.safe_get_local_fp32_param reads
    if mapping is None:
        return Piece(name, parameter.shape, None, 0, 0, 0)
    flat, there, here = flats[mapping.param_group_index], mapping.hp_fragment_address, mapping.lp_fragment_address
    if flat[there.start :].data_ptr() != mapping.hp_fragment.data_ptr():
        raise ValueError(f"{name}: DeepSpeed's optimizer does not step on the float32 partition that it reports")
    return Piece(name, parameter.shape, flat, there.start, here.start, there.numel)


def _piece_of_stage3(zero, name: str, parameter: Tensor) -> Piece:
    group, offset, size = zero.grad_position[zero.get_param_id(parameter)]
    start = dist.get_rank(parameter.ds_process_group) * size
    numel = min(size, parameter.ds_numel - start)  # the last partition is padded
    if numel <= 0:
        return Piece(name, torch.Size(parameter.ds_shape), None, 0, 0, 0)
    flat = zero.fp32_partitioned_groups_flat[group]
    return Piece(name, torch.Size(parameter.ds_shape), flat, offset, start, numel)
