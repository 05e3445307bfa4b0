"""A method's setting chosen before any later task is seen, in the style of Liu et al. (arXiv 2301.05032).

    python -m studies.proxy --method ewc --setting penalty --values 300 3000 30000 [--trials 6] [--recipe FILE]

The records of the stream's first task become a proxy stream of two tasks, which have no answer in common, with a tenth
of each held out. Exp3 draws a value for every trial, which trains both tasks and is worth the final Avg.ACC in [0, 1]:

    p_a = (1 - gamma) w_a / sum w + gamma / n,      w_a <- w_a exp(gamma acc / (n p_a)),      n values

The value with the largest weight is chosen, and the command that trains the whole stream with it is printed. The source
tunes what it distils and how fast it learns anew before every task of a class-incremental stream; here one choice holds
for the stream. No record of a later task, and no development or test record, is read.
"""

import argparse
import json
import math
import os
import random
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from data.benchmark import open_benchmark
from data.records import IMAGE, load_samples, read_list
from eval.predict import answer_share, merge_parts
from eval.runs import open_run
from eval.scored import score_run
from eval.tasks import task_of
from eval.tasks.grounding import Grounding
from llaca.config import DEFAULT_RECIPE, Recipe, load_recipe
from llaca.launch import prepare_data
from llaca.processes import run_all
from llaca.stream import ordered, run_folder
from studies.reproduce import is_done

GAMMA = 0.3
HELD_OUT = 0.1
TASKS = ("First", "Second")


def halves(records: Sequence[dict[str, Any]], seed: int) -> tuple[list[dict], list[dict]]:
    """The training records in two lists of about one size, which share no first answer. Raises ValueError if there is
    only one answer."""
    kinds: dict[str, list[dict]] = {}
    for record in records:
        kinds.setdefault(record["conversations"][1]["value"], []).append(record)
    if len(kinds) < 2:
        raise ValueError("the first task's records all have one answer: there is nothing to divide")
    one, other = [], []
    for kind in random.Random(seed).sample(sorted(kinds), len(kinds)):
        (one if len(one) <= len(other) else other).extend(kinds[kind])
    return one, other


def tested(record: dict[str, Any], box: bool) -> dict[str, Any]:
    """A training record's first turn as a record of a test set."""
    asked, said = (turn["value"] for turn in record["conversations"][:2])
    shown = {"image": record["image"]} if "image" in record else {}
    return {
        "question_id": record["id"],
        **shown,
        "text": asked.replace(IMAGE, "").strip(),
        "answer_bbox" if box else "answer": said,
    }


def write_proxy(recipe: Recipe, root: Path, seed: int) -> None:
    """A benchmark of two tasks from the first task's training records; its pictures are a link to the recipe's. Raises
    DataError for records that cannot be read, ValueError for ones that cannot be divided."""
    stream, benchmark = recipe.stream, open_benchmark(recipe.stream.data_root)
    first = benchmark.task(ordered(stream.tasks, stream.order)[0])
    path = benchmark.folder(stream.instructions, first.name) / first.train
    load_samples(path, benchmark.image_root)  # raises for what the run would
    records = read_list(path)[: stream.max_train_samples or None]
    box = isinstance(task_of(benchmark, first.name), Grounding)
    scoring = "box" if box else "rouge" if first.scoring == "rouge" else "open"
    told = {"scoring": scoring, "instruction": first.instruction, "max_new_tokens": first.max_new_tokens}
    spec = {"name": f"proxy of {first.name}", "images": "pictures", "tasks": {task: dict(told) for task in TASKS}}
    root.mkdir(parents=True)
    (root / "pictures").symlink_to(benchmark.image_root.resolve())
    (root / "benchmark.yaml").write_text(yaml.safe_dump(spec, sort_keys=False), encoding="utf-8")
    for task, own in zip(TASKS, halves(records, seed), strict=True):
        own = random.Random(f"{seed} {task}").sample(own, len(own))
        held = max(1, round(HELD_OUT * len(own)))
        (root / task).mkdir()
        asked = [tested(record, box) for record in own[:held]]
        for name, content in (("train", own[held:]), ("dev", asked), ("test", asked)):
            (root / task / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def probabilities(weights: Sequence[float]) -> list[float]:
    """Exp3's, of drawing each value."""
    total = sum(weights)
    return [(1 - GAMMA) * weight / total + GAMMA / len(weights) for weight in weights]


def choose(options: argparse.Namespace, more: list[str]) -> str:
    """Runs the trials and returns the chosen value."""
    line = ["--recipe", str(options.recipe), "--method", options.method, *more]
    recipe = load_recipe(line)
    root = options.out or Path(recipe.run.runs_dir) / "proxy" / f"{recipe.run.run}-{options.setting}"
    if not (root / "benchmark.yaml").is_file():
        write_proxy(recipe, root, options.seed)
    draw, weights = random.Random(f"{options.seed} Exp3"), [1.0] * len(options.values)
    for trial in range(options.trials):
        chances = probabilities(weights)
        [arm] = draw.choices(range(len(weights)), chances)
        value = options.values[arm]
        own = ["--data-root", str(root), "--runs-dir", str(root / "runs"), "--stream", "", "--order", "original"]
        own += ["--tasks", *TASKS, f"--{options.setting}", value, "--seed", str(trial)]
        asked = load_recipe([*line, *own])
        prepare_data(asked)
        if not is_done(asked) and (status := run_all([[sys.executable, "-m", "llaca.train", *line, *own]], 1)):
            sys.exit(status)
        done = open_run(run_folder(asked))
        answer_share([done], 0, 1)
        merge_parts([done])
        accuracy = score_run(done)["Avg.ACC"]
        weights[arm] *= math.exp(GAMMA * accuracy / 100 / (len(weights) * chances[arm]))
        print(f"trial {trial + 1}: {options.setting} {value}, Avg.ACC {accuracy:.1f} on the proxy stream", flush=True)
    told = zip(options.values, probabilities(weights), strict=True)
    print("probabilities:", ", ".join(f"{value} {chance:.2f}" for value, chance in told))
    return options.values[max(range(len(weights)), key=weights.__getitem__)]


def main(given: list[str] | None = None) -> None:
    """Command line; what it does not know goes to every trial and to the printed command."""
    parser = argparse.ArgumentParser(
        prog="python -m studies.proxy", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--method", required=True)
    parser.add_argument("--setting", required=True, help="a field of a recipe or of the method, as penalty")
    parser.add_argument("--values", nargs="+", required=True)
    parser.add_argument("--trials", type=int, default=6)
    parser.add_argument("--recipe", type=Path, default=DEFAULT_RECIPE)
    parser.add_argument("--seed", type=int, default=0, help="of the proxy stream and of the draws")
    parser.add_argument("--out", type=Path, help="folder of the proxy stream and its runs; default: below runs/proxy")
    options, more = parser.parse_known_args(given)
    try:
        value = choose(options, more)
    except (ValueError, OSError) as error:
        if os.environ.get("LLACA_TRACEBACK"):
            raise
        sys.exit(f"studies.proxy: {error}\n(LLACA_TRACEBACK=1 shows where)")
    line = ["--recipe", str(options.recipe), "--method", options.method, f"--{options.setting}", value, *more]
    print(f"bash train_continual.sh {shlex.join(line)}")


if __name__ == "__main__":
    main()
