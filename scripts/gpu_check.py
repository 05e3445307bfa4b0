"""What a machine's GPU gives: step times and memory at 7B, engines, averages, answers. Needs no weights and no data.

    bash scripts/gpu_check.sh [--out FILE] [--minutes 8] [--parts NAME ...]
    python -m scripts.gpu_check                              the same, in an environment of your own
    bash scripts/gpu_check.sh --device cpu --size tiny       the parts that a CPU can run, at the size of tiny-llava

Every part (scripts/gpu_parts.py) runs in a process of its own with a time limit of its own. The parts come in the order
of their worth; what no longer fits into --minutes is skipped. All that was found goes into one JSON file: --out, else
$OUT/gpu_check.json, else runs/gpu_check.json.

    device, size, versions, seconds, ok
    parts   name -> status (ok, failed, skipped), seconds, found, checks [name, value, limit, ok], error (last lines)

Exits with 1 if a part failed or a check is beyond its limit (a part that is skipped is no failure), with 2 where there
is no GPU to check.
"""

import argparse
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import groupby
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENGINES = ("one", "ddp", "0", "1", "2", "3", "3-offload")
# name -> (least seconds that are worth a start, seconds at most)
PARTS = {
    "machine": (5, 90),
    "step": (30, 150),
    "average": (10, 90),
    **{f"engine-{name}": (10, 120) for name in ENGINES},
    "agreement": (5, 90),
    "answers": (20, 120),
    "step-plain": (30, 150),
    "nf4": (20, 150),
    "attention": (10, 90),
}
CPU_PATIENCE = 6  # times as long: DeepSpeed compiles there, perhaps beside other work
LINES = 15  # of a failure that are kept


def end(process: BaseProcess) -> None:
    """Ends a part that has run out of time: kindly first, since one that compiles holds a lock that others wait for."""
    for number, patience in ((signal.SIGINT, 10), (signal.SIGKILL, None)):
        if process.exitcode is None:
            with suppress(ProcessLookupError):  # before it is a group of its own, or when it has just ended
                os.killpg(process.pid, number)
            process.join(patience)


def starter(device: str) -> BaseContext:
    """What starts the parts' processes: anew for a GPU, since CUDA does not follow a fork, and on a CPU from a process
    that has the libraries loaded."""
    if device == "cuda":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["scripts.gpu_parts", "llaca.train", "llava.trainer", "peft"])
    return context


def perform(*given) -> None:
    """In the part's own process: all that it needs is imported there."""
    from scripts import gpu_parts

    gpu_parts.perform(*given)


def run_part(name: str, options: argparse.Namespace, work: Path, seconds: float) -> dict:
    """What one part's process found, or how it failed."""
    out, log, start = work / f"{name}.json", work / f"{name}.log", time.monotonic()
    log.touch()
    process = starter(options.device).Process(target=perform, args=(name, options.device, options.size, work, log))
    process.start()
    try:
        process.join(seconds)
        status, error = process.exitcode, None
        if status is None:
            error = f"no end after {seconds:.0f} s"
    finally:
        end(process)
    told = {"status": "failed", "seconds": round(time.monotonic() - start, 1), "found": None, "checks": []}
    if status == 0:
        return {**told, **json.loads(out.read_text()), "status": "ok", "error": None}
    last = log.read_text(errors="replace").splitlines()[-LINES:]
    return {**told, "error": "\n".join([error or f"exit status {status}", *last])}


def run_all(options: argparse.Namespace, work: Path) -> dict[str, dict]:
    """Every part that fits into the time, in order; the engines, which are small, side by side."""
    # One GPU alone: several would share the batches.
    gpu = "" if options.device == "cpu" else os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    os.environ |= {"TQDM_DISABLE": "1", "CUDA_VISIBLE_DEVICES": gpu}
    os.chdir(ROOT)
    deadline, found = time.monotonic() + 60 * options.minutes, {}
    chosen = [name for name in PARTS if not options.parts or name in options.parts]

    def one(name: str) -> None:
        (least, most), left = PARTS[name], deadline - time.monotonic()
        most *= CPU_PATIENCE if options.device == "cpu" else 1
        if left < least:
            reason = f"{max(left, 0):.0f} s of {options.minutes:g} minutes were left"
            found[name] = {"status": "skipped", "seconds": 0.0, "found": None, "checks": [], "error": reason}
        else:
            found[name] = run_part(name, options, work, min(left, most))
        show(name, found[name])

    for engines, names in groupby(chosen, key=lambda name: name.startswith("engine-")):
        with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if engines else 1) as pool:
            list(pool.map(one, names))
    return {name: found[name] for name in chosen}


def show(name: str, part: dict) -> None:
    """One part, for a reader."""
    print(f"{name:18s}{part['status']:8s}{part['seconds']:6.1f} s", flush=True)
    for key, value in (part["found"] or {}).items():
        print(f"    {key}: {json.dumps(value)}")
    for check in part["checks"]:
        verdict = "within" if check["ok"] else "BEYOND"
        print(f"    {verdict}: {check['name']} {check['value']:.3g}, at most {check['limit']:g}")
    if part["error"]:
        print("    " + part["error"].replace("\n", "\n    "))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--size", choices=["7b", "tiny"], default="7b")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), help="only these")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            print("gpu_check: torch sees no GPU here; --device cpu --size tiny runs what a CPU can", file=sys.stderr)
            sys.exit(2)
    elif options.size != "tiny":
        print("gpu_check: --device cpu is for --size tiny", file=sys.stderr)
        sys.exit(2)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        parts = run_all(options, Path(work))
    good = all(part["status"] != "failed" and all(check["ok"] for check in part["checks"]) for part in parts.values())
    versions = ((parts.get("machine") or {}).get("found") or {}).get("versions")
    told = {"device": options.device, "size": options.size, "versions": versions}
    told |= {"seconds": round(time.monotonic() - start, 1), "ok": good, "parts": parts}
    out = options.out or Path(os.environ.get("OUT", ROOT / "runs")) / "gpu_check.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(told, indent=1) + "\n")
    print(json.dumps(told))
    skipped = sum(part["status"] == "skipped" for part in parts.values())
    print(f"{'all is well' if good else 'NOT all is well'}{f', {skipped} parts skipped' * bool(skipped)}; {out}")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
