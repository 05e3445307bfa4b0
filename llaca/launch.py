"""What train_continual.sh runs: says what is going to happen and how long it takes, checks the data, starts the runs.

Without --method, and with a recipe that names none, it trains LoRA and LLaCA. On a machine without GPU as many runs as
there are cores go side by side, one process of one thread each; with GPUs one run after the other, a process a GPU.
"""

import gc
import os
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import NamedTuple

import torch

from data.benchmark import open_benchmark
from data.check import check_benchmark
from data.mini import build as coin_mini
from data.mini import fourfold, skills, small, small_skills
from data.mini import text_stream as dialog_mini
from llaca import machine
from llaca.config import DEFAULT_RECIPE, Recipe, load_recipe
from llaca.fields import read_text
from llaca.hostfile import USUAL, runner_options
from llaca.methods import METHODS, method_of
from llaca.processes import leave_at_once, run_all
from llava.boxes import check_boxes
from llava.check import reader_of

OTHER_WORK = {"data_root", "stream", "tasks", "base", "epochs", "max_train_samples", "smoke"}  # than a recipe's minutes
DEFAULT_METHODS = ("lora", "llaca")
GENERATED = {
    Path("data/coin_mini"): coin_mini,
    Path("data/coin_mini_fourfold"): fourfold,
    Path("data/coin_mini_skills"): skills,
    Path("data/coin_small"): small,
    Path("data/coin_small_skills"): small_skills,
    Path("data/dialog_mini"): dialog_mini,
}
DEEPSPEED = [sys.executable, "-m", "deepspeed.launcher.runner"]


class Launcher(NamedTuple):
    """How the processes of a run are started: `name` python, torchrun or deepspeed; `own`: that launcher's options.

    processes: of a run, on all hosts together; hosts: host -> its processes, where a hostfile names them.
    """

    name: str
    processes: int
    own: tuple[str, ...] = ()
    hosts: dict[str, int] | None = None

    def line(self, arguments: list[str]) -> list[str]:
        """The command that trains one run."""
        module = ["llaca.train", *arguments]
        if self.name == "python":
            return [sys.executable, "-m", *module]
        if self.name == "torchrun":
            line = [sys.executable, "-m", "torch.distributed.run", *self.own]
            line += ["--shutdown-timeout", "600"]  # seconds for a checkpoint after a signal
            # Several nodes are told apart by the environment that SLURM or a person sets on each of them.
            nodes = ["--nnodes", os.environ.get("NNODES", "1"), "--node-rank", os.environ.get("NODE_RANK", "0")]
            nodes += ["--master-addr", os.environ["MASTER_ADDR"]] if "MASTER_ADDR" in os.environ else []
            nodes += ["--master-port", os.environ["MASTER_PORT"]] if "MASTER_PORT" in os.environ else []
            return [*line, *(nodes if "NNODES" in os.environ else ["--standalone"]), "-m", "--", *module]
        return [*DEEPSPEED, *self.own, "--no_local_rank", "--module", *module]


def choose_launcher(name: str | None, gpus: int | None, hostfile: str | None, zero: str) -> Launcher:
    """The launcher of --launcher, --num-gpus and --hostfile, for a recipe with this `zero`.

    Raises ValueError or FileNotFoundError for what does not fit together.
    """
    here = torch.cuda.device_count()
    if gpus is not None and gpus < 1:
        raise ValueError(f"--num-gpus {gpus}: a run has at least one process")
    processes = gpus or max(1, here)
    if name is None:
        name = (
            "deepspeed" if hostfile is not None else "torchrun" if here or processes > 1 or zero != "none" else "python"
        )
    if hostfile is not None and name != "deepspeed":
        raise ValueError("--hostfile is read by --launcher deepspeed")
    if name == "python" and ((gpus or 1) > 1 or zero != "none"):
        raise ValueError("--launcher python is one process without DeepSpeed: take torchrun or deepspeed")
    if name == "python":
        return Launcher(name, 1)
    if name == "deepspeed" and (hostfile is not None or USUAL.is_file()):
        hosts, own = runner_options(USUAL if hostfile is None else Path(hostfile), gpus)
        return Launcher(name, sum(hosts.values()), tuple(own), hosts)
    if 0 < here < processes:
        raise ValueError(f"--num-gpus {gpus}: this machine shows {here} GPUs")
    if name == "deepspeed":
        return Launcher(name, processes, runner_devices(processes, here))
    nodes = os.environ.get("NNODES", "1")
    if not nodes.isdecimal() or int(nodes) < 1:
        raise ValueError(f"NNODES is {nodes!r} in the environment; it must be the number of nodes")
    return Launcher(name, processes * int(nodes), ("--nproc-per-node", str(processes)))


def runner_devices(processes: int, here: int) -> tuple[str, ...]:
    """What DeepSpeed's runner has to be told to start so many processes on this machine, which shows `here` GPUs.

    Its --num_gpus takes the GPUs 0, 1, ... whatever CUDA_VISIBLE_DEVICES says; without it the runner follows
    CUDA_VISIBLE_DEVICES, or takes all GPUs. Without a GPU it would count NUMA nodes.
    Raises ValueError for a CUDA_VISIBLE_DEVICES that the runner cannot follow.
    """
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if not here or not shown:
        return () if processes == here else ("--num_gpus", str(processes))
    numbers = [number.strip() for number in shown.split(",")]
    if len(numbers) != here or not all(number.isdecimal() for number in numbers):
        raise ValueError(
            f"CUDA_VISIBLE_DEVICES is {shown!r}: DeepSpeed's launcher knows GPUs by their numbers alone, and each must "
            "be there; take --launcher torchrun, or give the numbers"
        )
    return () if processes == here else ("--include", f"localhost:{','.join(numbers[:processes])}")


def commands(arguments: list[str]) -> list[tuple[Recipe, list[str]]]:
    """One (recipe, command line of llaca.train) a method: that of --method or of the recipe, else DEFAULT_METHODS.

    With several methods, the name NAME of --run or of the recipe gives NAME-<method>.
    """
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--method")
    parser.add_argument("--run")
    parser.add_argument("--recipe", type=Path, default=DEFAULT_RECIPE)
    chosen, rest = parser.parse_known_args(arguments)
    if not chosen.recipe.is_file():
        raise FileNotFoundError(f"{chosen.recipe}: no such recipe; configs/ holds those that ship")
    values = read_text(chosen.recipe)
    rest = ["--recipe", str(chosen.recipe), *rest] if chosen.recipe != DEFAULT_RECIPE else rest
    method = chosen.method or values.get("method")
    methods = [method] if method else list(DEFAULT_METHODS)
    name = chosen.run if len(methods) == 1 else chosen.run or values.get("run")
    built = []
    for method in methods:
        line = [*rest, "--method", method]
        if name:
            line += ["--run", name if len(methods) == 1 else f"{name}-{method}"]
        recipe = load_recipe(line)
        method_of(recipe)  # raises now for what the run would refuse
        built.append((recipe, line))
    return built


def prepare_data(recipe: Recipe) -> None:
    """Makes a generated benchmark if the recipe asks for it and it is not there, and checks the recipe's benchmark.

    Raises ValueError with the report of a check that fails, unless the recipe goes on unchecked.
    """
    stream, root = recipe.stream, Path(recipe.stream.data_root)
    for folder in (root, Path(recipe.run.retained)):
        if folder in GENERATED and not GENERATED[folder].is_built(folder):
            GENERATED[folder].build(folder)
    if recipe.run.retained and not Path(recipe.run.retained).is_dir():
        raise FileNotFoundError(f"{recipe.run.retained} is no folder: correct retained, or lay the benchmark there")
    if not Path(stream.data_root).is_dir():
        raise FileNotFoundError(f"{stream.data_root} is no folder: correct data_root, or lay the benchmark there")
    lengths = {task: recipe.for_stage((task,)).max_length for task in stream.tasks}
    reader = reader_of(recipe.model.base, lengths, recipe.method.grouping, recipe.model.options)
    check_boxes(open_benchmark(root), reader.backbone)
    report = check_benchmark(stream.data_root, stream.instructions, stream.tasks, stream.unchecked, reader)
    print(f"{report.records:,} records checked" if report.ok else report.text(), flush=True)


def announce(runs: list[tuple[Recipe, list[str]]], launcher: Launcher, side_by_side: int) -> None:
    """Says what is going to be trained, where it goes, under which engines, and about how long it takes."""
    for recipe, _ in runs:
        stream = recipe.stream
        print(
            f"{recipe.run.runs_dir}/{recipe.run.run}: {recipe.method.method} on {len(stream.tasks)} tasks of "
            f"{stream.data_root}, {stream.order} order, {stream.instructions} instructions, seed {recipe.run.seed}"
        )
        print(f"    works with --zero {', '.join(METHODS[recipe.method.method].engines)} (none: one process or DDP)")
    if launcher.name != "python":
        hosts = ", ".join(f"{count} on {host}" for host, count in (launcher.hosts or {}).items())
        print(f"{launcher.processes} processes a run, started by {launcher.name}{f': {hosts}' if hosts else ''}")
    minutes = max(recipe.run.expected_minutes for recipe, _ in runs) * -(-len(runs) // side_by_side)
    asked = {word.lstrip("-").partition("=")[0].replace("-", "_") for word in runs[0][1] if word.startswith("--")}
    if minutes and not asked & OTHER_WORK:
        print(f"About {minutes:g} minutes of training on the machine that the recipe was written for.")
    sys.stdout.flush()


def main() -> None:
    """Command line: that of llaca.train, where --method may be left out, with --launcher, --num-gpus and --hostfile. A
    smoke run is evaluated, too."""
    leave_at_once()
    gc.freeze()  # else the process looks at what the imports left, when it ends, for a second
    arguments = sys.argv[1:]
    if {"-h", "--help", "--list-methods", "--help-method"} & set(arguments):
        sys.exit(subprocess.call([sys.executable, "-m", "llaca.train", *arguments]))
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--launcher", choices=("python", "torchrun", "deepspeed"))
    parser.add_argument("--num-gpus", type=int)
    parser.add_argument("--hostfile")
    how, arguments = parser.parse_known_args(arguments)
    try:
        runs = commands(arguments)
        launcher = choose_launcher(how.launcher, how.num_gpus, how.hostfile, runs[0][0].engine.zero)
        side_by_side = min(len(runs), machine.side_by_side()) if launcher.name == "python" else 1
        announce(runs, launcher, side_by_side)
        recipe = runs[0][0]
        prepare_data(recipe)
    except (ValueError, OSError) as error:
        if os.environ.get("LLACA_TRACEBACK"):
            raise
        sys.exit(f"train_continual.sh: {error}\n(LLACA_TRACEBACK=1 shows where)")
    status = run_all([launcher.line(line) for _, line in runs], side_by_side)
    if not status and "--smoke" in arguments:
        names = [recipe.run.run for recipe, _ in runs]
        report = [sys.executable, "-m", "eval.report", "--runs-dir", recipe.run.runs_dir, "--run", *names]
        status = run_all([[*report, "--out", f"{recipe.run.runs_dir}/tables/smoke"]], 1)
    sys.exit(status)


if __name__ == "__main__":
    main()
