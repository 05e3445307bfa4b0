"""Trains one run: `python -m llaca.train --method llaca --seed 0`; `--help` lists every field of a recipe.

Walks the stream; every stage starts from a parameter set of the pool, trains it with the method's hooks and puts it
back. A stage is made whole or not at all: after a kill the same command goes on with the first stage that is not DONE,
and the result is the same, since everything random in a stage comes from the seed and the stage's number.
"""

import gc
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PrinterCallback, TrainerCallback, set_seed

from data.layout import image_root, train_file
from llaca.config import Recipe, TrainConfig, load_recipe
from llaca.grouping import THRESHOLDS, Codebook, instruction_of
from llaca.methods import METHODS
from llaca.methods.base import Method
from llaca.pool import Choice, Pool
from llaca.stream import Stage, open_run, stages_of, write_atomically
from llava.dataset import InstructionDataset, Sample, load_samples
from llava.features import FeatureCache, cache_features, use_features
from llava.model import (
    adapter_state,
    attach_lora,
    image_tokens,
    load_adapter,
    load_base,
    save_adapter,
    set_adapter_state,
    trainable_parameters,
)
from llava.trainer import LlavaTrainer, training_arguments


@dataclass
class Student:
    """The model in training: LoRA attached, `fresh` its trainable state before any task."""

    model: torch.nn.Module
    processor: object
    fresh: dict[str, torch.Tensor]
    features: FeatureCache | None


class RunLog(TrainerCallback):
    """One progress bar for the whole run, and the stage's train_log.jsonl."""

    def __init__(self, bar: tqdm, stage: Stage, path: Path):
        self.bar, self.stage, self.path = bar, stage, path

    def on_log(self, args, state, control, logs=None, **kwargs):
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **logs}) + "\n")
        if "loss" in logs:
            self.bar.set_postfix_str(f"{self.stage.name} loss {float(logs['loss']):.3f}")

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update()


def load_stream(recipe: Recipe, stages: list[Stage]) -> dict[str, list[Sample]]:
    """The training records of every task. All are validated before anything is trained (raises DataError)."""
    limit = recipe.stream.max_train_samples or None
    tasks = [task for stage in stages for task in stage.tasks]
    root = recipe.stream.data_root
    return {
        task: load_samples(train_file(root, recipe.stream.instructions, task), image_root(root))[:limit]
        for task in tqdm(tasks, desc="check records", leave=False, delay=3, unit="task")
    }


def load_student(recipe: Recipe, records: dict[str, list[Sample]]) -> Student:
    """The base model with fresh LoRA, and the pictures' features if the recipe reuses them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, recipe.model.dtype)
    model, processor = load_base(recipe.model.base, dtype, recipe.model.attention)
    model.to(device)
    features = None
    if recipe.model.reuse_vision_features:
        paths = [sample.image for samples in records.values() for sample in samples if sample.image]
        features = cache_features(model, processor.image_processor, paths)
        use_features(model)
    set_seed(recipe.run.seed)
    model = attach_lora(model, recipe.model.lora_rank, recipe.model.lora_alpha, recipe.model.lora_dropout)
    return Student(model, processor, adapter_state(model), features)


def stage_steps(settings: TrainConfig, samples: int) -> int:
    """Optimizer steps of a stage with this many samples on one device, as the Trainer counts them."""
    batches = -(-samples // settings.batch_size)
    return int(-(-settings.epochs * max(1, -(-batches // settings.gradient_accumulation)) // 1))


def train_stage(
    recipe: Recipe,
    stage: Stage,
    samples: list[Sample],
    student: Student,
    method: Method,
    choice: Choice,
    bar: tqdm,
    folder: Path,
) -> dict:
    """Trains `samples` from the parameters that `choice` names; writes adapter/, plain/ and the logs into `folder`."""
    if choice.start is None:
        set_adapter_state(student.model, student.fresh)
    else:
        load_adapter(student.model, stage.folder.parent / choice.start / "adapter")
    settings = recipe.for_task(stage.tasks[0]) if len(stage.tasks) == 1 else recipe.train
    tokens = image_tokens(student.model.config)
    dataset = InstructionDataset(
        samples, student.processor, tokens, settings.max_length, student.features, source=stage.name
    )
    parameters = trainable_parameters(student.model)
    steps = stage_steps(settings, len(samples))
    stage_seed = 10_000 * recipe.run.seed + 100 * stage.index  # room for an epoch's own number
    set_seed(stage_seed)
    method.before_task(choice.matched, parameters, steps)
    trainer = LlavaTrainer(
        student.model,
        trainer_arguments(recipe, settings, stage, stage_seed, folder),
        dataset,
        pad_id=student.processor.tokenizer.pad_token_id,
        projector_lr=settings.projector_learning_rate,
        normalisation=settings.loss_normalisation,
        hooks=method,
        callbacks=[RunLog(bar, stage, folder / "train_log.jsonl")],
    )
    trainer.remove_callback(PrinterCallback)  # RunLog says it in one line
    started = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - started
    trained = adapter_state(student.model)
    report = method.after_task(parameters, folder)
    save_adapter(student.model, folder / "adapter")
    if report["averaged"]:
        averaged = adapter_state(student.model)
        set_adapter_state(student.model, trained)
        save_adapter(student.model, folder / "plain")
        set_adapter_state(student.model, averaged)
    return {
        "stage": stage.name,
        "tasks": list(stage.tasks),
        "samples": len(samples),
        "steps": trainer.state.global_step,
        "seconds": round(seconds, 1),
        "start": choice.start,
        "group": choice.group,
        "similarity": choice.scores,
        **report,
    }


def trainer_arguments(recipe: Recipe, settings: TrainConfig, stage: Stage, seed: int, folder: Path):
    """The recipe in transformers' words."""
    cuda = torch.cuda.is_available()
    return training_arguments(
        folder / "trainer",
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup_ratio,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        activation_checkpointing=recipe.model.gradient_checkpointing,
        bf16=cuda and recipe.model.dtype == "bfloat16",
        tf32=cuda or None,
        use_cpu=not cuda,
        logging_steps=recipe.run.logging_steps,
        report_to=recipe.run.report_to,
        run_name=f"{recipe.run.run}/{stage.name}",
        disable_tqdm=True,
        seed=seed,
    )


def run(recipe: Recipe, say: Callable[[str], None] = print) -> Path:
    """Trains the run of `recipe` as far as it is not done yet, and returns its folder."""
    method = METHODS[recipe.method.method](recipe.method)
    folder = open_run(recipe)
    if not method.trains:
        say(f"{recipe.run.run}: nothing to train")
        return folder
    stages = stages_of(recipe, method.joint, folder)
    if all(stage.done for stage in stages):
        say(f"{recipe.run.run}: all {len(stages)} stages are done")
        return folder
    records = load_stream(recipe, stages)
    student = load_student(recipe, records)
    threshold = recipe.method.similarity_threshold
    codebook = Codebook(THRESHOLDS[recipe.stream.instructions] if threshold is None else threshold)
    pool = Pool(recipe.method.grouping, codebook, recipe.method.new_group_start)
    total = sum(
        stage_steps(recipe.for_task(stage.tasks[0]), sum(len(records[t]) for t in stage.tasks)) for stage in stages
    )
    line = int(os.environ.get("LLACA_BAR", 0))  # of the terminal, where several runs share it
    with tqdm(total=total, desc=recipe.run.run, unit="step", position=line) as bar:
        for stage in stages:
            if stage.done:
                pool = Pool.from_json((stage.folder / "codebook.json").read_text(encoding="utf-8"))
                bar.update(json.loads((stage.folder / "stage.json").read_text(encoding="utf-8"))["steps"])
            else:
                complete_stage(recipe, stage, records, student, method, pool, bar)
    return folder


def complete_stage(
    recipe: Recipe,
    stage: Stage,
    records: dict[str, list[Sample]],
    student: Student,
    method: Method,
    pool: Pool,
    bar: tqdm,
) -> None:
    """Trains one stage in a folder of its own and gives it its name, with DONE in it, when it is whole."""
    samples = [sample for task in stage.tasks for sample in records[task]]
    wordings = {instruction_of(task, sample.turns[0][0]) for task in stage.tasks for sample in records[task]}
    instructions = sorted(wordings)
    choice = pool.choose(instructions)
    partial = stage.folder.with_name(stage.folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(stage.folder, ignore_errors=True)
    partial.mkdir(parents=True)
    report = train_stage(recipe, stage, samples, student, method, choice, bar, partial)
    pool.put(choice, instructions, "+".join(stage.tasks), stage.name)
    write_atomically(partial / "stage.json", json.dumps(report, indent=1) + "\n")
    write_atomically(partial / "codebook.json", pool.to_json())
    shutil.rmtree(partial / "trainer", ignore_errors=True)
    partial.rename(stage.folder)
    (stage.folder / "DONE").touch()
    gc.collect()


def main(arguments: list[str] | None = None) -> None:
    """Command line; `--list-methods` prints the methods' names as a JSON list."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if "--list-methods" in arguments:
        print(json.dumps(list(METHODS)))
        return
    os.environ.setdefault("WANDB_MODE", "offline")
    recipe = load_recipe(arguments)
    say = tqdm.write
    folder = run(recipe, say)
    say(f"{recipe.run.run}: done, {folder}")


if __name__ == "__main__":
    main()
