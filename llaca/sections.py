"""The sections of a recipe that every method has: dataclasses whose fields say default, meaning and limits."""

from dataclasses import MISSING, dataclass, fields
from typing import Literal

from llaca.fields import setting
from llava.backbone import BaseOptions


@dataclass
class ModelConfig:
    """The base model and what of it is trained."""

    base: str = setting(MISSING, "folder of a base model, of a family in llava/backbones/")
    lora_rank: int = setting(128, "rank r of LoRA on every linear of the language model", least=1)
    lora_alpha: int = setting(256, "LoRA scale is alpha / rank", least=1)
    lora_dropout: float = setting(0.05, "dropout before LoRA A", least=0, below=1)
    train_connector: bool = setting(True, "train what lies between pictures and language, too (projector, merger)")
    min_pixels: int = setting(0, "of a picture, at least, where it may have any size; 0: what the base says", least=0)
    max_pixels: int = setting(0, "of a picture, at most, where it may have any size; 0: what the base says", least=0)
    attention: Literal["sdpa", "eager", "flash_attention_2"] = setting("sdpa", "attention implementation")
    dtype: Literal["float32", "bfloat16"] = setting("bfloat16", "of the frozen base; what is trained is float32")
    quantization: Literal["none", "8bit", "nf4", "nf4-double"] = setting(
        "none", "of the frozen language model's blocks (QLoRA, by bitsandbytes)"
    )
    reuse_vision_features: bool = setting(
        False, "compute the frozen vision tower's features once per picture, for all runs (.cache/)"
    )
    gradient_checkpointing: bool = setting(True, "recompute activations in the backward pass")
    legacy_projector_reset: bool = setting(
        False, "every stage but the first starts from a random projector, as in the released code"
    )

    @property
    def options(self) -> BaseOptions:
        """What the backbone is told."""
        return BaseOptions(self.min_pixels, self.max_pixels, self.train_connector)


@dataclass
class StreamConfig:
    """The benchmark and the order in which its tasks arrive."""

    data_root: str = setting(MISSING, "folder of the benchmark: CoIN's layout, or its own benchmark.yaml")
    stream: str = setting("", "a stream that the benchmark names, as coin8; empty: all tasks")
    tasks: list[str] = setting(list, "task names in the original order, in place of a stream")
    order: Literal["original", "reverse", "alphabet"] = setting("original", "original, reverse or alphabet")
    instructions: Literal["original", "diverse", "10type"] = setting("original", "original, diverse or 10type")
    unchecked: bool = setting(
        False, "train although the check of the data fails; what cannot be used is left out and counted"
    )
    max_train_samples: int = setting(0, "only the first n training records of a task; 0: all", least=0)
    max_new_tokens: int = setting(
        0, "tokens of an answer at most, below the benchmark's own limit; 0: that limit", least=0
    )
    max_test_samples: int = setting(0, "only the first n questions of a test set; 0: all", least=0)


@dataclass
class TrainConfig:
    """Optimisation of one stage."""

    epochs: float = setting(1.0, "passes over a task's training records", above=0)
    batch_size: int = setting(16, "records per device and micro-batch; with global_batch_size at most so many", least=1)
    gradient_accumulation: int = setting(
        1, "micro-batches per optimizer step; with global_batch_size as many as it takes", least=1
    )
    global_batch_size: int = setting(
        0, "records per optimizer step, however many devices there are; 0: what comes out", least=0
    )
    learning_rate: float = setting(2e-4, "peak learning rate of LoRA", least=0)
    projector_learning_rate: float = setting(2e-5, "peak learning rate of the projector", least=0)
    schedule: Literal["cosine", "linear", "constant", "constant_with_warmup"] = setting(
        "cosine", "learning-rate schedule"
    )
    warmup_ratio: float = setting(0.03, "share of a stage's steps with rising learning rate", least=0, below=1)
    weight_decay: float = setting(0.0, "AdamW's weight decay", least=0)
    max_grad_norm: float = setting(
        0.0, "gradient clipping (L2 norm of the step's whole gradient); 0: none, as released", least=0
    )
    loss_normalisation: Literal["local", "global"] = setting(
        "local", "local: mean over a micro-batch's supervised tokens, as released; global: over the whole step's"
    )
    max_length: int = setting(2048, "tokens of a sample, image placeholders included", least=1)
    per_task: dict = setting(dict, "task name -> overrides of this section's fields (YAML only)")

    def steps(self, records: int, devices: int) -> int:
        """Optimizer steps of a stage with so many records, as transformers' Trainer counts them."""
        batches = -(-records // (self.batch_size * devices))
        return int(-(-self.epochs * max(1, -(-batches // self.gradient_accumulation)) // 1))


@dataclass
class MethodConfig:
    """How forgetting is fought: what every method has. Its own settings stand in its file (llaca/methods/)."""

    method: str = setting("llaca", "a name of --list-methods; --help-method NAME prints its settings")
    grouping: bool = setting(False, "share parameters only between tasks with similar instructions")
    similarity_threshold: float | None = setting(
        None, "of joining a group; unset: as released, 0.90 for original instructions, else 0.30"
    )
    group_similarity: Literal["mean", "max"] = setting(
        "mean", "of a group: mean over all pairs (released, Table 10) or max (the text)"
    )
    new_group_start: Literal["latest", "fresh"] = setting(
        "latest", "start of a new group: latest parameters (Algorithm 1) or fresh ones (the paper's text)"
    )
    seen_gradient: Literal["clipped", "unclipped"] = setting(
        "clipped", "the gradient the method sees where max_grad_norm clips it: as the step used it, or before"
    )


@dataclass
class EngineConfig:
    """How a stage is computed: rounding, and with it the result's last digits, differ from engine to engine."""

    zero: Literal["none", "0", "1", "2", "3", "3-offload"] = setting(
        "none", "DeepSpeed with scripts/zeroN.json as it is; none: one process, or DDP under torchrun"
    )


@dataclass
class RunConfig:
    """Where a run goes and what it tells."""

    run: str = setting("", "name of the run, one folder; empty: made from method, recipe, what differs, and seed")
    runs_dir: str = setting("runs", "folder of the run folders")
    seed: int = setting(0, "the run is a function of its recipe and this number, from 0", least=0)
    report_to: Literal["none", "tensorboard", "wandb"] = setting(
        "none", "where else to log; wandb is offline unless WANDB_MODE says otherwise"
    )
    loader_workers: int = setting(0, "processes that read and prepare pictures ahead of the training; 0: none", least=0)
    expected_minutes: float = setting(
        0.0, "minutes that one run takes on the recipe's hardware, told before it starts", least=0
    )
    retained: str = setting(
        "", "folder of a benchmark whose test sets say what the base can do and what stays of it; empty: not measured"
    )
    logging_steps: int = setting(10, "optimizer steps between two lines of train_log.jsonl", least=1)
    save_steps: int = setting(
        0, "optimizer steps between two checkpoints inside a stage; 0: one only when SIGTERM or SIGINT asks", least=0
    )


SECTIONS = (ModelConfig, StreamConfig, TrainConfig, MethodConfig, EngineConfig, RunConfig)
FIELDS = {f.name: f for section in SECTIONS for f in fields(section)}
TRAIN_FIELDS = {f.name for f in fields(TrainConfig)} - {"per_task"}
