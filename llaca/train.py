"""Trains one run: `python -m llaca.train --method llaca --seed 0`; `--help` lists every field of a recipe.

Walks the stream; every stage starts from a parameter set of the pool, trains it with the method's hooks and puts it
back. After a kill the same command goes on with the first stage that is not DONE, from its last checkpoint or from its
start, and the result is the same, since everything random in a stage comes from the seed and the stage's number.
"""

import gc
import json
import os
import random
import shutil
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from data.benchmark import image_root, open_benchmark, train_file
from data.check import is_checked
from llaca import hosts, ranks
from llaca.config import Recipe, TrainConfig, load_recipe
from llaca.grouping import THRESHOLDS, Codebook, wordings
from llaca.methods import METHODS, method_of
from llaca.methods.base import Method, StageView
from llaca.pool import Choice, Pool
from llaca.stream import (
    Stage,
    check_order,
    die_with_launcher,
    environment,
    only_one,
    open_run,
    run_folder,
    stages_of,
    write_atomically,
)
from llava.dataset import DataError, InstructionDataset, Loaded, Sample, read_samples
from llava.features import FeatureCache, cache_features, use_features
from llava.model import (
    adapter_state,
    image_tokens,
    load_adapter,
    load_base,
    reset_projector,
    save_adapter,
    set_adapter_state,
)

ZERO = Path(__file__).parents[1] / "scripts"
MEMORY = "method.pt"  # what a method hands on beside the weights


@dataclass
class Student:
    """The model in training: its adapter attached, `fresh` its trainable state before any task, on the CPU."""

    model: torch.nn.Module
    processor: object
    fresh: dict[str, torch.Tensor]
    features: FeatureCache | None

    def dataset(self, samples: list[Sample], max_length: int, source: Path | str) -> InstructionDataset:
        """The samples, tokenised. Raises DataError naming `source` for those that cannot be."""
        tokens = image_tokens(self.model.config)
        return InstructionDataset(samples, self.processor, tokens, max_length, self.features, source)


def seed_everything(seed: int) -> None:
    """Python's, numpy's and torch's generators."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def load_stream(recipe: Recipe) -> dict[str, Loaded]:
    """The training records of every task, with what is left out of an unchecked one.

    All are validated before anything is trained (raises DataError); pictures are opened unless data.check has done so.
    """
    stream, records = recipe.stream, {}
    for task in stream.tasks:
        path = train_file(stream.data_root, stream.instructions, task)
        look = not is_checked(stream.data_root, stream.instructions, task)
        loaded = read_samples(path, image_root(stream.data_root), look)
        samples = loaded.usable if stream.unchecked else loaded.whole(path)
        if not samples:
            raise DataError(path, ["no record can be used"])
        records[task] = Loaded(samples[: stream.max_train_samples or None], loaded.problems)
    return records


def load_student(
    recipe: Recipe, records: dict[str, Loaded], method: Method, features: FeatureCache | None = None
) -> Student:
    """The base model with a fresh adapter, and the pictures' features, if the recipe reuses them and none are given."""
    config = recipe.model
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, config.dtype)
    model, processor = load_base(config.base, dtype, config.attention, config.quantization, device)
    if config.reuse_vision_features:
        if features is None:
            paths = [sample.image for loaded in records.values() for sample in loaded.usable if sample.image]
            features = cache_features(model, processor.image_processor, paths)
        use_features(model)
    seed_everything(recipe.run.seed)
    model = method.attach(model, config)
    fresh = {name: tensor.cpu() for name, tensor in adapter_state(model).items()}
    return Student(model, processor, fresh, features)


def stage_datasets(
    recipe: Recipe, stages: list[Stage], records: dict[str, Loaded], student: Student
) -> dict[str, InstructionDataset]:
    """The training set of every stage by its task, all tokenised before the first stage is trained."""
    stream, single = recipe.stream, {}
    for task, loaded in records.items():
        source = train_file(stream.data_root, stream.instructions, task)
        single[task] = student.dataset(loaded.usable, recipe.for_stage((task,)).max_length, source)
    return {
        stage.task: single[stage.tasks[0]]
        if len(stage.tasks) == 1
        else student.dataset([s for t in stage.tasks for s in records[t].usable], recipe.train.max_length, stage.task)
        for stage in stages
    }


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
        load_adapter(student.model, stage.folder.parent / choice.start / "adapter")
    settings = recipe.for_stage(stage.tasks, ranks.count())
    checkpoint = latest(folder / "trainer")
    stage_seed = 10_000 * recipe.run.seed + 100 * stage.index  # room for the number of an epoch
    seed_everything(stage_seed)
    if recipe.model.legacy_projector_reset and stage.index > 1:
        reset_projector(student.model)
    start = None if checkpoint or recipe.run.zero == "none" else adapter_state(student.model)
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
    tap.attach(trainer)
    checkpoints, stop = Checkpoints(tap, folder / "trainer", checkpoint), StopOnSignal()
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
        trainer.model_wrapped.destroy()  # its hooks on the gradients' accumulators would keep the model for ever
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


def handed_on(method: Method, stage: Path) -> dict:
    """The method's memory of an earlier stage. Raises FileNotFoundError if the stage's folder has lost it."""
    if not method.hands_on:
        return {}
    if not (stage / MEMORY).is_file():
        raise FileNotFoundError(
            f"{stage / MEMORY} is not there: what {method.config.method} has to know of earlier tasks. Copy it to the "
            f"run, or remove {stage}/DONE, and DONE of every stage after it, and train them again"
        )
    return torch.load(stage / MEMORY, map_location="cpu", weights_only=True)


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
        bf16=recipe.model.dtype == "bfloat16",
        tf32=cuda or None,
        use_cpu=not cuda,
        dataloader_num_workers=recipe.run.loader_workers,
        logging_steps=recipe.run.logging_steps,
        save_strategy="steps" if recipe.run.save_steps else "no",
        save_steps=recipe.run.save_steps or 1,
        deepspeed=None if recipe.run.zero == "none" else str(ZERO / f"zero{recipe.run.zero}.json"),
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
    records = hosts.together(lambda: load_stream(recipe))
    hosts.together(lambda: open_run(recipe) if ranks.first() else None)
    folder = hosts.together(lambda: open_run(recipe))
    if not method.trains:
        return folder
    with only_one(folder) if ranks.first() else nullcontext():
        ranks.wait()
        stages = stages_of(recipe, method.joint, folder)
        check_order(stages)
        if not all(stage.done for stage in stages):
            train_stages(recipe, stages, records, method)
    return folder


def stage_wordings(recipe: Recipe, stages: list[Stage], records: dict[str, Loaded]) -> dict[str, list[str]]:
    """The instructions of every stage by its name. Raises ValueError for a record without one."""
    stream, benchmark = recipe.stream, open_benchmark(recipe.stream.data_root)
    own = {
        task: wordings(
            ((f"record {sample.record} (id {sample.id!r})", sample.turns[0][0]) for sample in loaded.usable),
            benchmark.task(task).instruction,
            train_file(stream.data_root, stream.instructions, task),
        )
        for task, loaded in records.items()
    }
    return {stage.name: sorted({text for task in stage.tasks for text in own[task]}) for stage in stages}


def train_stages(recipe: Recipe, stages: list[Stage], records: dict[str, Loaded], method: Method) -> None:
    """Walks the stream, past the stages that are done."""
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
    line = int(os.environ.get("LLACA_BAR", 0))  # of the terminal, where several runs share it
    with tqdm(total=total, desc=recipe.run.run, unit="step", position=line, disable=not ranks.first()) as bar:
        for stage in stages:
            if stage.done:
                pool = Pool.from_json((stage.folder / "codebook.json").read_text(encoding="utf-8"))
                bar.update(json.loads((stage.folder / "stage.json").read_text(encoding="utf-8"))["steps"])
                continue
            if student is None:
                student = load_student(recipe, records, method, features)
            dropped = sum(len(records[task].problems) for task in stage.tasks)
            complete_stage(recipe, stage, datasets, instructions[stage.name], dropped, student, method, pool, bar)
            if recipe.run.zero != "none":
                # DeepSpeed has sharded, cast and hooked this model. The next stage takes a new one, loaded whole, and
                # a GPU may not have room for both.
                student = None
                del method.stage
                unset_hf_deepspeed_config()
                gc.collect()
                torch.cuda.empty_cache()


def complete_stage(
    recipe: Recipe,
    stage: Stage,
    datasets: dict[str, InstructionDataset],
    instructions: list[str],
    dropped: int,
    student: Student,
    method: Method,
    pool: Pool,
    bar: tqdm,
) -> None:
    """Trains one stage in a folder of its own and gives it its name, with DONE in it, when it is whole."""
    choice, around = pool.choose(instructions), environment()
    partial = stage.folder.with_name(stage.folder.name + ".partial")
    if ranks.first():
        shutil.rmtree(stage.folder, ignore_errors=True)
        for answers in run_folder(recipe).glob(f"answers*/{stage.name}"):  # with parameters that are no more
            shutil.rmtree(answers)
        partial.mkdir(parents=True, exist_ok=True)
    ranks.wait()
    report = train_stage(recipe, stage, datasets, student, method, choice, bar, partial)
    report |= {"dropped_records": dropped, "environment": around}
    pool.put(choice, instructions, stage.task, stage.name)
    if ranks.first():
        finish(stage, partial, report, pool)
    ranks.wait()


def finish(stage: Stage, partial: Path, report: dict, pool: Pool) -> None:
    """Writes what is left and gives the stage's folder its name."""
    write_atomically(partial / "stage.json", json.dumps(report, indent=1) + "\n")
    write_atomically(partial / "codebook.json", pool.to_json())
    if "wandb" in sys.modules:
        sys.modules["wandb"].finish()  # the next stage is a run of its own in this group
    partial.rename(stage.folder)
    shutil.rmtree(stage.folder / "trainer", ignore_errors=True)
    (stage.folder / "DONE").touch()


def main(arguments: list[str] | None = None) -> None:
    """Command line; `--list-methods` prints the methods' names as a JSON list."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if "--list-methods" in arguments:
        print(json.dumps(list(METHODS)))
        return
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
