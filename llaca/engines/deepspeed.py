"""DeepSpeed, ZeRO 0 to 3. All that is private to it, and that a new version may move, is in this file.

A step of ZeRO 2 on two ranks, n trained elements in a group of parameters; time goes down.

        rank 0                                        rank 1
        weights of the model, all n                   the same                    forward and backward,
        gradient of its records                       gradient of its records     every micro-batch
              +---------------- reduce-scatter, mean ----------------+
        gradient of [0, n/2)                          gradient of [n/2, n)        kept, joined when it is used
              |   <- before: a method may change it (coming_gradients)  ->  |
        float32 masters [0, n/2)                      float32 masters [n/2, n)    the optimizer, once a group
              |   <- after: a method sees masters and gradients of its half; sums go through one small all-reduce
              |      and may write the masters (show)                       ->  |
        copied into the model's dtype                 copied into the model's dtype
              +--------------------- all-gather ---------------------+
        new weights of the model, all n               the same

ZeRO 1 differs in who keeps gradients. Under ZeRO 3 no rank has the weights of the whole model either: each holds its
part of every tensor and gathers a module's for its forward and backward pass. ZeRO 0 is DDP by another name.
"""

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

from llaca.engines.plain import Engine
from llaca.engines.shards import Layout, Shards, TensorSlice
from llaca.engines.zero import deepspeed_file, shards_weights
from llava.adapters import trainable_parameters

if TYPE_CHECKING:  # brings in PEFT and, where installed, bitsandbytes
    from llava.trainer import LlavaTrainer

PLAIN_LINEAR = functional.linear  # DeepSpeed replaces it for good where it shards the first tensor


class DeepSpeed(Engine):
    """One trained by DeepSpeed."""

    def __init__(self, trainer: "LlavaTrainer"):
        super().__init__(trainer)
        self.deepspeed = trainer.model_wrapped
        self.stage = self.deepspeed.zero_optimization_stage()
        self.forgets_gradients = self.stage > 0
        self.tells_norm = self.stage > 0

    def layout(self) -> Layout:
        """The slices of this rank. Raises ValueError for what is not supported."""
        deepspeed, parameters = self.deepspeed, trainable_parameters(self.trainer.model)
        name, device = f"DeepSpeed ZeRO {self.stage}", self.trainer.args.device
        if self.stage == 0:
            if deepspeed.bfloat16_enabled() or deepspeed.fp16_enabled():
                raise ValueError(
                    "DeepSpeed at stage 0 in half precision trains to other weights than DDP and ZeRO 1 do "
                    "(docs/ENGINES.md): use DDP (--launcher torchrun without --zero), which is the same computation, "
                    "or --zero 1"
                )
            slices = [TensorSlice(name, p.shape, p, 0, 0, p.numel()) for name, p in parameters.items()]
            return Layout(name, slices, list(parameters.values()), False, device)
        if self.stage == 3:
            if deepspeed.optimizer.swap_optimizer:
                raise ValueError("ZeRO-Infinity (offload to NVMe) is not supported: offload to the CPU")
            slices = [_slice_of_stage3(deepspeed.optimizer, *item) for item in parameters.items()]
            flats = list(deepspeed.optimizer.fp32_partitioned_groups_flat)
        else:
            flats = [group["params"][0] for group in deepspeed.basic_optimizer.param_groups]
            slices = [_slice_of_stage12(flats, *item) for item in parameters.items()]
        return Layout(name, slices, flats, self.trainer.args.world_size > 1, device)

    def optimizer(self) -> Optimizer:
        return self.deepspeed.basic_optimizer

    def clips_at(self) -> float:
        return self.deepspeed.gradient_clipping()

    def norm(self) -> Tensor | float:
        return self.deepspeed.optimizer._global_grad_norm

    def skipped(self) -> bool:
        return bool(self.stage and self.deepspeed.optimizer.overflow)

    def scales_loss(self) -> bool:
        return self.deepspeed.fp16_enabled()

    def coming_gradients(self, layout: Layout) -> Shards:
        """As Engine's; not for ZeRO 3.

        ZeRO 1 and 2 call the optimizer for one group of parameters after the other, and join and cast a group's
        gradient only then; here those of the later groups are joined and cast before. Clipping and unscaling come as
        late: not with them.
        """
        ready = {id(flat): flat.grad for flat in layout.flats if flat.grad is not None}
        if self.stage in (1, 2):
            fragments = self.deepspeed.optimizer.averaged_gradients
            for group, flat in enumerate(layout.flats):
                if id(flat) not in ready:
                    joined = torch.cat([fragment.flatten() for fragment in fragments[group]]).to(flat.dtype)
                    fragments[group] = [joined]
                    ready[id(flat)] = joined
        return layout.shards(ready)

    def show(self, layout: Layout) -> None:
        """As Engine's. ZeRO 1 and 2 copy a group's float32 partition right after its step, and send all of them round
        after the last."""
        if self.stage in (1, 2):
            zero = self.deepspeed.optimizer
            for group, flat in enumerate(layout.flats):
                mine = dist.get_rank(group=zero.real_dp_process_group[group])
                zero.parallel_partitioned_bit16_groups[group][mine].data.copy_(flat.data)

    def release(self) -> None:
        """Let DeepSpeed forget the model, so that it goes with the last of our references.

        `destroy` removes the hooks on the gradients' accumulators. At ZeRO 3 two more things of DeepSpeed's are global:
        the stack of modules whose forward pass is under way, which keeps the outermost one for ever, and a cache of
        what to release after a module, whose keys are the modules.
        """
        self.deepspeed.destroy()
        if self.stage == 3:
            from deepspeed.runtime.zero import parameter_offload, partitioned_param_coordinator

            parameter_offload.FWD_MODULE_STACK.clear()
            coordinator = partitioned_param_coordinator.PartitionedParameterCoordinator
            decorated = coordinator._PartitionedParameterCoordinator__params_to_release
            inspect.getclosurevars(decorated).nonlocals["func"].cache_clear()


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


def _slice_of_stage12(flats: list[Tensor], name: str, parameter: Tensor) -> TensorSlice:
    mapping = parameter._hp_mapping  # what deepspeed.utils.safe_get_local_fp32_param reads
    if mapping is None:
        return TensorSlice(name, parameter.shape, None, 0, 0, 0)
    flat, there, here = flats[mapping.param_group_index], mapping.hp_fragment_address, mapping.lp_fragment_address
    if flat[there.start :].data_ptr() != mapping.hp_fragment.data_ptr():
        raise ValueError(f"{name}: DeepSpeed's optimizer does not step on the float32 partition that it reports")
    return TensorSlice(name, parameter.shape, flat, there.start, here.start, there.numel)


def _slice_of_stage3(zero, name: str, parameter: Tensor) -> TensorSlice:
    group, offset, size = zero.grad_position[zero.get_param_id(parameter)]
    start = dist.get_rank(parameter.ds_process_group) * size
    numel = min(size, parameter.ds_numel - start)  # the last partition is padded
    if numel <= 0:
        return TensorSlice(name, torch.Size(parameter.ds_shape), None, 0, 0, 0)
    flat = zero.fp32_partitioned_groups_flat[group]
    return TensorSlice(name, torch.Size(parameter.ds_shape), flat, offset, start, numel)
