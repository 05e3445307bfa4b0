"""Fisher replay with a balance that is not chosen, in the style of CCFI (arXiv 2201.01420).

    buffer    of every task the n records with the largest |d log p(y_r | x_r) / d theta|^2
    g <- g + |g| p / |p|      p = F (theta - theta*), element by element: EWC's pull, as long as the step's gradient

F is the diagonal Fisher information of earlier tasks, summed, theta* the weights after the last one, as in
llaca/methods/ewc.py; the norms go over all trained tensors. The source has its examples chosen by Fisher information
and a weight of the consolidation that is not tuned; its rule is not published, and this is our reading.
"""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from llaca.engines.shards import Shards, add_at_own_length
from llaca.fields import setting
from llaca.fisher import squared_gradients
from llaca.methods.base import WHOLE_TENSORS
from llaca.methods.replay import Replay


class CCFI(Replay):
    """Replay of the records that matter most, and EWC of equal strength with the task."""

    @dataclass
    class Settings:
        memory_records: int = setting(20, "n, records of each earlier task that are kept", least=0)
        estimate_records: int = setting(200, "records that are looked at after a stage", least=1)

    engines = WHOLE_TENSORS
    edits_gradients = True
    fisher: dict[str, Tensor]
    anchor: dict[str, Tensor]

    @property
    def watches(self) -> bool:
        return bool(self.fisher)

    def recall(self, memory: dict) -> None:
        super().recall(memory)
        device = next(iter(self.stage.weights().values())).device
        self.fisher, self.anchor = (
            {name: tensor.to(device) for name, tensor in memory.get(key, {}).items()} for key in ("fisher", "anchor")
        )

    def after_backward(self, shards: Shards) -> None:
        layout = shards.layout
        parts = zip(shards.parameters, layout.cut(self.fisher), layout.cut(self.anchor), strict=True)
        pulls = [f * (p.detach().float() - a) for p, f, a in parts]
        add_at_own_length(shards, pulls)

    def after_task(self, shards: Shards, folder: Path) -> tuple[None, dict]:
        fisher, sizes = squared_gradients(self.stage, self.settings.estimate_records)
        self.fisher = {n: own + self.fisher[n] if self.fisher else own for n, own in fisher.items()}
        self.anchor = shards.layout.gather(shards.parameters)
        chosen = sorted(sizes, key=lambda record: (-sizes[record], record))[: self.settings.memory_records]
        replayed = sum(map(len, self.buffer.values()))
        self.buffer[self.stage.task] = sorted(chosen)
        return None, {"replayed": replayed}

    def memory(self) -> dict:
        kept = {key: {n: t.cpu() for n, t in getattr(self, key).items()} for key in ("fisher", "anchor")}
        return {**super().memory(), **kept}
