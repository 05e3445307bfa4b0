"""OSF (Sculpting Subspaces, arXiv 2504.07097) at LoRA's scale: a stage leaves every weight's main directions alone.

    W = U S V^T, at the stage's start, with what LoRA adds; U_k, V_k: the leading k = floor(keep min(out, in)) of them
    B <- B_start + (I - U_k U_k^T)(B - B_start)
    A <- A_start + (A - A_start)(I - V_k V_k^T)                          after every optimizer step

So what the stage changes in B writes nothing along U_k, and what it changes in A reads nothing along V_k. The published
method trains the other directions themselves, whole matrices, and projects gradients; what Adam makes of those leaves
the subspace, so it is the movement that is projected here. The connector is as it is.
"""

from dataclasses import dataclass
from math import floor

import torch
from torch import Tensor

from llaca.engines.shards import Shards
from llaca.fields import setting
from llaca.methods.base import Method
from llaca.second_moments import exact_products
from llaca.sections import ModelConfig


class OSF(Method):
    """LoRA in the lesser directions of the weights."""

    @dataclass
    class Settings:
        keep: float = setting(0.5, "share of a weight's directions that rest", least=0, most=1)

    engines = ("none", "0")  # others cut tensors between ranks
    edits_weights = True

    def check_model(self, config: ModelConfig) -> None:
        """Raises ValueError for a quantized base, whose weights have no directions to compute with."""
        if config.quantization != "none":
            raise ValueError(
                f"method osf takes the base's own weights apart: take --quantization none, not {config.quantization}"
            )

    def before_task(self, shards: Shards, matched: bool, steps: int) -> None:
        self.names = shards.names
        self.start = [p.detach().clone() for p in shards.parameters]
        self.bases = self.directions()

    @torch.no_grad()
    def directions(self) -> list[Tensor | None]:
        """Of every trained tensor, V_k of a lora_A, U_k of a lora_B, None else; at the stage's start."""
        start, found = dict(zip(self.names, self.start, strict=True)), {}
        for name, a in start.items():
            if "lora_A" not in name:
                continue
            other, layer = (
                name.replace("lora_A", "lora_B"),
                self.stage.model.get_submodule(name.partition(".lora_A")[0]),
            )
            with exact_products():
                whole = layer.base_layer.weight.float() + layer.scaling["default"] * (start[other].float() @ a.float())
                count = floor(self.settings.keep * min(whole.shape))
                left, _, right = torch.linalg.svd(whole, full_matrices=False)
            found[name], found[other] = right[:count].T.contiguous(), left[:, :count].contiguous()
        return [found.get(name) for name in self.names]

    @torch.no_grad()
    def after_step(self, shards: Shards) -> None:
        items = zip(self.names, shards.parameters, self.start, self.bases, strict=True)
        with exact_products():
            for name, weight, start, basis in items:
                if basis is None or not basis.numel():
                    continue
                moved = (weight - start).float()
                along = (moved @ basis) @ basis.T if "lora_A" in name else basis @ (basis.T @ moved)
                weight.sub_(along)

    def state_dict(self) -> dict:
        return {"start": self.start}

    def load_state_dict(self, state: dict) -> None:
        self.start = [old.to(new.device) for old, new in zip(state["start"], self.start, strict=True)]
        self.bases = self.directions()
