"""How long a run takes to start at CoIN's size, and the memory that its data take: `python -m benchmarks.start`.

    [--share S]    of CoIN's 569,000 training records and 261,000 questions (default: 1)
    [--old DIR]    a checkout of another version of this project, measured beside this one: with it, the ratios
    [--ranks N ..] how many processes then read together, once for each number, from the cache that is there
    [--work DIR]   where the benchmark is drawn and kept (default: a temporary folder)
    [--out FILE]   the figures as JSON

A start is what happens before the first optimizer step: the check of train_continual.sh, then the reading of the
training records of all eight tasks as llaca.train does, down to datasets that hand out batches. Measured in a process
of its own, its libraries loaded: seconds, bytes of private memory that the data keep (RssAnon after less before), and
the peak of the whole process. The first start has an empty cache, the second finds what the first one left. The
base is checkpoints/tiny-llava, whose tokenizer is small: a text has more tokens with it than with Vicuna's.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.coin_size import SIZES, build

ROOT = Path(__file__).parents[1]
PROBE = """
import gc, json, sys, time
from pathlib import Path
from llaca import ranks
from llaca.config import load_recipe
from llaca.methods import method_of
from llaca.stream import stages_of

def memory(key):
    lines = dict(line.split(":") for line in open("/proc/self/status"))
    return 1024 * int(lines[key].split()[0])

recipe, checked = load_recipe(sys.argv[2:]), sys.argv[1] == "check"
ranks.start()
if checked:
    from llaca.launch import prepare_data
    start = time.perf_counter()
    prepare_data(recipe)
    told = {"seconds": time.perf_counter() - start}
else:
    try:
        from llava.backbones import load_base
        from llaca.records import load_stream, stage_datasets, stage_wordings
        whole, backbone = load_base(recipe.model.base)
    except ImportError:  # versions of before
        from llava.model import load_base
        try:
            from llaca.records import load_stream, stage_datasets, stage_wordings
            from llaca.student import Student
        except ImportError:  # commit 4bcd032
            from llaca.train import Student, load_stream, stage_datasets, stage_wordings
        whole, processor = load_base(recipe.model.base)
        backbone = Student(whole, processor, {}, None)
    stages = stages_of(recipe, False, Path("."))
    gc.collect()
    before, start = memory("RssAnon"), time.perf_counter()
    records = load_stream(recipe)
    stage_wordings(recipe, stages, records)
    datasets = stage_datasets(recipe, stages, records, backbone)
    told = {"seconds": time.perf_counter() - start}
    items = [dataset[i] for dataset in datasets.values() for i in (0, len(dataset) - 1)]
    gc.collect()
    told |= {"memory": memory("RssAnon") - before, "records": sum(map(len, datasets.values())),
             "sum": sum(int(item["input_ids"].sum() + item["labels"].sum()) for item in items)}
told["peak"] = memory("VmHWM")
print("PROBE " + json.dumps(told), flush=True)
if hasattr(ranks, "leave"):
    ranks.leave()
"""


def probe(checkout: Path, what: str, data: Path, cache: Path, ranks: int = 1) -> dict:
    """The figures of one process of the project in `checkout`: `what` is check or train. Of several `ranks` each figure
    is the largest."""
    line = ["--data-root", str(data), "--base", str(ROOT / "checkpoints/tiny-llava"), "--method", "llaca"]
    line += ["--dtype", "float32", "--runs-dir", str(cache / "runs")]
    environment = {**os.environ, "PYTHONPATH": str(checkout), "LLACA_CACHE": str(cache), "TQDM_DISABLE": "1"}
    script = cache / "probe.py"
    script.write_text(PROBE, encoding="utf-8")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, str(script), what, *line]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{checkout}: {done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    found = [json.loads(row[6:]) for row in done.stdout.splitlines() if row.startswith("PROBE ")]
    if len(found) != ranks or len({row["sum"] for row in found if "sum" in row}) > 1:
        sys.exit(f"{checkout}: {len(found)} of {ranks} processes told what they read, or not the same: {found}")
    return {key: max(row[key] for row in found) for key in found[0]}


def start(checkout: Path, data: Path, cache: Path) -> dict:
    """One start: the launcher's check and the run's own reading."""
    check, train = (probe(checkout, what, data, cache) for what in ("check", "train"))
    return train | {"check": check["seconds"], "total": check["seconds"] + train["seconds"]}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.start", description=__doc__.splitlines()[0])
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--old", type=Path)
    parser.add_argument("--ranks", type=int, nargs="+", default=[])
    parser.add_argument("--work", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary)).resolve()
        data = work / f"coin-{options.share:g}"
        build(data, options.share)
        found: dict[str, dict] = {}
        for name, checkout in (("this version", ROOT), ("the old one", options.old)):
            if checkout is None:
                continue
            with tempfile.TemporaryDirectory(dir=work) as cache:
                for note in data.glob(".checked-*"):  # where older versions noted that a benchmark is whole
                    note.unlink()
                for number in ("first", "second"):
                    found[f"{name}, {number} start"] = row = start(checkout.resolve(), data, Path(cache))
                    print(
                        f"{name}, {number} start: {row['total']:.1f} s (check {row['check']:.1f}, reading "
                        f"{row['seconds']:.1f}), data keep {row['memory'] / 1e6:.0f} MB of memory, peak of the "
                        f"process {row['peak'] / 1e9:.2f} GB; {row['records']:,} records",
                        flush=True,
                    )
                for count in options.ranks if checkout is ROOT else ():
                    found[f"{name}, {count} ranks"] = row = probe(ROOT, "train", data, Path(cache), count)
                    print(
                        f"{count} ranks: reading {row['seconds']:.1f} s, data keep at most "
                        f"{row['memory'] / 1e6:.1f} MB of a rank's memory, its peak {row['peak'] / 1e9:.2f} GB",
                        flush=True,
                    )
        if options.old:
            for number in ("first", "second"):
                new, old = (found[f"{name}, {number} start"] for name in ("this version", "the old one"))
                if new["sum"] != old["sum"] or new["records"] != old["records"]:
                    sys.exit("the two versions make other tokens of these records")
                print(
                    f"{number} start: {old['total'] / new['total']:.1f} times as fast, reading alone "
                    f"{old['seconds'] / new['seconds']:.1f}; memory of the data 1/{old['memory'] / new['memory']:.0f}"
                )
        if options.out:
            told = {"share": options.share, "counts": SIZES, "starts": found}
            options.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
