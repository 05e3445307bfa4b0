"""Does every engine give the same balance weights and average? Trains two short stages of CoIN-mini under each.

    python -m scripts.engines [--rules eq45 eq14 lcia_release] [--engines ...] [--work DIR] [--out FILE]

Two gloo ranks on a CPU for all but the first rows; the same global batches in the same order. Prints, against the
first row: the largest difference of a beta (any step, any tensor), also relative to that beta, with the share of those
beyond 1e-4; the largest relative difference of an averaged tensor (L2 norm); the bytes of average and memory that a
rank keeps; the collectives that the average adds to a step. Exits with 1 if a beta or an average is more than 1e-4
apart.

A beta near 0 is 1 minus a number near 1: its relative difference is the rounding of the gradients magnified. Engines
that add up the same micro-batches in the same way show none; ZeRO 3 and other micro-batches round differently.
"""

import argparse
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors.numpy import load_file

from llaca.config import load_recipe
from llaca.launch import prepare_data

LIMIT = 1e-4
STAGE = "stages/02-VQAv2"
ENGINES = {  # name -> processes, flags of llaca.train
    "one process, accumulation 2": (1, ["--batch-size", "4", "--gradient-accumulation", "2"]),
    "one process": (1, ["--batch-size", "8"]),
    "DDP x2": (2, ["--batch-size", "4"]),
    "ZeRO 0 x2": (2, ["--batch-size", "4", "--zero", "0"]),
    "ZeRO 1 x2": (2, ["--batch-size", "4", "--zero", "1"]),
    "ZeRO 2 x2": (2, ["--batch-size", "4", "--zero", "2"]),
    "ZeRO 2 x2, accumulation 2": (2, ["--batch-size", "2", "--gradient-accumulation", "2", "--zero", "2"]),
    "ZeRO 3 x2": (2, ["--batch-size", "4", "--zero", "3"]),
    "ZeRO 3 offload x2": (2, ["--batch-size", "4", "--zero", "3-offload"]),
}
COMMON = ["--grouping", "false", "--tasks", "GQA", "VQAv2", "--epochs", "1"]
COMMON += ["--loss-normalisation", "global", "--logging-steps", "5"]


def train(work: Path, engines: list[str], rules: list[str], records: int) -> None:
    """All rules under engines of as many processes, with or without DeepSpeed, in one start of the processes; and LoRA
    for the count of collectives."""
    every = ["lora", *rules]
    missing = [engine for engine in engines if not all(count_file(work, engine, rule).is_file() for rule in every)]
    if not missing:
        return
    for engine in missing:
        for rule in every:
            if not count_file(work, engine, rule).is_file():  # a run that goes on would count a part
                shutil.rmtree(work / run_name(engine, rule), ignore_errors=True)
    print(f"{', '.join(missing)} ...", file=sys.stderr, flush=True)
    processes = ENGINES[missing[0]][0]
    module = [__file__, "--worker", *missing, "--work", str(work), "--records", str(records), "--rules", *rules]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "--"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, *(launch if processes > 1 else []), *module], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        sys.exit(f"{', '.join(missing)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")


def work_on(work: Path, engines: list[str], rules: list[str], records: int) -> None:
    """What one process of `train` does; counts the collectives that Python code asks for."""
    import torch.distributed as dist

    from llaca import ranks
    from llaca.train import run

    gc.freeze()  # what the imports left, as llaca.train does
    calls = 0

    def counted(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            return function(*args, **kwargs)

        return call

    for name in ("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "reduce", "broadcast"):
        setattr(dist, name, counted(getattr(dist, name)))
    for engine in engines:
        for rule in ["lora", *rules]:
            if count_file(work, engine, rule).is_file():
                continue
            method = ["lora"] if rule == "lora" else ["llaca", "--average", rule, "--beta-trace", "full"]
            calls = 0
            where = ["--runs-dir", str(work), "--run", run_name(engine, rule), "--max-train-samples", str(records)]
            run(load_recipe([*COMMON, *ENGINES[engine][1], "--method", *method, *where]))
            if ranks.first():
                count_file(work, engine, rule).write_text(str(calls))
    ranks.leave()


def count_file(work: Path, engine: str, rule: str) -> Path:
    """How many collectives a run asked for; written when it is done."""
    return work / f"{run_name(engine, rule)}.collectives"


def run_name(engine: str, rule: str) -> str:
    """The run's folder."""
    return f"{engine}-{rule}".replace(" ", "_").replace(",", "")


def row(work: Path, engine: str, rule: str, reference: str) -> dict:
    """One row of the table."""
    here, there = (work / run_name(name, rule) / STAGE for name in (engine, reference))
    beta, expected = (pd.read_csv(folder / "beta.csv") for folder in (here, there))
    if not beta[["step", "tensor", "fallback"]].equals(expected[["step", "tensor", "fallback"]]):
        raise SystemExit(f"{engine}, {rule}: other steps, tensors or fallbacks than {reference}")
    mine, theirs = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (here, there))
    apart = [np.linalg.norm(mine[name] - theirs[name]) / np.linalg.norm(theirs[name]) for name in theirs]
    story = json.loads((here / "stage.json").read_text())
    difference = (beta["beta"] - expected["beta"]).abs()
    calls, without = (int(count_file(work, engine, name).read_text()) for name in (rule, "lora"))
    return {
        "rule": rule,
        "engine": engine,
        "steps": story["steps"],
        "tensors": len(theirs),
        "fallback %": 100 * beta["fallback"].mean(),
        "beta": difference.max(),
        "relative": (difference / expected["beta"]).max(),
        "beyond 1e-4 %": 100 * (difference > LIMIT * expected["beta"]).mean(),
        "average": max(apart),
        "bytes a rank": story["average_bytes"],
        # the average is gathered once more at the end of the stage, tensor by tensor
        "collectives a step": max(0, calls - without - len(theirs)) / story["steps"],
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rules", nargs="+", default=["eq45", "eq14", "lcia_release"])
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=list(ENGINES))
    parser.add_argument("--records", type=int, default=96, help="of each stage")
    parser.add_argument("--work", type=Path, help="keeps the runs there; a second call does not repeat them")
    parser.add_argument("--out", type=Path, help="a CSV file for the table")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work_on(args.work, args.worker, args.rules, args.records)
    prepare_data(load_recipe([*COMMON, "--method", "lora"]))
    with tempfile.TemporaryDirectory() as folder:
        work = args.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        starts = defaultdict(list)
        for engine in args.engines:
            processes, flags = ENGINES[engine]
            starts[processes, "--zero" in flags].append(engine)
        for engines in starts.values():
            train(work, engines, args.rules, args.records)
        table = pd.DataFrame([row(work, e, rule, args.engines[0]) for rule in args.rules for e in args.engines])
    shown = dict.fromkeys(("beta", "relative", "average"), "{:.1e}".format)
    shown |= {"fallback %": "{:.1f}".format, "beyond 1e-4 %": "{:.2f}".format, "collectives a step": "{:.0f}".format}
    print(table.to_string(index=False, formatters=shown))
    if args.out:
        table.to_csv(args.out, index=False)
    if (worst := table[["beta", "average"]].max().max()) > LIMIT:
        sys.exit(f"the largest difference is {worst:.1e}, beyond {LIMIT:g}")


if __name__ == "__main__":
    main()
