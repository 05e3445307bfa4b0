"""Memory that a table takes with one run and with many: `python -m benchmarks.table [--runs 1 23]`.

Trains a short run of CoIN-mini, copies its folder, and lets eval.report answer, score and tabulate so many copies
in one process. Told is the peak of its resident memory: what grows with the runs shows as a difference.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from llaca.config import load_recipe
from llaca.launch import prepare_data
from llaca.train import run

LINE = ["--method", "llaca", "--tasks", "GQA", "VQAv2", "--max-train-samples", "64", "--max-test-samples", "100"]
PEAK = "import resource, subprocess, sys; status = subprocess.call(sys.argv[1:]); "
PEAK += "print('PEAK', resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(status)"


def peak(folder: Path, names: list[str]) -> float:
    """MB of resident memory that the largest process of a table of these runs holds at most."""
    report = [sys.executable, "-m", "eval.report", "--runs-dir", str(folder), "--num-gpus", "1", "--run", *names]
    line = [sys.executable, "-c", PEAK, *report, "--out", str(folder / f"table-{len(names)}")]
    done = subprocess.run(line, capture_output=True, text=True, env={**os.environ, "TQDM_DISABLE": "1"})
    if done.returncode:
        sys.exit(done.stdout[-2000:] + done.stderr[-4000:])
    return int(done.stdout.split("PEAK")[1]) * 1024 / 1e6


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, nargs="+", default=[1, 23])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        recipe = load_recipe([*LINE, "--runs-dir", str(folder), "--run", "trained"])
        prepare_data(recipe)
        trained = run(recipe)
        for count in options.runs:
            names = [f"copy-{count}-{number}" for number in range(count)]
            for name in names:
                shutil.copytree(trained, folder / name)
                text = (folder / name / "recipe.yaml").read_text(encoding="utf-8")
                (folder / name / "recipe.yaml").write_text(text.replace("run: trained", f"run: {name}"), "utf-8")
            print(f"{count} runs: {peak(folder, names):.0f} MB at most", flush=True)


if __name__ == "__main__":
    main()
