"""MoELoRA (CoIN: Chen et al., arXiv 2403.08350): each LoRA is a mixture of E experts of rank r/E.

    y = W x + alpha/r sum_i g_i(x) B_i A_i dropout(x),    g(x) = softmax(R x)

R is a router of every linear's own, without a bias; every token has its gates, and all experts are used. A_i starts
from N(0, 0.01^2), B_i from 0, R as torch starts a linear. The stream is trained as with LoRA: nothing protects an
expert. All experts see the same dropout mask; the released code draws one for each.

The experts have as many parameters as one LoRA of rank r. The routers come on top, E numbers per input of every linear:
for LLaVA-7B at rank 128 and E = 2 they are 2.3 M beside 319.8 M.

In a saved adapter the A_i are stacked as lora_A [r, in], the B_i side by side as lora_B [out, r], and R is
lora_router [E, in]. Stock PEFT reads such a folder as plain LoRA, without its gates: load it with `attach`.
"""

from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor, nn

from llaca.fields import setting
from llaca.methods.base import Method
from llaca.sections import ModelConfig
from llava.adapters import attach_lora
from llava.backbone import Backbone


class MoELoRA(Method):
    """Sequential training of a mixture of LoRA experts, which stay beside the weights when they answer."""

    @dataclass
    class Settings:
        experts: int = setting(2, "E, experts that share lora_rank; the released scripts have 2", least=1)

    mergeable = False

    def check_model(self, config: ModelConfig) -> None:
        """Raises ValueError unless the experts can share lora_rank equally."""
        experts = self.settings.experts
        if config.lora_rank % experts:
            raise ValueError(f"experts {experts} does not divide lora_rank {config.lora_rank}: take another of the two")

    def attach(self, model: nn.Module, backbone: Backbone, config: ModelConfig) -> nn.Module:
        """Raises ValueError as `check_model` does."""
        self.check_model(config)
        layer = partial(expert_layer(), experts=self.settings.experts)
        return attach_lora(model, backbone, config.lora_rank, config.lora_alpha, config.lora_dropout, layer)


@cache
def expert_layer() -> type[nn.Module]:
    """The class of the layers, made when it is first asked for: PEFT brings in bitsandbytes, where that is installed.

    It takes the arguments of `peft.tuners.lora.Linear` and the number of `experts`.
    """
    from peft.tuners.lora import Linear

    class MoELinear(Linear):
        """A linear layer with the experts and the router of each of its adapters."""

        adapter_layer_names = (*Linear.adapter_layer_names, "lora_router")

        def update_layer(self, adapter_name: str, *args, experts: int, **kwargs) -> None:
            """Adds an adapter; PEFT moves and trains what is named in adapter_layer_names."""
            if not hasattr(self, "lora_router"):
                self.lora_router = nn.ModuleDict()
            self.lora_router[adapter_name] = nn.Linear(self.in_features, experts, bias=False)
            super().update_layer(adapter_name, *args, **kwargs)

        def reset_lora_parameters(self, adapter_name: str, init_lora_weights) -> None:
            """Draws the experts anew."""
            nn.init.normal_(self.lora_A[adapter_name].weight, std=0.01)
            nn.init.zeros_(self.lora_B[adapter_name].weight)

        def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
            """x [..., in] -> [..., out]."""
            y = self.base_layer(x, *args, **kwargs)
            if self.disable_adapters:
                return y
            dtype = y.dtype
            for name in self.active_adapters:
                A, B = self.lora_A[name], self.lora_B[name]
                x = self._cast_input_dtype(x, A.weight.dtype)
                gates = self.gates(x, name)
                # sum_i g_i B_i A_i x is B applied to the blocks of A x, each times its gate.
                blocks = A(self.lora_dropout[name](x)).unflatten(-1, (gates.shape[-1], -1)) * gates.unsqueeze(-1)
                y = y + B(blocks.flatten(-2)) * self.scaling[name]
            return y.to(dtype)

        def gates(self, x: Tensor, adapter_name: str) -> Tensor:
            """x [..., in] -> each expert's share [..., E]."""
            return torch.softmax(self.lora_router[adapter_name](x), dim=-1)

        def get_delta_weight(self, adapter: str) -> Tensor:
            """What merging would add to the weights. Raises ValueError: it differs from token to token."""
            raise ValueError("the gates of MoELoRA depend on the token: its experts cannot be merged into the weights")

    return MoELinear
