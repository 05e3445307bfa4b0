"""One process and DDP: the parameters themselves, whole on every rank."""

from typing import TYPE_CHECKING

from torch import Tensor
from torch.optim import Optimizer

from llaca.engines.shards import Layout, Shards, TensorSlice
from llava.adapters import trainable_parameters

if TYPE_CHECKING:  # brings in PEFT and, where installed, bitsandbytes
    from llava.trainer import LlavaTrainer


class Engine:
    """What trains the model of a trainer that has prepared it.

    forgets_gradients: whether none is left where the engine skips a step. tells_norm: whether it says at which norm it
    clipped a gradient.
    """

    forgets_gradients = False
    tells_norm = True

    def __init__(self, trainer: "LlavaTrainer"):
        self.trainer = trainer

    def layout(self) -> Layout:
        """The slices of this rank."""
        parameters, args = trainable_parameters(self.trainer.model), self.trainer.args
        slices = [TensorSlice(name, p.shape, p, 0, 0, p.numel()) for name, p in parameters.items()]
        name = "DDP" if args.world_size > 1 else "one process"
        return Layout(name, slices, list(parameters.values()), False, args.device)

    def optimizer(self) -> Optimizer:
        """The optimizer of torch that steps, perhaps once for every group of parameters."""
        return self.trainer.optimizer.optimizer

    def clips_at(self) -> float:
        """The norm at which gradients are clipped; 0: never."""
        return self.trainer.args.max_grad_norm

    def norm(self) -> Tensor | float:
        """The norm of the step's whole gradient before it was clipped."""
        return self.trainer.grad_norm

    def skipped(self) -> bool:
        """Whether the engine left out the step, for a gradient that is not finite."""
        return False

    def scales_loss(self) -> bool:
        """Whether such a step is a part of its work, as with fp16."""
        return False

    def coming_gradients(self, layout: Layout) -> Shards:
        """The gradients that the optimizer is about to use, to be changed in place: when it is first called in a
        step."""
        return layout.shards({id(flat): flat.grad for flat in layout.flats if flat.grad is not None})

    def show(self, layout: Layout) -> None:
        """Put what a method wrote into the weights that an optimizer has stepped on where the model computes."""

    def release(self) -> None:
        """Forget the model."""
