"""Training: transformers' Trainer with LLaVA's batches, two learning rates and a stated loss normalisation."""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
from tqdm import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import ModelOutput

from llava.conversation import IGNORE
from llava.dataset import Collator, InstructionDataset
from llava.features import blank_pixels
from llava.hooks import TrainHooks
from llava.model import is_projector, trainable_parameters
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
    "ddp_find_unused_parameters": False,  # every batch reaches every parameter, see `_no_gradient`
}


def training_arguments(output_dir: str | Path, **settings) -> TrainingArguments:
    """Return TrainingArguments with this project's defaults (`SETTINGS`) under the given settings."""
    return TrainingArguments(output_dir=str(output_dir), **{**SETTINGS, **settings})


class LlavaTrainer(Trainer):
    """Trains what `attach_lora` made trainable.

    `projector_lr` is the projector's learning rate, None for that of the rest. `normalisation` says what a gradient is
    the mean over: "local" averages over the supervised tokens of each micro-batch and then over micro-batches and
    devices alike (transformers 4.31, the released code), "global" over all supervised tokens of the step.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        dataset: InstructionDataset,
        pad_id: int,
        projector_lr: float | None = None,
        normalisation: str = "local",
        hooks: TrainHooks | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ):
        if normalisation not in NORMALISATIONS:
            raise ValueError(f"loss normalisation is {normalisation!r}; it must be one of {NORMALISATIONS}")
        self.projector_lr, self.normalisation, self.hooks = projector_lr, normalisation, hooks or TrainHooks()
        super().__init__(model, args, Collator(pad_id), dataset, callbacks=list(callbacks))
        self.remove_callback(PrinterCallback)
        self.add_callback(EpochOrder(self))
        self.loss_is_scaled_for_ga = normalisation == "global"
        self.image_id = model.config.image_token_id

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
        """Build the configured optimizer over four groups: (rest, projector) x (decayed, not decayed)."""
        if self.optimizer is None:
            model = model or self.model
            decayed = set(self.get_decay_parameter_names(model))
            projector_lr = self.args.learning_rate if self.projector_lr is None else self.projector_lr
            groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
            for name, parameter in trainable_parameters(model).items():
                groups.setdefault((is_projector(name), name in decayed), []).append(parameter)
            optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer_class(
                [
                    {
                        "params": groups[projector, decay],
                        "lr": projector_lr if projector else self.args.learning_rate,
                        "weight_decay": self.args.weight_decay if decay else 0.0,
                    }
                    for projector, decay in sorted(groups)
                ],
                **settings,
            )
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the loss of one micro-batch; logits are computed for the supervised positions alone."""
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        with nullcontext() if "pixel_values" in inputs else blank_picture(self.model):
            outputs, targets = supervised_logits(model, inputs, labels)
        loss = token_loss(outputs.logits, targets, self.image_id)
        if self.normalisation == "local":
            loss = loss / len(targets)
        else:
            devices = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            loss = loss * devices / num_items_in_batch
        extra = self.hooks.loss(model, {**inputs, "labels": labels}, outputs)
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


def supervised_logits(
    model: nn.Module, inputs: dict[str, torch.Tensor], labels: torch.Tensor
) -> tuple[ModelOutput, torch.Tensor]:
    """Run `model` and return its outputs and targets for the positions that predict a supervised token.

    `labels` is `[batch, length]`; `outputs.logits` is `[tokens, vocabulary]` and the targets are `[tokens]`.
    """
    targets = functional.pad(labels[:, 1:], (0, 1), value=IGNORE)
    supervised = targets != IGNORE
    outputs = model(**inputs, logits_to_keep=supervised, use_cache=False)
    return outputs, targets[supervised]


def token_loss(logits: torch.Tensor, targets: torch.Tensor, image_id: int) -> torch.Tensor:
    """Return the summed cross entropy of `[tokens, vocabulary]` logits, in float32.

    The picture's placeholder is no word a model could say: it stays out of the distribution, as in the original, whose
    vocabulary does not have it.
    """
    column = torch.tensor([image_id], device=logits.device)
    return functional.cross_entropy(logits.float().index_fill(1, column, -torch.inf), targets, reduction="sum")


def answer_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return -log p of a collated batch's answers: the summed cross entropy of its supervised tokens."""
    inputs = dict(batch)
    outputs, targets = supervised_logits(model, inputs, inputs.pop("labels"))
    return token_loss(outputs.logits, targets, model.config.image_token_id)


@contextmanager
def blank_picture(model: nn.Module) -> Iterator[None]:
    """Lets a batch without pictures go through vision tower and projector like others, and changes nothing.

    As in the original, which sends an empty picture along: the projector's gradient is zero rather than absent, so
    that the optimizer's moments keep decaying. And engines need it: where one rank has pictures and another has none,
    DDP waits for gradients that never come, and ZeRO, which reduces them in the order in which the backward pass makes
    them, adds up those of different tensors without a word. So it enters where pictures enter, at the embeddings.
    """
    owner = model.get_base_model().model

    def add(embeddings, inputs, output):
        features = owner.get_image_features(pixel_values=blank_pixels(owner)).pooler_output
        return output + (features[0].sum() * 0.0).to(output.dtype)

    handle = model.get_input_embeddings().register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


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
            self.bar.set_postfix_str(f"{self.name} loss {float(logs['loss']):.3f}")

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update()
