"""The recipe: five dataclasses, filled from a YAML file, then from the method's own file, then from the command line.

`--help` lists every field with its meaning and default; YAML files hold overrides only.
"""

from argparse import ArgumentParser
from dataclasses import asdict, dataclass, field, fields
from math import inf
from pathlib import Path
from typing import Any, Literal

from transformers import HfArgumentParser

from data.benchmark import open_benchmark
from llaca.fields import mapping, read_text, value_of
from llaca.names import by_task, check_name, run_name

CONFIGS = Path(__file__).parents[1] / "configs"
AVERAGE_FIELDS = ("average", "average_start", "fallback_beta", "beta", "constant", "horizon")
METHOD_FIELDS = (*AVERAGE_FIELDS, "penalty", "consolidation", "temperature", "memory_records", "estimate_records",
                 "merge_weight", "keep_share", "experts", "energy")  # fmt: skip
LIMITS = {  # of settings that a method cannot do without: (least, greatest); the least of ABOVE is not allowed itself
    "penalty": (0, inf),
    "temperature": (0, inf),
    "memory_records": (0, inf),
    "estimate_records": (1, inf),
    "merge_weight": (0, 1),
    "keep_share": (0, 1),
    "experts": (1, inf),
    "energy": (0, 1),
}
ABOVE = ("temperature", "keep_share")
DEFAULT_RECIPE = CONFIGS / "coin_mini.yaml"


@dataclass
class ModelConfig:
    """The base model and what of it is trained."""

    base: str = field(metadata={"help": "folder of a LlavaForConditionalGeneration and its LlavaProcessor"})
    lora_rank: int = field(default=128, metadata={"help": "rank r of LoRA on every linear of the language model"})
    lora_alpha: int = field(default=256, metadata={"help": "LoRA scale is alpha / rank"})
    lora_dropout: float = field(default=0.05, metadata={"help": "dropout before LoRA A"})
    attention: Literal["sdpa", "eager", "flash_attention_2"] = field(
        default="sdpa", metadata={"help": "attention implementation"}
    )
    dtype: Literal["float32", "bfloat16"] = field(
        default="bfloat16", metadata={"help": "of the frozen base; what is trained is float32"}
    )
    quantization: Literal["none", "8bit", "nf4", "nf4-double"] = field(
        default="none", metadata={"help": "of the frozen language model's blocks (QLoRA, by bitsandbytes)"}
    )
    reuse_vision_features: bool = field(
        default=False,
        metadata={"help": "compute the frozen vision tower's features once per picture and keep them in memory"},
    )
    gradient_checkpointing: bool = field(default=True, metadata={"help": "recompute activations in the backward pass"})
    legacy_projector_reset: bool = field(
        default=False,
        metadata={"help": "every stage but the first starts from a random projector, as in the released code"},
    )


@dataclass
class StreamConfig:
    """The benchmark and the order in which its tasks arrive."""

    data_root: str = field(metadata={"help": "folder of the benchmark: CoIN's layout, or its own benchmark.yaml"})
    stream: str = field(default="", metadata={"help": "a stream that the benchmark names, as coin8; empty: all tasks"})
    tasks: list[str] = field(
        default_factory=list, metadata={"help": "task names in the original order, in place of a stream"}
    )
    order: Literal["original", "reverse", "alphabet"] = field(
        default="original", metadata={"help": "original, reverse or alphabet"}
    )
    instructions: Literal["original", "diverse", "10type"] = field(
        default="original", metadata={"help": "original, diverse or 10type"}
    )
    unchecked: bool = field(
        default=False,
        metadata={"help": "train although the check of the data fails; what cannot be used is left out and counted"},
    )
    max_train_samples: int = field(default=0, metadata={"help": "only the first n training records of a task; 0: all"})
    max_new_tokens: int = field(
        default=0, metadata={"help": "tokens of an answer at most; 0: the released limits, 128 or 1024"}
    )
    max_test_samples: int = field(default=0, metadata={"help": "only the first n questions of a test set; 0: all"})


@dataclass
class TrainConfig:
    """Optimisation of one stage."""

    epochs: float = field(default=1.0, metadata={"help": "passes over a task's training records"})
    batch_size: int = field(
        default=16, metadata={"help": "records per device and micro-batch; with global_batch_size at most so many"}
    )
    gradient_accumulation: int = field(
        default=1, metadata={"help": "micro-batches per optimizer step; with global_batch_size as many as it takes"}
    )
    global_batch_size: int = field(
        default=0, metadata={"help": "records per optimizer step, however many devices there are; 0: what comes out"}
    )
    learning_rate: float = field(default=2e-4, metadata={"help": "peak learning rate of LoRA"})
    projector_learning_rate: float = field(default=2e-5, metadata={"help": "peak learning rate of the projector"})
    schedule: Literal["cosine", "linear", "constant", "constant_with_warmup"] = field(
        default="cosine", metadata={"help": "learning-rate schedule"}
    )
    warmup_ratio: float = field(default=0.03, metadata={"help": "share of a stage's steps with rising learning rate"})
    weight_decay: float = field(default=0.0, metadata={"help": "AdamW's weight decay"})
    max_grad_norm: float = field(
        default=0.0,
        metadata={"help": "gradient clipping (L2 norm of the step's whole gradient); 0: none, as released"},
    )
    loss_normalisation: Literal["local", "global"] = field(
        default="local",
        metadata={
            "help": "local: mean over a micro-batch's supervised tokens, as released; global: over the whole step's"
        },
    )
    max_length: int = field(default=2048, metadata={"help": "tokens of a sample, image placeholders included"})
    per_task: dict = field(
        default_factory=dict, metadata={"help": "task name -> overrides of this section's fields (YAML only)"}
    )

    def steps(self, records: int, devices: int) -> int:
        """Optimizer steps of a stage with so many records, as transformers' Trainer counts them."""
        batches = -(-records // (self.batch_size * devices))
        return int(-(-self.epochs * max(1, -(-batches // self.gradient_accumulation)) // 1))


@dataclass
class MethodConfig:
    """How forgetting is fought."""

    method: str = field(
        default="llaca",
        metadata={"help": "a name of --list-methods; configs/methods/NAME.yaml sets its fields"},
    )
    grouping: bool = field(
        default=False, metadata={"help": "share parameters only between tasks with similar instructions"}
    )
    similarity_threshold: float | None = field(
        default=None,
        metadata={"help": "of joining a group; unset: as released, 0.90 for original instructions, else 0.30"},
    )
    group_similarity: Literal["mean", "max"] = field(
        default="mean", metadata={"help": "of a group: mean over all pairs (released, Table 10) or max (the text)"}
    )
    new_group_start: Literal["latest", "fresh"] = field(
        default="latest",
        metadata={"help": "start of a new group: latest parameters (Algorithm 1) or fresh ones (the paper's text)"},
    )
    average: str | None = field(default=None, metadata={"help": "rule of the balance weight beta, see llaca/beta.py"})
    average_start: str | None = field(
        default=None,
        metadata={"help": "stage_start (the paper) or after_first_step (the release); unset: the rule's own"},
    )
    fallback_beta: float | None = field(
        default=None, metadata={"help": "beta where the rule gives none in (0, 1); unset: the rule's own, mostly 0.99"}
    )
    beta: float | None = field(default=None, metadata={"help": "beta of the rule 'fixed'"})
    constant: float | None = field(default=None, metadata={"help": "constant of the rules of the released codes"})
    penalty: float | None = field(
        default=None, metadata={"help": "weight of the term that EWC (lambda) or LwF adds to the loss"}
    )
    consolidation: Literal["online", "per_task"] | None = field(
        default=None, metadata={"help": "EWC: one anchor, the last weights, or one for every task"}
    )
    temperature: float | None = field(default=None, metadata={"help": "of LwF's softmax"})
    memory_records: int | None = field(
        default=None, metadata={"help": "records of each earlier task that replay and A-GEM keep"}
    )
    estimate_records: int | None = field(
        default=None, metadata={"help": "records that a method estimates from after a stage: Fisher, features"}
    )
    merge_weight: float | None = field(default=None, metadata={"help": "of the new weights in CoMA and CoFiMA"})
    keep_share: float | None = field(default=None, metadata={"help": "of the weights that Model Tailor keeps tuned"})
    experts: int | None = field(default=None, metadata={"help": "MoELoRA: experts that share lora_rank"})
    energy: float | None = field(default=None, metadata={"help": "PGP: share of the features' energy to protect"})
    seen_gradient: Literal["clipped", "unclipped"] = field(
        default="clipped",
        metadata={"help": "the gradient the method sees where max_grad_norm clips it: as the step used it, or before"},
    )
    beta_trace: Literal["quantiles", "full"] = field(
        default="quantiles", metadata={"help": "beta.csv: quantiles per step, or full: a row per step and tensor"}
    )
    horizon: float | None = field(
        default=None, metadata={"help": "horizon of the rule 'secant' in stages: its mu_rel is horizon x steps - 1"}
    )


@dataclass
class RunConfig:
    """Where a run goes and what it tells."""

    run: str = field(
        default="",
        metadata={"help": "name of the run, one folder; empty: made from method, recipe, what differs, and seed"},
    )
    runs_dir: str = field(default="runs", metadata={"help": "folder of the run folders"})
    seed: int = field(default=0, metadata={"help": "the run is a function of its recipe and this number, from 0"})
    zero: Literal["none", "0", "1", "2", "3", "3-offload"] = field(
        default="none",
        metadata={"help": "DeepSpeed with scripts/zeroN.json as it is; none: one process, or DDP under torchrun"},
    )
    report_to: Literal["none", "tensorboard", "wandb"] = field(
        default="none", metadata={"help": "where else to log; wandb is offline unless WANDB_MODE says otherwise"}
    )
    loader_workers: int = field(
        default=0, metadata={"help": "processes that read and prepare pictures ahead of the training; 0: none"}
    )
    expected_minutes: float = field(
        default=0.0,
        metadata={"help": "minutes that one run takes on the recipe's hardware, told before it starts"},
    )
    logging_steps: int = field(default=10, metadata={"help": "optimizer steps between two lines of train_log.jsonl"})
    save_steps: int = field(
        default=0,
        metadata={
            "help": "optimizer steps between two checkpoints inside a stage; 0: one only when SIGTERM or SIGINT asks"
        },
    )


SECTIONS = (ModelConfig, StreamConfig, TrainConfig, MethodConfig, RunConfig)


@dataclass
class Recipe:
    """All that determines a run, together with the versions of the code."""

    model: ModelConfig
    stream: StreamConfig
    train: TrainConfig
    method: MethodConfig
    run: RunConfig

    def flat(self) -> dict:
        """Every field by its name, as in a YAML recipe."""
        return {key: value for section in asdict(self).values() for key, value in section.items()}

    @classmethod
    def from_flat(cls, values: dict) -> "Recipe":
        """The inverse of `flat`; a field that the recipe's version did not have yet gets its default."""
        parts = [
            section(**{f.name: values[f.name] for f in fields(section) if f.name in values}) for section in SECTIONS
        ]
        return cls(*parts)

    def for_stage(self, tasks: tuple[str, ...], devices: int = 1) -> TrainConfig:
        """The training section of a stage on so many devices: with a single task, that task's own overrides.

        A `global_batch_size` is kept: each device's share of it goes through in equal micro-batches of at most
        `batch_size` records. Raises ValueError if the devices cannot share it equally.
        """
        own = self.train.per_task.get(tasks[0], {}) if len(tasks) == 1 else {}
        settings = TrainConfig(**{**asdict(self.train), **own})
        if settings.global_batch_size:
            share, rest = divmod(settings.global_batch_size, devices)
            if rest:
                raise ValueError(
                    f"{'+'.join(tasks)}: global_batch_size {settings.global_batch_size} cannot be shared by {devices} "
                    "devices equally; take another number of devices, or another global_batch_size"
                )
            settings.batch_size = max(n for n in range(1, min(settings.batch_size, share) + 1) if share % n == 0)
            settings.gradient_accumulation = share // settings.batch_size
        return settings

    def stage_seed(self, index: int) -> int:
        """The seed of the stage with this index, from 1, with room for the number of an epoch."""
        return 10_000 * self.run.seed + 100 * index

    def check(self) -> "Recipe":
        """Itself. Raises ValueError naming the field whose value cannot be followed."""
        for name, value in self.flat().items():
            value_of(FIELDS[name], value)
        check_name(self.run.run)
        tasks = self.stream.tasks
        if not tasks or len(set(tasks)) != len(tasks):
            raise ValueError(f"tasks: {tasks} must be at least one, each once")
        if self.stage_seed(len(tasks)) >= 2**32:
            largest = (2**32 - 1 - 100 * len(tasks)) // 10_000
            raise ValueError(f"seed: {self.run.seed} is too large; for {len(tasks)} tasks it may be {largest} at most")
        if self.model.quantization != "none" and self.run.zero != "none":
            raise ValueError("a quantized base is for one process or DDP: leave out --zero, or --quantization")
        if self.run.zero == "0" and self.model.dtype == "bfloat16":
            raise ValueError(
                "--zero 0 in bfloat16 trains to other weights than DDP (docs/ENGINES.md): leave --zero out, or take 1"
            )
        return self


FIELDS = {f.name: f for section in SECTIONS for f in fields(section)}
TRAIN_FIELDS = {f.name for f in fields(TrainConfig)} - {"per_task"}


def read_yaml(path: Path) -> dict[str, Any]:
    """One YAML recipe as {field: value}, with `methods` and, of a run's recipe.yaml, `inputs` where it has them.

    Raises ValueError naming the file and the field that is unknown or whose value is of another type.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such recipe; configs/ holds those that ship")
    content, where = read_text(path), f"{path}: "
    methods = mapping("methods", content.pop("methods", {}), where)
    inputs = mapping("inputs", content.pop("inputs", {}), where)
    values = typed(content, path)
    for method, own in methods.items():
        if not (CONFIGS / "methods" / f"{method}.yaml").is_file():
            raise ValueError(f"{path}: methods names '{method}', which is not known; see configs/methods/")
        methods[method] = typed(mapping(f"methods.{method}", own, where), path, f"methods.{method}.")
    return values | ({"methods": methods} if methods else {}) | ({"inputs": inputs} if inputs else {})


def typed(content: dict[str, Any], path: Path, within: str = "") -> dict[str, Any]:
    """Values of fields as the fields' types. Raises ValueError naming `path`, the place `within` it and the field."""
    if unknown := [key for key in content if key not in FIELDS]:
        raise ValueError(f"{path}: unknown field '{unknown[0]}'; `python -m llaca.train --help` lists the known ones")
    where = f"{path}: {within}"
    values = {name: value_of(FIELDS[name], value, where) for name, value in content.items()}
    for task, own in values.get("per_task", {}).items():
        own = mapping(f"per_task.{task}", own, where)
        if unknown := [key for key in own if key not in TRAIN_FIELDS]:
            raise ValueError(f"{where}per_task.{task}: '{unknown[0]}' is no field of the training section")
        values["per_task"][task] = typed(own, path, f"{within}per_task.{task}.")
    return values


def load_recipe(arguments: list[str]) -> Recipe:
    """The recipe that a command line asks for.

    `--recipe FILE` (default: CoIN-mini), then the file of `--method` (or of the recipe's method) and what the recipe's
    `methods` block says of it, then, with `--smoke`, configs/smoke.yaml, then the other `--field value` pairs. A recipe
    that names this very method, as a run's recipe.yaml does, stands above the method's file itself; for another method
    its method's settings do not count.
    Raises ValueError for unknown fields or tasks, and for values that a field cannot have.
    """
    parser = HfArgumentParser(
        SECTIONS, allow_abbrev=False, description="Trains one run: a stream of tasks with one method."
    )
    parser.add_argument("--recipe", type=Path, default=DEFAULT_RECIPE, help="YAML file")
    parser.add_argument("--smoke", action="store_true", help="a few samples a task: the whole pipeline in minutes")
    chooser = ArgumentParser(add_help=False, allow_abbrev=False)
    chooser.add_argument("--recipe", type=Path, default=DEFAULT_RECIPE)
    chooser.add_argument("--method")
    chooser.add_argument("--smoke", action="store_true")
    chooser.add_argument("--average")
    chosen, _ = chooser.parse_known_args(arguments)
    values = read_yaml(chosen.recipe)
    label = "" if chosen.recipe.resolve() == DEFAULT_RECIPE.resolve() else chosen.recipe.stem
    if "inputs" in values:  # a run's recipe.yaml
        label = values.get("run", label)
    method = chosen.method or values.get("method", MethodConfig.method)
    own = CONFIGS / "methods" / f"{method}.yaml"
    if not own.is_file():
        known = ", ".join(sorted(p.stem for p in own.parent.glob("*.yaml")))
        raise ValueError(f"method '{method}' is not known; choose one of {known}")
    spoken = {token.split("=")[0].lstrip("-").replace("-", "_") for token in arguments if token.startswith("--")}
    if values.get("method", method) != method:
        values = without_method(values, chosen.recipe, spoken)
    # What the recipe says of a method stands above the method's own file: only the recipe knows the model's size.
    tuned = values.pop("methods", {}).get(method, {})
    values.pop("inputs", None)
    lower, upper = ({}, values) if values.get("method") == method else (values, {})
    values = {**lower, **read_yaml(own), **upper, **tuned, "method": method}
    if "per_task" in values:  # the command line speaks last
        tasks = values["per_task"].items()
        values["per_task"] = {task: {k: v for k, v in own.items() if k not in spoken} for task, own in tasks}
    if "stream" in spoken and "tasks" not in spoken:
        values.pop("tasks", None)
    if chosen.average:  # what the recipe sets for its own rule is not meant for another one
        values = {key: value for key, value in values.items() if key not in AVERAGE_FIELDS}
    if chosen.smoke:
        values.update(read_yaml(CONFIGS / "smoke.yaml"))
    for action in parser._actions:
        action.required = action.required and action.dest not in values
    parser.set_defaults(**values)
    recipe = Recipe(*parser.parse_args_into_dataclasses(arguments)[: len(SECTIONS)])
    stream, chosen_tasks = recipe.stream, recipe.stream.tasks
    benchmark = open_benchmark(stream.data_root)
    stream.tasks = [benchmark.task(task).name for task in chosen_tasks] or benchmark.stream(stream.stream)
    if not recipe.run.run:
        for action in parser._actions:  # a field without a default is no part of what is usual
            if action.required:
                action.required, action.default = False, recipe.flat()[action.dest]
        parser.set_defaults(**values)
        usual = Recipe(*parser.parse_args_into_dataclasses([])[: len(SECTIONS)])
        if not chosen_tasks:  # the stream's name tells them
            usual.stream.tasks = stream.tasks
        recipe.run.run = run_name(recipe, usual, label, chosen.smoke)
    recipe.train.per_task = by_task(recipe.train.per_task, stream.tasks, benchmark, chosen.recipe)
    return recipe.check()


def without_method(values: dict[str, Any], path: Path, spoken: set[str]) -> dict[str, Any]:
    """A recipe that names a method, for another one: without that method's settings and, of a run, without its name.

    Raises ValueError for a run whose method sets training fields, too: what stood in their place is not known any more.
    """
    frozen, method = "inputs" in values, values["method"]
    settings = {f.name for f in fields(MethodConfig)} | {"run"} if frozen else {*METHOD_FIELDS, "method"}
    own = CONFIGS / "methods" / f"{method}.yaml"
    if frozen and own.is_file() and (theirs := [k for k in read_yaml(own) if k in TRAIN_FIELDS and k not in spoken]):
        raise ValueError(
            f"{path} is of a run with the method {method}, which has a {theirs[0]} of its own: give --{theirs[0]} for "
            "the other method, or the recipe that the run was started from"
        )
    return {key: value for key, value in values.items() if key not in settings}
