"""Trains one run: `python -m llaca.train --method llaca --seed 0`; `--help` lists every field of a recipe.

Walks the stream; every stage starts from a parameter set of the pool, trains it with the method's hooks and puts it
back. After a kill the same command goes on with the first stage that is not DONE, from its last checkpoint or from its
start, and the result is the same, since everything random in a stage comes from the seed and the stage's number.
"""

import gc
import json
import os
import random
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from data.benchmark import image_root, open_benchmark
from data.checksums import checksum
from llaca import hosts, ranks
from llaca.config import Recipe, TrainConfig, help_of, load_recipe
from llaca.engine import cast_for_engine, deepspeed_file, release, sharded_loading, shards_weights, whole
from llaca.folders import (
    MEMORY,
    TRAINER,
    begin,
    checksums,
    handed_on,
    load_start,
    origin_of,
    partial_of,
    seal,
    tidy,
)
from llaca.grouping import THRESHOLDS, Codebook
from llaca.methods import METHODS, method_of
from llaca.methods.base import Method, StageView
from llaca.pool import Choice, Pool
from llaca.records import TaskRecords, load_stream, stage_datasets, stage_wordings
from llaca.stream import (
    Stage,
    check_order,
    die_with_launcher,
    environment,
    frozen,
    leave_at_once,
    reserved,
    run_folder,
    stages_of,
    write_atomically,
)
from llava.dataset import InstructionDataset
from llava.features import FeatureCache, stored_features, use_features
from llava.model import (
    adapter_state,
    load_base,
    reset_projector,
    save_adapter,
    set_adapter_state,
)


@dataclass
class Student:
    """The model in training: its adapter attached, `fresh` its trainable state before any task, on the CPU."""

    model: torch.nn.Module
    processor: object
    fresh: dict[str, torch.Tensor]
    features: FeatureCache | None


def seed_everything(seed: int) -> None:
    """Python's, numpy's and torch's generators."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def load_student(
    recipe: Recipe, records: dict[str, TaskRecords], method: Method, features: FeatureCache | None = None
) -> Student:
    """The base model with a fresh adapter, and the pictures' features, if the recipe reuses them and none are given."""
    config = recipe.model
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, config.dtype)
    settings = (config.base, dtype, config.attention, config.quantization)
    if shards_weights(recipe.run.zero):
        load_base(*settings, "meta")  # raises on every rank what the loader of shards does not notice
    with sharded_loading(recipe.run.zero, dtype):
        model, processor = load_base(*settings, device)
    if config.reuse_vision_features:
        if features is None:
            root = image_root(recipe.stream.data_root)
            lists = [[root / name for name in one.prepared.columns.pictures(one.rows)] for one in records.values()]
            with whole(model.model.vision_tower):
                features = stored_features(model, processor.image_processor, lists)
        use_features(model)
    seed_everything(recipe.run.seed)
    model = method.attach(model, config)
    return Student(model, processor, adapter_state(model, "cpu"), features)


def train_stage(
    recipe: Recipe,
    stage: Stage,
    datasets: dict[str, InstructionDataset],
    student: Student,
    method: Method,
    choice: Choice,
    bar: tqdm,
    folder: Path,
) -> dict:
    """Trains the stage from the parameters that `choice` names; writes adapter/, plain/, method.pt and the logs into
    `folder`. `datasets` has every stage's own, by task."""
    # These bring in PEFT and, where installed, bitsandbytes.
    from llaca.callbacks import Checkpoints, StopOnSignal, Tap, latest, truncate_log
    from llava.trainer import LlavaTrainer, StepLog

    if choice.start is None:
        set_adapter_state(student.model, student.fresh)
    else:
        load_start(student.model, stage.folder.parent / choice.start)
    settings = recipe.for_stage(stage.tasks, ranks.count())
    checkpoint = latest(folder / TRAINER)
    stage_seed = recipe.stage_seed(stage.index)
    seed_everything(stage_seed)
    if recipe.model.legacy_projector_reset and stage.index > 1:
        reset_projector(student.model)
    start = None
    if not checkpoint and recipe.run.zero != "none":  # on the CPU: a GPU has its own copies to make
        start = adapter_state(student.model, "cpu")
    if shards_weights(recipe.run.zero):
        cast_for_engine(student.model, getattr(torch, recipe.model.dtype))
    own, pad_id = datasets[stage.task], student.processor.tokenizer.pad_token_id
    method.stage = StageView(stage.task, student.model, own, pad_id, stage_seed)
    method.recall(handed_on(method, stage.folder.parent / choice.start) if choice.matched else {})
    dataset = method.extend(own, datasets)
    steps = settings.steps(len(dataset), ranks.count())
    bar.total += steps - settings.steps(len(own), ranks.count())
    trainer = LlavaTrainer(
        student.model,
        trainer_arguments(recipe, settings, stage, stage_seed, folder),
        dataset,
        pad_id=pad_id,
        projector_lr=settings.projector_learning_rate,
        normalisation=settings.loss_normalisation,
        hooks=method,
    )
    tap = Tap(method, choice.matched, steps, start, recipe.method.seen_gradient)
    del start  # the tap lets it go when the engine has it
    tap.attach(trainer)
    checkpoints, stop = Checkpoints(tap, folder / TRAINER, checkpoint), StopOnSignal()
    trainer.add_callback(checkpoints)
    trainer.add_callback(stop)
    if ranks.first():
        log = folder / "train_log.jsonl"
        truncate_log(log, int(checkpoint.name.split("-")[1]) if checkpoint else 0)
        trainer.add_callback(StepLog(bar, stage.name, log))
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    stop.leave_if_stopped(folder)
    shards = tap.layout.shards()
    averaged, report = method.after_task(shards, folder)
    trained = tap.layout.gather(shards.parameters)
    final = trained if averaged is None else tap.layout.gather(averaged)
    if ranks.first():
        save_adapter(student.model, folder / "adapter", final)
        if averaged is not None:
            save_adapter(student.model, folder / "plain", trained)
        if method.hands_on:
            torch.save(method.memory(), folder / MEMORY)
    if recipe.run.zero != "none":
        release(trainer)
    return {
        "stage": stage.name,
        "tasks": list(stage.tasks),
        "samples": len(dataset),
        "steps": trainer.state.global_step,
        "seconds": round(checkpoints.seconds, 1),
        "trained_parameters": sum(piece.shape.numel() for piece in tap.layout.pieces),
        "peak_memory_bytes": ranks.peak_memory(),
        "engine": tap.layout.engine,
        "start": choice.start,
        "group": choice.group,
        "similarity": choice.scores,
        "averaged": averaged is not None,
        **report,
    }


def trainer_arguments(recipe: Recipe, settings: TrainConfig, stage: Stage, seed: int, folder: Path):
    """The recipe in transformers' words; where TensorBoard and W&B write is said by the environment."""
    from llava.trainer import training_arguments

    cuda = torch.cuda.is_available()
    logs = run_folder(recipe)
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(logs / "tensorboard" / stage.name)
    os.environ.update(WANDB_DIR=str(logs), WANDB_RUN_GROUP=recipe.run.run)
    os.environ.setdefault("WANDB_MODE", "offline")
    os.environ.setdefault("WANDB_PROJECT", "llaca")
    return training_arguments(
        folder / TRAINER,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup_ratio,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        activation_checkpointing=recipe.model.gradient_checkpointing,
        bf16=recipe.model.dtype == "bfloat16",
        tf32=cuda or None,
        use_cpu=not cuda,
        dataloader_num_workers=recipe.run.loader_workers,
        logging_steps=recipe.run.logging_steps,
        save_strategy="steps" if recipe.run.save_steps else "no",
        save_steps=recipe.run.save_steps or 1,
        deepspeed=None if recipe.run.zero == "none" else str(deepspeed_file(recipe.run.zero)),
        report_to=recipe.run.report_to,
        run_name=f"{recipe.run.run}/{stage.name}",
        disable_tqdm=True,
        seed=seed,
    )


def run(recipe: Recipe) -> Path:
    """Trains the run of `recipe` as far as it is not done yet, and returns its folder.

    Raises, before anything is trained, DataError for a broken record and ValueError or FileNotFoundError for a recipe
    that cannot be followed; BlockingIOError where another process trains this run.
    """
    method = method_of(recipe)
    ranks.start(recipe.run.zero)
    hosts.start_alike(recipe)
    environment()  # of all ranks
    records, folder = load_stream(recipe), run_folder(recipe)
    with ExitStack() as held:
        freeze = hosts.together(lambda: held.enter_context(reserved(recipe)) if ranks.first() else lambda: folder)
        if not method.trains:
            return hosts.together(freeze)
        stages = stages_of(recipe, method.joint, folder)
        check_order(stages)
        for stage in stages if ranks.first() else ():
            if stage.done:
                tidy(stage)
        if not all(done_stages(stages)):
            train_stages(recipe, stages, records, method, freeze)
    return folder


def train_stages(
    recipe: Recipe, stages: list[Stage], records: dict[str, TaskRecords], method: Method, freeze: Callable[[], Path]
) -> None:
    """Walks the stream, past the stages that are done. Calls `freeze` when nothing can refuse the run any more."""
    instructions = stage_wordings(recipe, stages, records)
    student = load_student(recipe, records, method)
    features = student.features
    datasets = stage_datasets(recipe, stages, records, student)
    threshold = recipe.method.similarity_threshold
    codebook = Codebook(
        THRESHOLDS[recipe.stream.instructions] if threshold is None else threshold, recipe.method.group_similarity
    )
    pool = Pool(recipe.method.grouping, codebook, recipe.method.new_group_start, method.oracle)
    settings = {stage.name: recipe.for_stage(stage.tasks, ranks.count()) for stage in stages}
    total = sum(settings[stage.name].steps(len(datasets[stage.task]), ranks.count()) for stage in stages)
    hosts.together(freeze)
    line = int(os.environ.get("LLACA_BAR", 0))  # of the terminal, where several runs share it
    with tqdm(total=total, desc=recipe.run.run, unit="step", position=line, disable=not ranks.first()) as bar:
        for stage, done in zip(stages, done_stages(stages), strict=True):
            if done:
                pool = Pool.from_json((stage.folder / "codebook.json").read_text(encoding="utf-8"))
                bar.update(json.loads((stage.folder / "stage.json").read_text(encoding="utf-8"))["steps"])
                continue
            choice = pool.choose(instructions[stage.name])
            hosts.together(partial(begin_stage, recipe, stage, choice, method, datasets))
            if ranks.same(stage.done):  # it was whole and lacked its name
                pool.put(choice, instructions[stage.name], stage.task, stage.name)
                bar.update(settings[stage.name].steps(len(datasets[stage.task]), ranks.count()))
                continue
            if student is None:
                student = load_student(recipe, records, method, features)
            around = environment()
            dropped = sum(records[task].dropped for task in stage.tasks) + len(datasets[stage.task].dropped)
            report = train_stage(recipe, stage, datasets, student, method, choice, bar, partial_of(stage))
            pool.put(choice, instructions[stage.name], stage.task, stage.name)
            if ranks.first():
                told = {"dropped_records": dropped, "environment": around, **what_ran(recipe, stage)}
                finish(stage, report | told, pool)
            ranks.wait()
            if recipe.run.zero != "none":
                # DeepSpeed has sharded, cast and hooked this model. The next stage takes a new one, and a GPU may not
                # have room for both.
                student = None
                del method.stage
                unset_hf_deepspeed_config()
                gc.collect()
                torch.cuda.empty_cache()


def begin_stage(
    recipe: Recipe, stage: Stage, choice: Choice, method: Method, datasets: dict[str, InstructionDataset]
) -> None:
    """The first process's `begin` of the stage, with what it is to be trained from."""
    if ranks.first():
        begin(run_folder(recipe), stage, origin_of(stage, choice, method, datasets))


def done_stages(stages: list[Stage]) -> list[bool]:
    """Which stages are done, as the first process sees it: another host may not see at once what was written."""
    return ranks.same([stage.done for stage in stages])


def what_ran(recipe: Recipe, stage: Stage) -> dict:
    """How the stage's records were shared, and the checksums of the files that it was trained from."""
    settings, inputs = recipe.for_stage(stage.tasks, ranks.count()), frozen(run_folder(recipe))["inputs"]
    benchmark = open_benchmark(recipe.stream.data_root).file
    return {
        "processes": ranks.count(),
        "micro_batch": settings.batch_size,
        "accumulation": settings.gradient_accumulation,
        "global_batch": settings.batch_size * settings.gradient_accumulation * ranks.count(),
        "inputs": {
            name: told for name, told in inputs.items() if name not in recipe.stream.tasks or name in stage.tasks
        }
        | {benchmark.name: checksum(benchmark)},
    }


def finish(stage: Stage, report: dict, pool: Pool) -> None:
    """Writes what is left, and gives the stage's folder its name, with DONE in it, when it is whole."""
    partial = partial_of(stage)
    report = report | {"handed_on": checksums(partial)}
    write_atomically(partial / "stage.json", json.dumps(report, indent=1) + "\n")
    write_atomically(partial / "codebook.json", pool.to_json())
    if "wandb" in sys.modules:
        sys.modules["wandb"].finish()  # the next stage is a run of its own in this group
    seal(stage)


def help_method(names: list[str]) -> str | None:
    """Prints what the named methods are and their settings, from their own files; returns what is wrong with a name."""
    if not names or (unknown := [name for name in names if name not in METHODS]):
        return f"--help-method NAME: {unknown[0] if names else 'no name'}; the methods are {', '.join(METHODS)}"
    for name in names:
        kind = METHODS[name]
        about, _, _ = kind.__doc__.partition("\n\n")
        print(f"{name} ({kind.__module__.replace('.', '/')}.py): {' '.join(about.split())}")
        for one in fields(kind.Settings):
            print(f"  --{one.name} {help_of(one)}")
        for field, value in kind.changes.items():
            print(f"  changes the recipe's default of {field} to {value}")
    return None


def main(arguments: list[str] | None = None) -> None:
    """Command line; `--list-methods` prints the methods' names as a JSON list, `--help-method NAME` a method's
    settings."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if "--list-methods" in arguments:
        print(json.dumps(list(METHODS)))
        return
    if "--help-method" in arguments:
        sys.exit(help_method(arguments[arguments.index("--help-method") + 1 :]))
    leave_at_once()
    die_with_launcher()
    try:
        recipe = load_recipe(arguments)
        folder = run(recipe)
    except (ValueError, OSError) as error:
        if os.environ.get("LLACA_TRACEBACK"):
            raise
        sys.exit(f"llaca.train: {error}\n(LLACA_TRACEBACK=1 shows where)")
    except RuntimeError as error:
        if os.environ.get("LLACA_TRACEBACK") or not hosts.lost(error):
            raise
        sys.exit(
            f"llaca.train: another process of this run has gone, see its own messages: {error}\n"
            "What is saved is whole; the same command on every host goes on from there"
        )
    tqdm.write(f"{recipe.run.run}: done, {folder}")


if __name__ == "__main__":
    main()
