"""PACE (Ni et al., arXiv 2409.17137): what LoRA adds is multiplied by noise, and two draws of it shall say the same.

    y = W x + z * (alpha/r B A x)     z ~ N(1, sigma^2), a number a record and channel, in training alone
    L = CE(f_1) + lambda mean over tokens of sum_v (f_1 - f_2)^2         f_1, f_2: logits under two draws of z

sigma falls linearly over the depth of the model, to 0 behind the last layer, as published. The logits are those of the
answered tokens. A step costs a second pass. In a saved adapter there is no noise: it is LoRA's.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from llaca.fields import setting
from llaca.methods.base import WHOLE_TENSORS, Method
from llaca.methods.lwf import spoken
from llaca.sections import ModelConfig
from llava.adapters import attach_lora
from llava.backbone import Backbone


class PACE(Method):
    """LoRA under multiplicative noise, with answers that do not mind it."""

    engines = WHOLE_TENSORS

    @dataclass
    class Settings:
        penalty: float = setting(1.0, "lambda, the weight of the consistency", least=0)
        noise: float = setting(1.2, "sigma in the first layer", least=0)

    def attach(self, model: nn.Module, backbone: Backbone, config: ModelConfig) -> nn.Module:
        """As `Method.attach`."""
        rank, alpha, dropout = config.lora_rank, config.lora_alpha, config.lora_dropout
        model = attach_lora(model, backbone, rank, alpha, dropout, noisy_layer())
        layers = [module for module in model.modules() if isinstance(module, noisy_layer())]
        for depth, module in enumerate(layers):
            module.sigma = self.settings.noise * (1 - depth / len(layers))
        return model

    def loss(self, model, inputs, outputs) -> Tensor | None:
        """lambda times the squared difference of two draws' logits; None where there is no noise to mind."""
        if not self.settings.penalty or not self.settings.noise:
            return None
        again, _ = self.stage.backbone.answer_logits(self.stage.model, inputs)  # not through an engine a second time
        words = spoken(self.stage.backbone, outputs.logits)
        apart = (outputs.logits[:, words].float() - again.logits[:, words].float()).square().sum(-1)
        return self.settings.penalty * apart.mean()


@cache
def noisy_layer() -> type[nn.Module]:
    """The class of the layers, made when it is first asked for: PEFT brings in bitsandbytes, where it is installed."""
    from peft.tuners.lora import Linear

    class NoisyLinear(Linear):
        """A linear layer whose adapter is noisy while it trains."""

        sigma = 0.0

        def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
            """x [records, tokens, in] -> [records, tokens, out]."""
            if not self.training or not self.sigma or self.disable_adapters or self.merged:
                return super().forward(x, *args, **kwargs)
            y = self.base_layer(x, *args, **kwargs)
            dtype, shape = y.dtype, (len(y), *[1] * (y.dim() - 2), y.shape[-1])
            for name in self.active_adapters:
                A, B = self.lora_A[name], self.lora_B[name]
                added = B(A(self.lora_dropout[name](self._cast_input_dtype(x, A.weight.dtype)))) * self.scaling[name]
                y = y + added * (1 + self.sigma * torch.randn(shape, device=added.device, dtype=added.dtype))
            return y.to(dtype)

    return NoisyLinear
