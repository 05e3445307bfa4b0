"""Training: transformers' Trainer with LLaVA's batches, two learning rates and a stated loss normalisation."""

import json
import math
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from llava.adapters import is_connector, trainable_parameters
from llava.backbone import unwrapped
from llava.dataset import Collator, InstructionDataset, shows_pictures
from llava.hooks import TrainHooks
from llava.sampler import ModalityLengthSampler

NORMALISATIONS = ("local", "global")
SETTINGS = {
    "weight_decay": 0.0,
    "max_grad_norm": 0.0,
    "lr_scheduler_type": "cosine",
    "logging_steps": 10,
    "save_strategy": "no",
    "report_to": "none",
    # A loss that is not a number must be seen in the log, and looking for one would wait for the device at every step.
    "logging_nan_inf_filter": False,
    "remove_unused_columns": False,
    "dataloader_pin_memory": False,
    "ddp_find_unused_parameters": False,  # every batch reaches every parameter, see Backbone.without_picture
}


def training_arguments(output_dir: str | Path, **settings) -> TrainingArguments:
    """Return TrainingArguments with this project's defaults (`SETTINGS`) under the given settings."""
    return TrainingArguments(output_dir=str(output_dir), **{**SETTINGS, **settings})


class LlavaTrainer(Trainer):
    """Trains what `attach_lora` made trainable.

    `connector_lr` is the connector's learning rate, None for that of the rest. `normalisation` says what a gradient is
    the mean over: "local" averages over the supervised tokens of each micro-batch and then over micro-batches and
    devices alike (transformers 4.31, the released code), "global" over all supervised tokens of the step.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        dataset: InstructionDataset,
        connector_lr: float | None = None,
        normalisation: str = "local",
        hooks: TrainHooks | None = None,
    ):
        if normalisation not in NORMALISATIONS:
            raise ValueError(f"loss normalisation is {normalisation!r}; it must be one of {NORMALISATIONS}")
        self.connector_lr, self.normalisation, self.hooks = connector_lr, normalisation, hooks or TrainHooks()
        self.backbone = dataset.backbone
        super().__init__(model, args, Collator(self.backbone), dataset)
        self.remove_callback(PrinterCallback)
        self.add_callback(EpochOrder(self))
        self.add_callback(FrozenTower())
        self.loss_is_scaled_for_ga = normalisation == "global"
        self.model_accepts_loss_kwargs = True  # else the Trainer does not count a step's tokens, as for Qwen's classes

    def _get_train_sampler(self, train_dataset=None) -> ModalityLengthSampler:
        lengths = self.train_dataset.modality_lengths
        batches = self.args.world_size * self.args.gradient_accumulation_steps
        self.sampler = ModalityLengthSampler(lengths, self._train_batch_size, batches, self.args.seed)
        return self.sampler

    def _init_training_state(self, max_steps, steps_per_epoch, epochs, checkpoint, trial) -> tuple[int, int]:
        """Return where to go on: (epoch, micro-batches of it that are done).

        A checkpoint of the last step has nothing left to do. The stock Trainer makes one step more if that step ends
        inside an epoch, and leaves the random generators alone if it does not.
        """
        place = super()._init_training_state(max_steps, steps_per_epoch, epochs, checkpoint, trial)
        if self.state.global_step < max_steps:
            return place
        self._load_rng_state(checkpoint)
        return epochs, 0

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """Build the configured optimizer over four groups: (rest, connector) x (decayed, not decayed)."""
        if self.optimizer is None:
            model = model or self.model
            decayed = set(self.get_decay_parameter_names(model))
            connector_lr = self.args.learning_rate if self.connector_lr is None else self.connector_lr
            groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
            for name, parameter in trainable_parameters(model).items():
                groups.setdefault((is_connector(name), name in decayed), []).append(parameter)
            optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer_class(
                [
                    {
                        "params": groups[connector, decay],
                        "lr": connector_lr if connector else self.args.learning_rate,
                        "weight_decay": self.args.weight_decay if decay else 0.0,
                    }
                    for connector, decay in sorted(groups)
                ],
                **settings,
            )
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the loss of one micro-batch; logits are computed for the supervised positions alone."""
        with nullcontext() if shows_pictures(inputs) else self.backbone.without_picture(self.model):
            outputs, targets = self.backbone.answer_logits(model, inputs)
        loss = self.backbone.token_loss(outputs.logits, targets)
        if self.normalisation == "local":
            loss = loss / len(targets)
        else:
            devices = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            loss = loss * devices / num_items_in_batch
        extra = self.hooks.loss(model, inputs, outputs)
        if extra is not None:
            # The Trainer divides a local loss by the accumulation steps, and takes a global one as it is.
            shares = self.current_gradient_accumulation_steps if self.loss_is_scaled_for_ga else 1
            loss = loss + extra / shares
        return (loss, outputs) if return_outputs else loss

    def _clip_grad_norm(self, model) -> torch.Tensor:
        self.grad_norm = super()._clip_grad_norm(model)
        return self.grad_norm

    def _get_grad_norm(self, model, grad_norm=None):
        """The norm for the log, None where there is no line to write: the stock one reads, scales by 1 (which spreads
        a NaN to every tensor) and waits for the gradient at every step."""
        if grad_norm is not None or (self.state.global_step + 1) % self.args.logging_steps:
            return grad_norm
        if self.is_deepspeed_enabled:
            return self.model_wrapped.get_global_grad_norm()
        return nn.utils.get_total_norm([p.grad for p in trainable_parameters(self.model).values()])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log a line, and what the hooks add to it. Raises FloatingPointError if loss or gradient are not finite."""
        told = {key: float(logs[key]) for key in ("loss", "grad_norm") if key in logs}
        if not all(map(math.isfinite, told.values())):
            raise FloatingPointError(
                f"{self.args.run_name}, up to optimizer step {self.state.global_step}: {told}. What was saved before "
                "is whole; a lower learning rate may help"
            )
        super().log({**logs, **self.hooks.log()} if "loss" in logs else logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter of a checkpoint. DeepSpeed's own checkpoint holds it already."""
        if not self.is_deepspeed_enabled:
            super().save_model(output_dir, _internal_call)

    def floating_point_ops(self, inputs) -> int:
        """Zero: nobody reads the estimate, and the stock one walks through all modules at every step."""
        return 0


class EpochOrder(TrainerCallback):
    """Tells the sampler its epoch, which a training that goes on inside a later one would else not reach.

    The Trainer hands the number on through accelerate's wrappers: `SkipBatchSampler` around `BatchSamplerShard` with
    several processes, whose `set_epoch` (accelerate 1.15) ends at the second.
    """

    def __init__(self, trainer: LlavaTrainer):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        steps = max(1, math.ceil(len(train_dataloader) / args.gradient_accumulation_steps))
        self.trainer.sampler.set_epoch(state.global_step // steps)


class FrozenTower(TrainerCallback):
    """Keeps the backward pass out of what sees and does not train.

    With activation checkpointing transformers has the output of every embedding ask for a gradient, a vision tower's
    patches among them. Only reentrant checkpoints, which are not made here, need one.
    """

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        unwrapped(model).disable_input_require_grads()


class StepLog(TrainerCallback):
    """Advances a progress bar by the optimizer step and writes every log line of the Trainer to a JSON-lines file."""

    def __init__(self, bar: tqdm, name: str, path: Path):
        self.bar, self.name, self.path = bar, name, path

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar.update(state.global_step)  # those of a checkpoint

    def on_log(self, args, state, control, logs=None, **kwargs):
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **logs}) + "\n")
        if "loss" in logs:
            self.bar.set_postfix_str(f"{self.name} loss {float(logs['loss']):.3f}", refresh=False)

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update()
