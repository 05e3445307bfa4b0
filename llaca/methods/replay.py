"""Experience replay (Chaudhry et al., "On Tiny Episodic Memories in Continual Learning", arXiv 1902.10486): n random
records of every earlier task are trained on with the new ones, shuffled among them."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from llaca.engines.shards import Shards
from llaca.fields import setting
from llaca.methods.base import Method
from llava.dataset import InstructionDataset


class Replay(Method):
    """LoRA on the stage's records and the buffer's. A stage has more steps for it, by the buffer's size."""

    @dataclass
    class Settings:
        memory_records: int = setting(20, "n, records of each earlier task that are kept", least=0)

    buffer: dict[str, list[int]]  # task -> numbers of its records

    def recall(self, memory: dict) -> None:
        self.buffer = {task: list(numbers) for task, numbers in memory.get("buffer", {}).items()}

    def extend(self, dataset: InstructionDataset, earlier: Mapping[str, InstructionDataset]) -> InstructionDataset:
        return dataset.joined([(earlier[task], numbers) for task, numbers in self.buffer.items()])

    def after_task(self, shards: Shards, folder: Path) -> tuple[list[Tensor] | None, dict]:
        count = min(self.settings.memory_records, len(self.stage.dataset))
        drawn = random.Random(self.stage.seed).sample(range(len(self.stage.dataset)), count)
        replayed = sum(map(len, self.buffer.values()))
        self.buffer[self.stage.task] = sorted(drawn)
        return None, {"replayed": replayed}

    def memory(self) -> dict:
        return {"buffer": self.buffer}
