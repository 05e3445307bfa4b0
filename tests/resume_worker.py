"""What tests/test_llaca_resume.py runs: trainings that stop at a step with a checkpoint and go on, against whole ones.

[torchrun ...] tests/resume_worker.py BASE DATA OUT none|DEEPSPEED.json CASE ...

OUT gets, for every case and step, what differs: the micro-batches that each rank drew, weights, averages, the log.
"""

import copy
import gc
import hashlib
import json
import shutil
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from data.records import load_samples
from llaca import ranks
from llaca.callbacks import Checkpoints, MethodCallback, latest
from llaca.config import load_recipe
from llaca.methods.llaca import LLaCA
from llava.adapters import attach_lora
from llava.backbones import load_base
from llava.backbones.llava15 import Llava15
from llava.dataset import InstructionDataset
from llava.trainer import LlavaTrainer, training_arguments

# records (beyond 16: from another dataset, joined), epochs, micro-batches a step, steps to stop at (two ranks: half)
CASES = {
    "epochs": (16, 3.0, 1, (16,)),
    "fraction": (16, 2.5, 1, (7, 13, 18, 20)),
    "accumulation": (14, 3.0, 2, (3, 6, 11)),
    "joined": (21, 2.0, 1, (18,)),
    "short": (14, 2.0, 2, (2, 6)),
}


class Watched(LLaCA):
    """Notes every micro-batch that it is trained on."""

    def __init__(self, config):
        super().__init__(config)
        self.drawn = []

    def loss(self, model, inputs, outputs):
        parts = [inputs[key].cpu().contiguous() for key in ("input_ids", "labels", "pixel_values") if key in inputs]
        self.drawn.append(hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()[:12])
        return None


class StopAt(TrainerCallback):
    """Saves and stops after a step; keeps the lines of the log."""

    def __init__(self, step: int):
        self.step, self.lines = step, []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.lines.append([state.global_step, logs["loss"], logs["learning_rate"]])


def train(case: str, model, datasets, folder: Path, zero: str | None, stop: int = 0) -> tuple:
    """Until `stop`, or from the checkpoint in `folder` to the end."""
    records, epochs, accumulation, _ = CASES[case]
    own, other = datasets
    dataset = own.joined([(other, range(records - 16))]) if records > 16 else copy.copy(own)
    if records < 16:
        dataset._part, dataset._row = own._part[:records], own._row[:records]
    checkpoint = latest(folder)
    torch.manual_seed(7)
    method = Watched(load_recipe(["--method", "llaca", "--average", "eq45"]).settings)
    arguments = training_arguments(
        folder,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=epochs,
        learning_rate=1e-3,
        logging_steps=2,
        use_cpu=True,
        disable_tqdm=True,
        deepspeed=zero,
        seed=300,
    )
    trainer = LlavaTrainer(copy.deepcopy(model), arguments, dataset, None, "local", method)
    callback = MethodCallback(method, True, 10, None, "clipped")
    callback.attach(trainer)
    trainer.add_callback(Checkpoints(callback, folder, checkpoint))
    told = StopAt(stop)
    trainer.add_callback(told)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    weights = callback.layout.gather(callback.layout.shards().parameters)
    averages = callback.layout.gather(list(method.average.averages().values()))
    steps = trainer.state.global_step
    unset_hf_deepspeed_config()
    return method.drawn, weights, averages, told.lines, steps


def differences(whole: tuple, first: tuple, second: tuple) -> list[str]:
    """Between a training and one in two parts."""
    drawn, weights, averages, lines, steps = whole
    found = []
    if first[0] + second[0] != drawn:
        place = next(
            (i for i, pair in enumerate(zip(first[0] + second[0], drawn, strict=False)) if len({*pair}) > 1), -1
        )
        found.append(f"micro-batch {place} of {len(drawn)} ({len(first[0])} + {len(second[0])})")
    found += [f"weights {n}" for n in weights if not torch.equal(weights[n], second[1][n])][:1]
    found += [f"averages {n}" for n in averages if not torch.equal(averages[n], second[2][n])][:1]
    found += [f"log {first[3] + second[3]} instead of {lines}"] if first[3] + second[3] != lines else []
    return found + ([f"{second[4]} steps instead of {steps}"] if second[4] != steps else [])


def main() -> None:
    base, data, out, engines, *cases = sys.argv[1:]
    engines = [None if zero == "none" else zero for zero in engines.split(",")]
    gc.freeze()  # what the imports left: looking at it, at the end of every training, takes longer than the training
    ranks.start("2" if engines[0] else "none")
    torch.manual_seed(0)
    model, backbone = load_base(base)
    model = attach_lora(model, Llava15, 4, 8, 0.1)  # dropout: every rank's generator has to go on, too
    samples = load_samples(Path(data) / "train.json", data)
    others = [replace(s, turns=tuple((question, "The bird.") for question, _ in s.turns)) for s in samples]
    datasets = [InstructionDataset.of_samples(each, backbone, 512) for each in (samples, others)]
    told = {}
    for zero, case in product(engines, cases):
        folder = Path(out).parent / f"{Path(zero or 'none').stem}-{case}"
        whole = train(case, model, datasets, folder / "whole", zero)
        for stop in sorted({max(1, step // ranks.count()) for step in CASES[case][3]}):
            parts = [train(case, model, datasets, folder / str(stop), zero, n) for n in (stop, 0)]
            told[f"{folder.name} {stop}"] = differences(whole, *parts)
            if ranks.first():
                shutil.rmtree(folder / str(stop))
    everyone = [told]
    if ranks.count() > 1:
        everyone = [None] * ranks.count()
        dist.all_gather_object(everyone, told)
    if ranks.first():
        found = {
            key: [f"rank {rank}: {text}" for rank, own in enumerate(everyone) for text in own[key]] for key in told
        }
        Path(out).write_text(json.dumps(found))
    ranks.leave()


if __name__ == "__main__":
    main()
