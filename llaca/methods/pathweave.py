"""PathWeave (Yu et al., arXiv 2410.20178), in its style: a task sees its inputs through earlier adapters, too.

    y = W x + alpha/r sum_{i<k} g_i(x) B_i (I + M_i) A_i x + alpha/r g_k(x) B_k A_k x,    g(x) = softmax(R x)

Task k trains its own block of the rank, A_k and B_k, an adapter M_i inside each earlier block, and the gates R; M and R
start at 0 in every task. Earlier blocks rest. As in the source a question is told whose it is, so that every task is
answered with its own M, R and blocks: nothing can be forgotten, and what differs from `lora_per_task` is what earlier
tasks give. The source has the blocks in a Q-Former, a task per kind of input, and noise on the gates while it trains.

In a saved adapter M_i are stacked as lora_inner [r, r/n], R is lora_gate [n, in]. A block whose B is 0 has not been
trained yet and has no gate. Stock PEFT reads such a folder as plain LoRA, without either: load it with `attach`.
"""

from functools import cache, partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from llaca.methods.blocks import StackedLoRA
from llaca.sections import ModelConfig
from llava.adapters import attach_lora
from llava.backbone import Backbone


class PathWeave(StackedLoRA):
    """Blocks that earlier tasks trained, each with a small adapter inside, under gates."""

    oracle = True
    mergeable = False
    changes: ClassVar = {"new_group_start": "latest"}

    def attach(self, model: nn.Module, backbone: Backbone, config: ModelConfig) -> nn.Module:
        """Raises ValueError as `check_model` does."""
        self.check_model(config)
        layer = partial(woven_layer(), blocks=self.settings.blocks)
        return attach_lora(model, backbone, config.lora_rank, config.lora_alpha, config.lora_dropout, layer)

    def recall(self, memory: dict) -> None:
        """Counts the tasks before, which are in the weights, and starts M and R anew: every task has a set of its own,
        which starts from the latest, and so no memory."""
        layers = [module for module in self.stage.model.modules() if isinstance(module, woven_layer())]
        self.tasks = int(layers[0].trained("default").sum())
        with torch.no_grad():
            for layer in layers:
                layer.own = min(self.tasks, self.settings.blocks - 1)
                layer.lora_inner["default"].weight.zero_()
                layer.lora_gate["default"].weight.zero_()

    def own(self, name: str, weight: Tensor) -> Tensor:
        """As for blocks; all of R, and M_i of earlier blocks."""
        if "lora_inner" in name:
            return self.earlier(weight)
        return weight if "lora_gate" in name else super().own(name, weight)

    def memory(self) -> dict:
        return {}


@cache
def woven_layer() -> type[nn.Module]:
    """The class of the layers, made when it is first asked for: PEFT brings in bitsandbytes, where that is installed.

    It takes the arguments of `peft.tuners.lora.Linear` and the number of `blocks`.
    """
    from peft.tuners.lora import Linear

    class WovenLinear(Linear):
        """A linear layer whose adapter's blocks are paths with gates. `own`: the block that trains, None: none."""

        adapter_layer_names = (*Linear.adapter_layer_names, "lora_inner", "lora_gate")
        own: int | None = None

        def update_layer(self, adapter_name: str, r: int, *args, blocks: int, **kwargs) -> None:
            """Adds an adapter; PEFT moves and trains what is named in adapter_layer_names."""
            if not hasattr(self, "lora_gate"):
                self.lora_inner, self.lora_gate = nn.ModuleDict(), nn.ModuleDict()
            self.lora_inner[adapter_name] = nn.Linear(r // blocks, r, bias=False)
            self.lora_gate[adapter_name] = nn.Linear(self.in_features, blocks, bias=False)
            super().update_layer(adapter_name, r, *args, **kwargs)

        def reset_lora_parameters(self, adapter_name: str, init_lora_weights) -> None:
            """Draws the blocks anew; M and R are 0."""
            super().reset_lora_parameters(adapter_name, init_lora_weights)
            nn.init.zeros_(self.lora_inner[adapter_name].weight)
            nn.init.zeros_(self.lora_gate[adapter_name].weight)

        def trained(self, adapter_name: str) -> Tensor:
            """Which blocks have been trained: bool [n]."""
            blocks = self.lora_gate[adapter_name].out_features
            return (self.lora_B[adapter_name].weight.detach() != 0).unflatten(1, (blocks, -1)).any(2).any(0)

        def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
            """x [..., in] -> [..., out]."""
            y = self.base_layer(x, *args, **kwargs)
            if self.disable_adapters:
                return y
            dtype = y.dtype
            for name in self.active_adapters:
                A, B, gate = self.lora_A[name], self.lora_B[name], self.lora_gate[name]
                x = self._cast_input_dtype(x, A.weight.dtype)
                open_ = self.trained(name)
                if self.own is not None:
                    open_[self.own] = True
                gates = torch.softmax(gate(x).masked_fill(~open_, -torch.inf), dim=-1).nan_to_num(0)
                h = A(self.lora_dropout[name](x)).unflatten(-1, (gate.out_features, -1))
                inner = self.lora_inner[name].weight.unflatten(0, (gate.out_features, -1))
                h = h + torch.einsum("...nw,nvw->...nv", h, inner)
                y = y + B((h * gates.unsqueeze(-1)).flatten(-2)) * self.scaling[name]
            return y.to(dtype)

        def get_delta_weight(self, adapter: str) -> Tensor:
            """What merging would add to the weights. Raises ValueError: it differs from token to token."""
            raise ValueError("the gates of PathWeave depend on the token: its paths cannot be merged into the weights")

    return WovenLinear
