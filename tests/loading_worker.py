"""What tests/test_llaca_loading.py runs in several processes: a base is loaded and adapted, and each rank tells what it
holds, as JSON.

torchrun ... tests/loading_worker.py WARMUP BASE DATA OUT ZERO

OUT.features gets the features of DATA's pictures by WARMUP in float32.
"""

import gc
import json
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist

from data.columns import training_columns
from data.preprocess import Prepared, RecordFile
from data.records import load_samples
from llaca import ranks
from llaca.adapted import load_adapted
from llaca.config import load_recipe
from llaca.methods import method_of
from llaca.records import TaskRecords

LINE = ["--method", "llaca", "--dtype", "bfloat16", "--lora_rank", "16", "--reuse-vision-features", "false"]


def allocated() -> int:
    """Bytes of this process that are no pages of files."""
    rows = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(row.split()[1]) for row in rows if row.startswith("RssAnon"))


class Peak(threading.Thread):
    """The most that this process has allocated since the thread was made."""

    def __init__(self):
        super().__init__(daemon=True)
        self.before = self.most = allocated()
        self.start()

    def run(self):
        while True:
            self.most = max(self.most, allocated())
            time.sleep(0.001)


def held(model: torch.nn.Module) -> dict[str, int]:
    """Bytes of frozen and of trained tensors that this rank holds, of whole ones or of shards."""
    found = {"frozen": 0, "trained": 0}
    for parameter in model.parameters():
        shard = getattr(parameter, "ds_tensor", None)
        found["trained" if parameter.requires_grad else "frozen"] += parameter.nbytes + (
            0 if shard is None else shard.nbytes
        )
    return found


def load(base: str, zero: str, records: dict | None = None):
    more = ["--dtype", "float32", "--reuse-vision-features", "true"] if records else []
    recipe = load_recipe([*LINE, "--base", base, "--zero", zero, *more])
    return load_adapted(recipe, records or {}, method_of(recipe))


def main() -> None:
    warmup, base, data, out, zero = sys.argv[1:]
    ranks.start(zero)
    load(warmup, zero)  # libraries come in, and their thread pools
    gc.collect()
    peak = Peak()
    adapted = load(base, zero)
    told = {**held(adapted.model), "peak": peak.most - peak.before}
    everyone = [None] * ranks.count()
    dist.all_gather_object(everyone, told)
    samples = load_samples(Path(data) / "train.json", Path(data))
    columns = training_columns(samples, "last line", None)
    whole = Prepared(RecordFile(Path(data) / "train.json", "train", "last line"), columns)
    features = load(warmup, zero, {"pictures": TaskRecords("pictures", whole, whole.rows, 0)}).features
    if ranks.first():
        torch.save({str(s.image): features(s.image) for s in samples if s.image}, f"{out}.features")
        Path(out).write_text(json.dumps(everyone))
    ranks.leave()


if __name__ == "__main__":
    main()
