"""How fast a recipe trains, against TRL's SFTTrainer on the same model, records, batches and optimizer: the ratio.

    pip install trl==1.16.0
    python -m benchmarks.sft [--recipe configs/coin_small.yaml] [--task ImageNet] [--steps 20] [--rounds 3]

Both train the base with the recipe's LoRA and connector from the same start, on the task's first records with a picture
and one turn, in the same order. TRL gets each as prompt and completion, learns the completion alone, without gradient
checkpointing, and takes the recipe's attention and dtype. Ours takes the recipe as it is: a recipe that reuses vision
features makes them before, for each picture once (in the first round; then they are cached), which counts as loading.

Both take turns. Told are the records a second of each round after two steps of warming up, by the clock, the median of
the rounds' ratios, and the largest difference of a step's loss. Exits with 1 if the losses differ by more than 5 %
or are not finite.
"""

import argparse
import math
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback

from llaca.adapted import AdaptedModel, load_adapted, seed_everything
from llaca.config import Recipe, load_recipe
from llaca.launch import prepare_data
from llaca.methods import method_of
from llaca.records import load_stream, stage_datasets
from llaca.stream import stages_of
from llava.conversation import IGNORE
from llava.dataset import InstructionDataset
from llava.trainer import LlavaTrainer, training_arguments

WARM = 2  # steps that are not timed


class Timed(NamedTuple):
    """A training: `speed` in records a second, the loss of every step, and the seconds that loading took."""

    speed: float
    losses: list[float]
    load: float


class Clock(TrainerCallback):
    """The moments at which steps end, and their losses."""

    def __init__(self):
        self.ends, self.losses = [], []

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(time.perf_counter())

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.losses += [float(logs["loss"])] if "loss" in logs else []


def settings(recipe: Recipe, folder: Path, steps: int) -> dict:
    """What both trainers are told."""
    training = recipe.for_stage(tuple(recipe.stream.tasks), 1)
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": training.batch_size,
        "max_steps": steps,
        "learning_rate": training.learning_rate,
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "bf16": recipe.model.dtype == "bfloat16",
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def timed(trainer: Trainer, size: int, load: float) -> Timed:
    """Trains in batches of `size`."""
    clock = Clock()
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(clock)
    seed_everything(0)
    trainer.train()
    speed = size * (len(clock.ends) - WARM) / (clock.ends[-1] - clock.ends[WARM - 1])
    return Timed(speed, clock.losses, load)


def loaded(recipe: Recipe) -> tuple[AdaptedModel, InstructionDataset, float]:
    """The model with its fresh adapter, the dataset of the task, and the seconds that the model took."""
    records, method = load_stream(recipe), method_of(recipe)
    stages = stages_of(recipe, method.joint, Path(recipe.run.runs_dir) / "none")
    start = time.perf_counter()
    adapted = load_adapted(recipe, records, method)
    seconds = time.perf_counter() - start
    return adapted, stage_datasets(recipe, stages, records, adapted.backbone)[stages[0].task], seconds


def chosen(dataset: InstructionDataset, count: int) -> list[int]:
    """The first records with a picture and one turn. Raises ValueError if there are too few."""
    found = []
    for index in range(len(dataset)):
        supervised = dataset[index]["labels"] != IGNORE
        turns = int((supervised[1:] & ~supervised[:-1]).sum())
        if dataset.picture(index) and turns == 1:
            found.append(index)
        if len(found) == count:
            return found
    raise ValueError(f"{len(found)} records with a picture and one turn, {count} are needed: fewer --steps")


class InOrder(LlavaTrainer):
    """Ours, with the records in their order."""

    def _get_train_sampler(self, train_dataset=None):
        sampler = super()._get_train_sampler(train_dataset)
        sampler.set_epoch = lambda epoch: None
        return torch.utils.data.SequentialSampler(self.train_dataset)


def ours(recipe: Recipe, folder: Path, steps: int) -> Timed:
    """One training by this project."""
    adapted, dataset, seconds = loaded(recipe)
    told = settings(recipe, folder, steps)
    size = told["per_device_train_batch_size"]
    own = dataset.joined([])
    rows = chosen(dataset, steps * size)
    own._part, own._row = dataset._part[rows], dataset._row[rows]
    trainer = InOrder(adapted.model, training_arguments(told.pop("output_dir"), **told), own)
    return timed(trainer, size, seconds)


def theirs(recipe: Recipe, folder: Path, steps: int) -> Timed:
    """One training by TRL."""
    from datasets import Dataset, Image, List
    from trl import SFTConfig, SFTTrainer

    class Sequential(SFTTrainer):
        def _get_train_sampler(self, *args, **kwargs):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    adapted, dataset, seconds = loaded(replace(recipe, model=replace(recipe.model, reuse_vision_features=False)))
    told = settings(recipe, folder, steps)
    size, tokenizer, lines = told["per_device_train_batch_size"], adapted.backbone.tokenizer, []
    for index in chosen(dataset, steps * size):
        item = dataset[index]
        ids, shown = item["input_ids"], item["input_ids"] == adapted.backbone.placeholder
        once = ~shown | torch.cat([torch.tensor([True]), ~shown[:-1]])  # the processor repeats the placeholder itself
        answer = item["labels"] != IGNORE
        prompt, completion = (tokenizer.decode(ids[part]) for part in (once & ~answer, answer))
        lines.append({"prompt": prompt, "completion": completion, "images": [str(dataset.picture(index))]})
    records = Dataset.from_list(lines).cast_column("images", List(Image()))
    config = SFTConfig(**told, max_length=None, gradient_checkpointing=False, completion_only_loss=True)
    trainer = Sequential(adapted.model, config, train_dataset=records, processing_class=adapted.backbone.processor)
    return timed(trainer, size, seconds)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sft", description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="configs/coin_small.yaml")
    parser.add_argument("--task", default="ImageNet")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        recipe = load_recipe(
            ["--recipe", options.recipe, "--method", "lora", "--tasks", options.task, "--runs-dir", name]
        )
        prepare_data(recipe)
        ratios, apart = [], 0.0
        for turn in range(options.rounds):
            told = {}
            for way in (ours, theirs) if turn % 2 else (theirs, ours):
                told[way] = way(recipe, Path(name) / way.__name__, options.steps)
                print(
                    f"{way.__name__:7s}{told[way].speed:8.2f} records a second, {told[way].load:.0f} s to load",
                    flush=True,
                )
            ratios.append(told[ours].speed / told[theirs].speed)
            pairs = list(zip(told[ours].losses, told[theirs].losses, strict=True))
            apart = max(apart, *(abs(one - other) / other for one, other in pairs))
    print(f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    one, other = pairs[-1]
    print(f"loss of the last step {one:.4f} and {other:.4f}; a step's differ by {100 * apart:.2f} % at most")
    sys.exit(0 if apart < 0.05 and all(math.isfinite(loss) for pair in pairs for loss in pair) else 1)


if __name__ == "__main__":
    main()
