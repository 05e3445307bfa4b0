"""Kills runs at chosen moments, types the same command again, and compares what comes out with runs left alone.

    python -m scripts.kills [--times 100] [--engines "one process" "DDP x2" "ZeRO 2 x2" "two hosts"] [--moments ...]
                            [--seed 0] [--work DIR] [--out FILE]

Trains a short stream of CoIN-mini with llaca, a checkpoint every other step, and evaluates it. Every kill is SIGKILL,
to all processes at the same instant or, one in four, to one of them alone, after which the others have to end by
themselves. Several kills hit one run before it may end; then every file that a run makes from its recipe and seed has
to equal the undisturbed run's, byte for byte: adapters before and after the average, what the method hands on,
beta.csv, codebook.json, origin.json, recipe.yaml, answers, scores, matrix.csv, scores.json and metrics.json; of
train_log.jsonl the steps' lines, of stage.json all but time, memory and environment.

Moments are seen by the files that appear, and jittered. The table counts per engine and moment the kills, those after
which the files show that the moment was hit, those with a complete checkpoint to go on from, starts that failed, and
kills whose run ended identical. It exits with 1 if a run differs, a start fails or a process is left behind.
"""

import argparse
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import psutil

PATIENCE = 600  # seconds until something counts as hung
GRACE = 120  # seconds until a survivor gets Ctrl-C: torchrun waits 900 for a host that is gone before it has come
COMMON = ["--method", "llaca", "--grouping", "false", "--tasks", "GQA", "VQAv2", "--max-train-samples", "48"]
COMMON += ["--max-test-samples", "40", "--epochs", "3", "--save-steps", "2", "--logging-steps", "3"]
COMMON += ["--lora-dropout", "0.1"]
NOT_COMPARED = {"seconds", "peak_memory_bytes", "environment"}  # of stage.json
KILLS_A_RUN = 10  # before it may end


class Machine:
    """How a command is started and killed: here, as a session of its own. Another kind of place is a subclass."""

    def start(self, line: list[str], log: Path) -> subprocess.Popen:
        """Starts the command; what it says goes into `log`."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd(), "TQDM_DISABLE": "1"}
        with log.open("w", encoding="utf-8") as file:
            return subprocess.Popen(line, stdout=file, stderr=file, start_new_session=True, env=environment)

    def processes(self, started: subprocess.Popen) -> list[psutil.Process]:
        """All that runs for the command, the command itself first."""
        try:
            top = psutil.Process(started.pid)
            return [top, *top.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def kill(self, started: subprocess.Popen, rng: random.Random) -> str:
        """Kills all of it at one instant, or one process; returns which. Afterwards none is left: RuntimeError else."""
        found = self.processes(started)
        alone = bool(found) and rng.random() < 0.25
        victims = [rng.choice(found)] if alone else found
        for number in (signal.SIGSTOP, signal.SIGKILL):  # stopped first, none sees another one die
            for victim in victims:
                with suppress(psutil.NoSuchProcess):
                    victim.send_signal(number)
        began, interrupted = time.monotonic(), False
        while left := [process for process in found if alive(process)]:
            waited = time.monotonic() - began
            if started.poll() is None and waited > GRACE and not interrupted:
                started.send_signal(signal.SIGINT)
                interrupted = True
            if waited > PATIENCE:
                for process in left:
                    process.kill()
                raise RuntimeError(f"{len(left)} processes were still there {PATIENCE} s after the kill: {left}")
            time.sleep(0.02)
        started.wait()
        return "one" if alone else "all"


def alive(process: psutil.Process) -> bool:
    """Whether it runs still."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # between the two questions
        return False


class TwoHosts(Machine):
    """Trains on two hosts that scripts/two_hosts.py makes of this machine, and evaluates on this one."""

    def start(self, line: list[str], log: Path) -> subprocess.Popen:
        """As Machine's."""
        hosts = [sys.executable, "-m", "scripts.two_hosts", "--"]
        return super().start([*hosts, *line] if "llaca.launch" in line else line, log)


@dataclass
class Engine:
    """Flags of train_continual.sh, and of eval_all.sh; `machine` is where both run."""

    train: list[str]
    evaluate: list[str]
    machine: Machine = field(default_factory=Machine)


ENGINES = {
    "one process": Engine(["--batch-size", "8"], ["--num-gpus", "1"]),
    "DDP x2": Engine(["--launcher", "torchrun", "--num-gpus", "2", "--batch-size", "4"], ["--num-gpus", "2"]),
    "ZeRO 2 x2": Engine(["--num-gpus", "2", "--zero", "2", "--batch-size", "4"], ["--num-gpus", "2"]),
    "two hosts": Engine(
        ["--launcher", "torchrun", "--num-gpus", "1", "--batch-size", "4"], ["--num-gpus", "2"], TwoHosts()
    ),
}


@dataclass
class Moment:
    """`seen(folder, before)`: whether files show that the moment is there, `before` what `seen` gave at the start of
    the command; `hit(folder)`: whether they show, after the kill, that it was met. Seconds to wait at most after it."""

    seen: Callable[[Path], set]
    hit: Callable[[Path], bool]
    jitter: float
    evaluates: bool = False


def files(folder: Path, *patterns: str) -> set[str]:
    """What is there and matches."""
    return {str(path) for pattern in patterns for path in folder.glob(pattern)}


def complete(folder: Path) -> set[str]:
    """The checkpoints to go on from."""
    return files(folder, "stages/*.partial/trainer/*/COMPLETE")


def unfinished(folder: Path) -> set[str]:
    """The checkpoints that are being written."""
    checkpoints = folder.glob("stages/*.partial/trainer/checkpoint-*")
    return {str(path) for path in checkpoints if not (path / "COMPLETE").is_file()}


def ends(folder: Path) -> set[str]:
    """What appears at the end of a stage, until its checkpoints are gone."""
    own = ("adapter", "plain", "stage.json", "codebook.json", "DONE")
    done = {str(path) for path in folder.glob("stages/*/DONE") if not path.parent.name.endswith(".partial")}
    return done | files(folder, *(f"stages/*.partial/{name}" for name in own))


def ending(folder: Path) -> bool:
    """Whether a stage has its adapter and its checkpoints still, or has just got its name."""
    newest = max((path.stat().st_mtime for path in folder.glob("stages/*/DONE")), default=0)
    return any((path / "trainer").is_dir() for path in folder.glob("stages/*") if (path / "adapter").is_dir()) or (
        time.time() - newest < 5
    )


def answered(folder: Path) -> set[str]:
    """Parts of answer files by their size, and what is made of them."""
    parts = {f"{path} {path.stat().st_size}" for path in folder.glob("answers/*/*.part-*") if path.is_file()}
    return parts | files(folder, "answers/*/*.jsonl", "scores/*/*", "*.json", "*.csv", "*.partial")


MOMENTS = {
    "start": Moment(lambda folder: {""}, lambda folder: True, 8.0),
    "inside a stage": Moment(complete, lambda folder: bool(files(folder, "stages/*.partial")), 0.5),
    "checkpoint": Moment(unfinished, lambda folder: bool(unfinished(folder)), 0.03),
    "end of a stage": Moment(ends, ending, 0.05),
    "evaluation": Moment(answered, lambda folder: bool(files(folder, "answers/*/*")), 0.5, evaluates=True),
}


class Runs:
    """The runs of one engine under `work`: an undisturbed one, and others that are killed."""

    def __init__(self, name: str, work: Path, rng: random.Random):
        self.name, self.engine, self.work, self.rng = name, ENGINES[name], work / name.replace(" ", "_"), rng
        self.work.mkdir(parents=True, exist_ok=True)

    def line(self, run: str, evaluates: bool) -> list[str]:
        """The command that is typed again and again."""
        where = ["--runs-dir", str(self.work), "--run", run]
        if evaluates:
            out = ["--out", str(self.work / f"tables-{run}"), "--batch-size", "2"]
            return [sys.executable, "-m", "eval.report", *where, *self.engine.evaluate, *out]
        return [sys.executable, "-m", "llaca.launch", *COMMON, *self.engine.train, *where]

    def end(self, run: str, evaluates: bool) -> bool:
        """Types the command and lets it end; tells whether it did well."""
        log = self.work / f"{run}.log"
        if self.engine.machine.start(self.line(run, evaluates), log).wait(PATIENCE) == 0:
            return True
        print(f"{self.name}, {run} failed:\n{log.read_text()[-3000:]}", file=sys.stderr, flush=True)
        return False

    def kill(self, run: str, moment: Moment) -> dict | None:
        """Types the command and kills it at the moment. None if it ended before: the moment did not come."""
        folder, log = self.work / run, self.work / f"{run}.log"
        before = set() if moment is MOMENTS["start"] else moment.seen(folder)
        started, deadline = (
            self.engine.machine.start(self.line(run, moment.evaluates), log),
            time.monotonic() + PATIENCE,
        )
        # Any of the files of a moment may be the one, not always the first.
        skipped, appeared = self.rng.choice([0, 0, 1, 2, 3]) if before else 0, set()
        while started.poll() is None and len(appeared) <= skipped:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self.name}, {run}: hung\n{log.read_text()[-3000:]}")
            time.sleep(0.005)
            appeared |= moment.seen(folder) - before
        time.sleep(self.rng.uniform(0, moment.jitter))
        if (status := started.poll()) is not None:
            return {"failed": status != 0, "log": log.read_text()[-3000:]} if status else None
        who = self.engine.machine.kill(started, self.rng)
        return {"failed": False, "who": who, "hit": moment.hit(folder), "checkpoint": bool(complete(folder))}


def contents(folder: Path) -> dict[str, bytes]:
    """All that a run makes from its recipe and seed alone."""
    patterns = ("adapter/*", "plain/*", "method.pt", "beta.csv", "codebook.json", "origin.json")
    paths = [path for pattern in patterns for path in folder.glob(f"stages/*/{pattern}")]
    for pattern in ("answers/*/*", "scores/*/*", "matrix.csv", "scores.json", "metrics.json"):
        paths += folder.glob(pattern)
    found = {str(path.relative_to(folder)): path.read_bytes() for path in paths}
    for path in folder.glob("stages/*/stage.json"):
        told = {key: value for key, value in json.loads(path.read_text()).items() if key not in NOT_COMPARED}
        found[str(path.relative_to(folder))] = json.dumps(told).encode()
    for path in folder.glob("stages/*/train_log.jsonl"):
        found[str(path.relative_to(folder))] = b"".join(
            row for row in path.read_bytes().splitlines(keepends=True) if "loss" in json.loads(row)
        )
    recipe = (folder / "recipe.yaml").read_text().splitlines()
    found["recipe.yaml"] = "\n".join(row for row in recipe if not row.startswith("run:")).encode()
    found["stages"] = json.dumps(sorted(path.name for path in folder.glob("stages/*"))).encode()
    return found


def killed_runs(name: str, work: Path, plan: list[str], rng: random.Random, rows: list[dict]) -> None:
    """Kills one engine's runs at the moments of `plan`; adds a row per kill."""
    runs = Runs(name, work, rng)
    whole = runs.end("whole", False) and runs.end("whole", True)
    if not whole:
        raise SystemExit(f"{name}: the undisturbed run failed")
    expected = contents(runs.work / "whole")
    waiting, number = list(plan), 0
    while waiting:
        run, number, own = f"killed-{number}", number + 1, []
        chosen, waiting = waiting[:KILLS_A_RUN], waiting[KILLS_A_RUN:]
        for evaluates in (False, True):
            for moment in [m for m in chosen if MOMENTS[m].evaluates == evaluates]:
                row = runs.kill(run, MOMENTS[moment])
                if row is None:  # the run was over
                    waiting.append(moment)
                    continue
                own.append({"engine": name, "moment": moment, **row})
                who = f", {row['who']}" if "who" in row else f" FAILED\n{row.get('log')}"
                print(f"{name}, {run}: {moment}{who}", file=sys.stderr, flush=True)
            ended = runs.end(run, evaluates)
            if not ended:
                break
        found = contents(runs.work / run) if ended else {}
        differs = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
        if differs:
            print(f"{name}, {run} differs: {differs}", file=sys.stderr, flush=True)
        else:
            shutil.rmtree(runs.work / run)
        rows += [{**row, "identical": not differs} for row in own]


def table(rows: list[dict]) -> str:
    """The summary, as a Markdown table."""
    columns = ("kills", "all at once", "moment hit", "with a checkpoint", "failed starts", "identical")
    lines = ["| engine | moment | " + " | ".join(columns) + " |", "|---|---|" + "---:|" * len(columns)]
    frame = pd.DataFrame(rows)
    for (engine, moment), own in frame.groupby(["engine", "moment"], sort=False):
        who = Counter(own["who"].dropna()) if "who" in own else Counter()
        counts = [len(own), who["all"], *(int(own[key].fillna(False).sum()) for key in ("hit", "checkpoint", "failed"))]
        lines.append(f"| {engine} | {moment} | " + " | ".join(map(str, [*counts, int(own["identical"].sum())])) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=100, help="kills, shared by the engines and the moments")
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=list(ENGINES))
    parser.add_argument("--moments", nargs="+", default=list(MOMENTS), choices=list(MOMENTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="keeps the runs there; default: a temporary folder")
    parser.add_argument("--out", type=Path, help="a Markdown file for the table")
    args = parser.parse_args()
    rng, began, rows = random.Random(args.seed), time.monotonic(), []
    plan = [(args.engines[i % len(args.engines)], args.moments[i // len(args.engines) % len(args.moments)])
            for i in range(args.times)]  # fmt: skip
    try:
        with tempfile.TemporaryDirectory() as folder:
            work = args.work or Path(folder)
            for engine in args.engines:
                moments = [moment for name, moment in plan if name == engine]
                rng.shuffle(moments)
                killed_runs(engine, work, moments, rng, rows)
    finally:  # what was seen is told, whatever came between
        text = table(rows) if rows else ""
        print(text)
    if args.out:
        minutes = (time.monotonic() - began) / 60
        command = shlex.join(["python", "-m", "scripts.kills", *sys.argv[1:]])
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(f"# Kills\n\n`{command}`, {minutes:.0f} minutes, {os.cpu_count()} cores.\n\n{text}")
    if any(row["failed"] or not row["identical"] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
