"""One stage in training: from the parameters that it starts with to the files that it leaves."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from llaca import ranks
from llaca.adapted import seed_everything
from llaca.engines.deepspeed import cast_for_engine
from llaca.engines.zero import deepspeed_file, shards_weights
from llaca.folders import MEMORY, TRAINER, handed_on, load_start, partial_of
from llaca.methods.base import StageView
from llaca.pool import Choice
from llaca.sections import TrainConfig
from llaca.stream import Stage
from llava.adapters import adapter_state, reset_connector, save_adapter, set_adapter_state
from llava.dataset import InstructionDataset

if TYPE_CHECKING:  # a run knows its stages
    from llaca.run import Run
    from llava.trainer import LlavaTrainer


class StageTraining:
    """A stage of a run, with the parameters that `choice` names as its start. It writes into `folder`."""

    def __init__(self, run: "Run", stage: Stage, choice: Choice):
        self.run, self.stage, self.choice = run, stage, choice
        self.recipe, self.method, self.adapted = run.recipe, run.method, run.adapted
        self.settings: TrainConfig = run.settings(stage)
        self.seed = run.recipe.stage_seed(stage.index)
        self.folder = partial_of(stage)

    def train(self, bar: tqdm) -> dict:
        """Train the stage, write adapter/, plain/, method.pt and the logs, and return what stage.json tells of it.

        The stage goes on from its last checkpoint, if there is one. `bar` is moved on with every step.
        """
        # These bring in PEFT and, where installed, bitsandbytes.
        from llaca.callbacks import Checkpoints, MethodCallback, StopOnSignal, TrackLog, latest, truncate_log
        from llava.trainer import StepLog

        self._take_start()
        checkpoint, start = latest(self.folder / TRAINER), None
        seed_everything(self.seed)
        dataset = self._records()
        if self.recipe.model.legacy_projector_reset and self.stage.index > 1:
            reset_connector(self.adapted.model)
        if not checkpoint and self.recipe.engine.zero != "none":  # on the CPU: a GPU has its own copies to make
            start = adapter_state(self.adapted.model, "cpu")
        if shards_weights(self.recipe.engine.zero):
            cast_for_engine(self.adapted.model, getattr(torch, self.recipe.model.dtype))
        steps = self.settings.steps(len(dataset), ranks.count())
        bar.total += steps - self.run.steps(self.stage)
        trainer = self._trainer(dataset)
        callback = MethodCallback(self.method, self.choice.matched, steps, start, self.recipe.method.seen_gradient)
        del start  # the callback lets it go when the engine has it
        callback.attach(trainer)
        checkpoints, stop = Checkpoints(callback, self.folder / TRAINER, checkpoint), StopOnSignal()
        trainer.add_callback(checkpoints)
        trainer.add_callback(stop)
        if ranks.first():
            log = self.folder / "train_log.jsonl"
            truncate_log(log, int(checkpoint.name.split("-")[1]) if checkpoint else 0)
            trainer.add_callback(StepLog(bar, self.stage.name, log))
            trainer.add_callback(TrackLog(self.run.tracker, self.stage, log, self.run.made))
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        stop.leave_if_stopped(self.folder)
        shards = callback.layout.shards()
        averaged, report = self.method.after_task(shards, self.folder)
        self._write(
            callback.layout.gather(shards.parameters), None if averaged is None else callback.layout.gather(averaged)
        )
        if self.recipe.engine.zero != "none":
            callback.engine.release()
        return {
            "stage": self.stage.name,
            "tasks": list(self.stage.tasks),
            "samples": len(dataset),
            "steps": trainer.state.global_step,
            "seconds": round(checkpoints.seconds, 1),
            "trained_parameters": sum(part.shape.numel() for part in callback.layout.slices),
            "peak_memory_bytes": ranks.peak_memory(),
            "engine": callback.layout.engine,
            "start": self.choice.start,
            "group": self.choice.group,
            "similarity": self.choice.scores,
            "averaged": averaged is not None,
            **report,
        }

    @property
    def _start(self) -> Path:
        return self.stage.folder.parent / self.choice.start

    def _take_start(self) -> None:
        if self.choice.start is None:
            set_adapter_state(self.adapted.model, self.adapted.fresh)
        else:
            load_start(self.adapted.model, self._start)

    def _records(self) -> InstructionDataset:
        """The stage's own records and those that the method adds; the method sees the stage."""
        own = self.run.datasets[self.stage.task]
        self.method.stage = StageView(self.stage.task, self.adapted.model, own, self.seed)
        self.method.recall(handed_on(self.method, self._start) if self.choice.matched else {})
        return self.method.extend(own, self.run.datasets)

    def _trainer(self, dataset: InstructionDataset) -> "LlavaTrainer":
        from llava.trainer import LlavaTrainer

        return LlavaTrainer(
            self.adapted.model,
            self._arguments(),
            dataset,
            connector_lr=self.settings.projector_learning_rate,
            normalisation=self.settings.loss_normalisation,
            hooks=self.method,
        )

    def _write(self, trained: dict[str, Tensor], averaged: dict[str, Tensor] | None) -> None:
        if not ranks.first():
            return
        for name in ("adapter", "plain"):  # safetensors writes beside a file first: what a killed process left goes
            shutil.rmtree(self.folder / name, ignore_errors=True)
        save_adapter(self.adapted.model, self.folder / "adapter", trained if averaged is None else averaged)
        if averaged is not None:
            save_adapter(self.adapted.model, self.folder / "plain", trained)
        if self.method.hands_on:
            torch.save(self.method.memory(), self.folder / MEMORY)

    def _arguments(self):
        """The recipe in transformers' words."""
        from llava.trainer import training_arguments

        settings, run, cuda = self.settings, self.recipe.run, torch.cuda.is_available()
        zero = self.recipe.engine.zero
        return training_arguments(
            self.folder / TRAINER,
            per_device_train_batch_size=settings.batch_size,
            gradient_accumulation_steps=settings.gradient_accumulation,
            num_train_epochs=settings.epochs,
            learning_rate=settings.learning_rate,
            lr_scheduler_type=settings.schedule,
            warmup_steps=settings.warmup_ratio,
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
            activation_checkpointing=self.recipe.model.gradient_checkpointing,
            bf16=self.recipe.model.dtype == "bfloat16",
            tf32=cuda or None,
            use_cpu=not cuda,
            dataloader_num_workers=run.loader_workers,
            logging_steps=run.logging_steps,
            save_strategy="steps" if run.save_steps else "no",
            save_steps=run.save_steps or 1,
            deepspeed=None if zero == "none" else str(deepspeed_file(zero)),
            run_name=f"{run.run}/{self.stage.name}",
            disable_tqdm=True,
            seed=self.seed,
        )
