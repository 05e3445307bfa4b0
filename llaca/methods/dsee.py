"""DSEE (Chen et al., arXiv 2111.00160), in its style: what is added to a weight is low rank and sparse.

    y = (W + alpha/r B A + S) x,    S is 0 but at N places: those where W is farthest from its best rank r

Both train through the stream as LoRA does; nothing protects them. The source finds the places by an alternating
decomposition of W into low rank and sparse; here the low rank is the truncated SVD (a randomized one, of a fixed seed).
Its pruning of W itself is left out.

In a saved adapter the N values are lora_sparse [N], and beside them are their places in W, row by row. Stock PEFT reads
such a folder as plain LoRA, without them: load it with `attach`.
"""

from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor, nn

from llaca.fields import setting
from llaca.methods.base import WHOLE_TENSORS, Method
from llaca.sections import ModelConfig
from llava.adapters import attach_lora
from llava.backbone import Backbone


class DSEE(Method):
    """LoRA with some elements of every weight beside it."""

    @dataclass
    class Settings:
        sparse: int = setting(64, "N, elements of a weight that train", least=1)

    engines = WHOLE_TENSORS

    def check_model(self, config: ModelConfig) -> None:
        """Raises ValueError for a quantized base, whose weights have no elements to compare."""
        if config.quantization != "none":
            raise ValueError(
                f"method dsee chooses elements of the base's own weights: take --quantization none, not "
                f"{config.quantization}"
            )

    def attach(self, model: nn.Module, backbone: Backbone, config: ModelConfig) -> nn.Module:
        """As `Method.attach`."""
        layer = partial(sparse_layer(), sparse=self.settings.sparse)
        return attach_lora(model, backbone, config.lora_rank, config.lora_alpha, config.lora_dropout, layer)


def farthest(weight: Tensor, rank: int, count: int) -> Tensor:
    """The places [count], ascending, in the flattened weight, where it is farthest from its best approximation of this
    rank; the first ones of a weight on the meta device."""
    if weight.is_meta:
        return torch.arange(count)
    weight = weight.detach().float()
    with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(weight, min(rank + 8, *weight.shape), niter=4)
    return (weight - (u[:, :rank] * s[:rank]) @ v[:, :rank].T).abs().flatten().topk(count).indices.sort().values


@cache
def sparse_layer() -> type[nn.Module]:
    """The class of the layers, made when it is first asked for: PEFT brings in bitsandbytes, where that is installed.

    It takes the arguments of `peft.tuners.lora.Linear` and the number of `sparse` elements.
    """
    from peft.tuners.lora import Linear

    class Values(nn.Module):
        """The trained elements, and where in the weight they are."""

        def __init__(self, places: Tensor):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(len(places)))
            self.register_buffer("places", places)

    class SparseLinear(Linear):
        """A linear layer with sparse elements beside each of its adapters."""

        adapter_layer_names = (*Linear.adapter_layer_names, "lora_sparse")

        def update_layer(self, adapter_name: str, r: int, *args, sparse: int, **kwargs) -> None:
            """Adds an adapter; PEFT moves and trains what is named in adapter_layer_names."""
            if not hasattr(self, "lora_sparse"):
                self.lora_sparse = nn.ModuleDict()
            weight = self.base_layer.weight
            self.lora_sparse[adapter_name] = Values(farthest(weight, r, min(sparse, weight.numel())))
            super().update_layer(adapter_name, r, *args, **kwargs)

        def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
            """x [..., in] -> [..., out]."""
            y = super().forward(x, *args, **kwargs)
            if self.disable_adapters or self.merged:
                return y
            for name in self.active_adapters:
                values = self.lora_sparse[name]
                rows, columns = values.places // self.in_features, values.places % self.in_features
                added = self._cast_input_dtype(x, values.weight.dtype)[..., columns] * values.weight
                y = y.index_add(-1, rows, added.to(y.dtype))
            return y

        def get_delta_weight(self, adapter: str) -> Tensor:
            """What merging adds to the weights [out, in]."""
            delta, values = super().get_delta_weight(adapter).clone(), self.lora_sparse[adapter]
            delta.view(-1)[values.places] += values.weight.to(delta.dtype)
            return delta

    return SparseLinear
