"""The recipe: its sections (llaca/sections.py) and the settings of its method, from a YAML file, then the command line.

`python -m llaca.train --help` lists every field with its meaning and default, `--help-method NAME` a method's settings;
YAML files hold overrides only.
"""

from argparse import SUPPRESS, ArgumentParser
from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from data.benchmark import open_benchmark
from llaca.fields import declared, expected, mapping, read_text, value_of
from llaca.methods import METHODS
from llaca.names import by_task, check_name, run_name
from llaca.sections import (
    FIELDS,
    SECTIONS,
    TRAIN_FIELDS,
    EngineConfig,
    MethodConfig,
    ModelConfig,
    RunConfig,
    StreamConfig,
    TrainConfig,
)

CONFIGS = Path(__file__).parents[1] / "configs"
DEFAULT_RECIPE = CONFIGS / "coin_mini.yaml"


SETTINGS = {f.name for method in METHODS.values() for f in fields(method.Settings)}


@dataclass
class Recipe:
    """All that determines a run, together with the versions of the code. `settings` are those of the method."""

    model: ModelConfig
    stream: StreamConfig
    train: TrainConfig
    method: MethodConfig
    engine: EngineConfig
    run: RunConfig
    settings: Any

    def flat(self) -> dict:
        """Every field by its name, as in a YAML recipe."""
        return {key: value for section in asdict(self).values() for key, value in section.items()}

    @classmethod
    def from_flat(cls, values: Mapping[str, Any]) -> "Recipe":
        """The inverse of `flat`; a field that the recipe's version did not have yet gets its default."""
        settings = METHODS[values.get("method", MethodConfig.method)].Settings
        parts = [
            section(**{f.name: values[f.name] for f in fields(section) if f.name in values})
            for section in (*SECTIONS, settings)
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
        """Return this recipe. Raises ValueError naming the field whose value cannot be followed."""
        known = fields_of(self.method.method)
        for name, value in self.flat().items():
            value_of(known[name], value)
        check_name(self.run.run)
        tasks = self.stream.tasks
        if not tasks or len(set(tasks)) != len(tasks):
            raise ValueError(f"tasks: {tasks} must be at least one, each once")
        if self.stage_seed(len(tasks)) >= 2**32:
            largest = (2**32 - 1 - 100 * len(tasks)) // 10_000
            raise ValueError(f"seed: {self.run.seed} is too large; for {len(tasks)} tasks it may be {largest} at most")
        if self.model.quantization != "none" and self.engine.zero != "none":
            raise ValueError("a quantized base is for one process or DDP: leave out --zero, or --quantization")
        if self.engine.zero == "0" and self.model.dtype == "bfloat16":
            raise ValueError(
                "--zero 0 in bfloat16 trains to other weights than DDP (docs/ENGINES.md): leave --zero out, or take 1"
            )
        return self


def fields_of(method: str) -> dict[str, Field]:
    """Every field of a recipe with this method, the method's settings among them."""
    return FIELDS | {f.name: f for f in fields(METHODS[method].Settings)}


def check_method(method: str) -> str:
    """Return the method's name. Raises ValueError for one that is not known."""
    if method not in METHODS:
        raise ValueError(f"method '{method}' is not known; choose one of {', '.join(sorted(METHODS))}")
    return method


def not_its_own(method: str, name: str) -> str:
    """What to say of a setting that another method has."""
    own = [f.name for f in fields(METHODS[method].Settings)]
    return f"method {method} has no {name}: it has {', '.join(own) or 'no settings of its own'}"


def read_yaml(path: Path, method: str) -> dict[str, Any]:
    """One YAML recipe as {field: value}, with `methods` and, of a run's recipe.yaml, `inputs` where it has them.

    Settings in it are those of the method that it names, else of `method`. Raises ValueError naming the file and the
    field that is unknown or whose value is of another type.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such recipe; configs/ holds those that ship")
    content, where = read_text(path), f"{path}: "
    methods = mapping("methods", content.pop("methods", {}), where)
    inputs = mapping("inputs", content.pop("inputs", {}), where)
    if "method" in content:
        method = value_of(FIELDS["method"], content["method"], where)
    values = typed(content, path, method)
    for name, own in methods.items():
        if name not in METHODS:
            raise ValueError(f"{path}: methods names '{name}', which is not known; --list-methods lists the known ones")
        methods[name] = typed(mapping(f"methods.{name}", own, where), path, name, f"methods.{name}.")
    return values | ({"methods": methods} if methods else {}) | ({"inputs": inputs} if inputs else {})


def typed(content: dict[str, Any], path: Path, method: str, within: str = "") -> dict[str, Any]:
    """Values of fields as the fields' types. Raises ValueError naming `path`, the place `within` it and the field."""
    where, known, values = f"{path}: {within}", fields_of(check_method(method)), {}
    for name, value in content.items():
        if name in known:
            values[name] = value_of(known[name], value, where)
        elif name not in SETTINGS:
            raise ValueError(f"{path}: unknown field '{name}'; `python -m llaca.train --help` lists the known ones")
        elif value is not None:  # a run of an older version wrote every method's settings, empty ones
            raise ValueError(f"{where}{not_its_own(method, name)}")
    for task, own in values.get("per_task", {}).items():
        own = mapping(f"per_task.{task}", own, where)
        if unknown := [key for key in own if key not in TRAIN_FIELDS]:
            raise ValueError(f"{where}per_task.{task}: '{unknown[0]}' is no field of the training section")
        values["per_task"][task] = typed(own, path, method, f"{within}per_task.{task}.")
    return values


def parser_of(method: str) -> ArgumentParser:
    """The command line of a recipe with this method; what is not given is not in its namespace, values are texts."""
    parser = ArgumentParser(
        prog="llaca.train",
        usage="%(prog)s [--recipe FILE] [--method NAME] [--FIELD VALUE ...]",
        description="Trains one run: a stream of tasks with one method.",
        epilog="--list-methods: the methods; --help-method NAME: a method's settings",
        allow_abbrev=False,
    )
    parser.add_argument("--recipe", type=Path, default=DEFAULT_RECIPE, help="YAML file (default: CoIN-mini's)")
    parser.add_argument("--smoke", action="store_true", help="a few samples a task: the whole pipeline in minutes")
    for section in (*SECTIONS, METHODS[method].Settings):
        own = section in SECTIONS
        title = section.__name__.removesuffix("Config").lower() if own else f"method {method}"
        text = section.__doc__ if own else METHODS[method].__doc__
        group = parser.add_argument_group(title, (text or "").strip().partition("\n")[0])
        for one in fields(section):
            if (kind := declared(one)) is dict:
                continue  # YAML only
            names = dict.fromkeys((f"--{one.name}", f"--{one.name.replace('_', '-')}"))
            shape = {"nargs": "+"} if kind is list or str(kind).startswith("list") else {}
            if kind is bool:
                shape = {"nargs": "?", "const": "true"}
            group.add_argument(*names, dest=one.name, default=SUPPRESS, metavar="VALUE", help=help_of(one), **shape)
    return parser


def is_needed(one: Field) -> bool:
    """Whether a field has no default."""
    return one.default is one.default_factory is MISSING


def help_of(one: Field) -> str:
    """What --help says of a field: its meaning, what it takes, its default."""
    default = "" if is_needed(one) else f"; default: {default_of(one)}"
    return f"{one.metadata['help']} ({expected(one)}{default})".replace("%", "%%")


def default_of(one: Field) -> Any:
    """A field's default, none for an empty one."""
    value = one.default if one.default_factory is MISSING else one.default_factory()
    return "none" if value in (None, "", [], {}) else value


def load_recipe(arguments: list[str]) -> Recipe:
    """The recipe that a command line asks for.

    `--recipe FILE` (default: CoIN-mini), then what the method changes of it and what the recipe's `methods` block says
    of the method, then, with `--smoke`, configs/smoke.yaml, then the other `--field value` pairs. A recipe that names
    this very method, as a run's recipe.yaml does, stands above what the method changes; for another method its method's
    settings do not count.
    Raises ValueError for unknown fields or tasks, and for values that a field cannot have.
    """
    chooser = ArgumentParser(add_help=False, allow_abbrev=False)
    chooser.add_argument("--recipe", type=Path, default=DEFAULT_RECIPE)
    chooser.add_argument("--method")
    chosen, _ = chooser.parse_known_args(arguments)
    values = read_yaml(chosen.recipe, chosen.method or MethodConfig.method)
    method = check_method(chosen.method or values.get("method", MethodConfig.method))
    given, unknown = parser_of(method).parse_known_args(arguments)
    for token in unknown:
        if (name := token.split("=")[0].lstrip("-").replace("-", "_")) in SETTINGS:
            raise ValueError(not_its_own(method, name))
    if unknown:
        raise ValueError(
            f"unknown option {unknown[0]}; `python -m llaca.train --help` lists a recipe's, "
            f"`--help-method {method}` those of the method"
        )
    spoken = vars(given)
    path, smoke = spoken.pop("recipe"), spoken.pop("smoke")
    label = "" if path.resolve() == DEFAULT_RECIPE.resolve() else path.stem
    if values.pop("inputs", None) is not None:  # a run's recipe.yaml
        label = values.get("run", label)
        values = without_method(values, path, method, spoken, frozen=True)
    else:
        values = without_method(values, path, method, spoken, frozen=False)
    # What the recipe says of a method stands above the method's own file: only the recipe knows the model's size.
    tuned, kind = values.pop("methods", {}).get(method, {}), METHODS[method]
    lower, upper = ({}, values) if values.get("method") == method else (values, {})
    values = {**lower, **kind.changes, **upper, **tuned, "method": method}
    if "per_task" in values:  # the command line speaks last
        tasks = values["per_task"].items()
        values["per_task"] = {task: {k: v for k, v in own.items() if k not in spoken} for task, own in tasks}
    if "stream" in spoken and "tasks" not in spoken:
        values.pop("tasks", None)
    for name, others in kind.belongs_to.items():  # what the recipe sets beside one value is not meant for another
        if name in spoken:
            values = {key: value for key, value in values.items() if key not in others}
    if smoke:
        values.update(read_yaml(CONFIGS / "smoke.yaml", method))
    known = fields_of(method)
    told = values | {name: value_of(known[name], text) for name, text in spoken.items()}
    for name, one in known.items():
        if is_needed(one) and name not in told:
            raise ValueError(f"{name}: a recipe needs it; give --{name}, or a line in {path}")
    recipe = Recipe.from_flat(told)
    usual = Recipe.from_flat({name: told[name] for name, one in known.items() if is_needed(one)} | values)
    stream, chosen_tasks = recipe.stream, recipe.stream.tasks
    benchmark = open_benchmark(stream.data_root)
    stream.tasks = [benchmark.task(task).name for task in chosen_tasks] or benchmark.stream(stream.stream)
    if not recipe.run.run:
        if not chosen_tasks:  # the stream's name tells them
            usual.stream.tasks = stream.tasks
        recipe.run.run = run_name(recipe, usual, label, smoke)
    recipe.train.per_task = by_task(recipe.train.per_task, stream.tasks, benchmark, path)
    return recipe.check()


def without_method(
    values: dict[str, Any], path: Path, method: str, spoken: Mapping[str, Any], frozen: bool
) -> dict[str, Any]:
    """A recipe for this method: if it names another one, without that method's settings and, of a run (`frozen`),
    without its name.

    Raises ValueError for a run whose method sets training fields, too: what stood in their place is not known any more.
    """
    theirs = values.get("method", method)
    if theirs == method:
        return values
    settings = {f.name for f in fields(MethodConfig)} | {"run"} if frozen else {"method"}
    settings |= {f.name for f in fields(METHODS[theirs].Settings)}
    changed = [name for name in METHODS[theirs].changes if name in TRAIN_FIELDS and name not in spoken]
    if frozen and changed:
        raise ValueError(
            f"{path} is of a run with the method {theirs}, which has a {changed[0]} of its own: give --{changed[0]} "
            "for the other method, or the recipe that the run was started from"
        )
    return {key: value for key, value in values.items() if key not in settings}
