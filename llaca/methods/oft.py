"""OrthSR (arXiv 2407.08374), in its style: the inputs of every layer turn, and the base's answers are kept.

    y = W R x,    R block-diagonal, each block (I + Q)(I - Q)^-1 of a skew-symmetric Q         (PEFT's OFT)
    L = CE + lambda KL( softmax(z_0) || softmax(z) ),    mean over the answered tokens

z_0 are the logits of the weights that the first task of these parameters started from: the base's. The source does this
to CLIP, whose zero-shot answers it keeps; an answer's words take their place. What it does to pictures is left out.
PEFT approximates the inverse by a Neumann series of five terms, so that a block is orthogonal up to its sixth.
"""

from dataclasses import dataclass

from torch import nn

from llaca.engines.shards import Shards
from llaca.fields import setting
from llaca.methods.lwf import LwF
from llaca.sections import ModelConfig
from llava import adapters
from llava.backbone import Backbone


class OFT(LwF):
    """Orthogonal adapters in place of LoRA, which keep the base's answers."""

    @dataclass
    class Settings(LwF.Settings):
        temperature: float = setting(1.0, "T of both softmaxes", above=0)
        block: int = setting(32, "inputs that turn together; divides those of every adapted layer", least=2)

    copies = 1

    def attach(self, model: nn.Module, backbone: Backbone, config: ModelConfig) -> nn.Module:
        """Raises ValueError if a layer's inputs are no multiple of `block`."""
        from peft import OFTConfig

        model = adapters.attach(model, backbone, OFTConfig(oft_block_size=self.settings.block))
        sizes = {m.in_features for m in model.modules() if hasattr(m, "oft_R")}
        if any(size % self.settings.block for size in sizes):
            raise ValueError(f"block {self.settings.block} does not divide the inputs of every layer ({sorted(sizes)})")
        return model

    def recall(self, memory: dict) -> None:
        weights = self.stage.weights()
        kept = memory.get("base", weights)
        self.teacher = {name: kept[name].detach().to(w.device, copy=True) for name, w in weights.items()}

    def before_task(self, shards: Shards, matched: bool, steps: int) -> None:
        pass  # the teacher stays

    def memory(self) -> dict:
        return {"base": {name: weight.cpu() for name, weight in self.teacher.items()}}

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass  # `recall` has the teacher
