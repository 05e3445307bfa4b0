"""What tests/test_llaca_hosts.py runs in two processes.

python tests/hosts_worker.py alike RECIPE RUNS OUT     what start_alike and together raise; OUT.RANK gets them as JSON
python tests/hosts_worker.py silent OUT                waits for the other process for ever; OUT.RANK: it has begun
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from llaca import hosts, ranks
from llaca.config import load_recipe


def raised(act) -> str:
    """The message of the error, or the result."""
    try:
        return repr(act())
    except (ValueError, OSError) as error:
        return f"{type(error).__name__}: {error}"


def alike(recipe: str, runs: str) -> dict[str, str]:
    """One difference after the other, of the second process."""
    line, second = ["--recipe", recipe, "--runs-dir", runs, "--method", "lora"], ranks.rank() == 1
    told = {"same": raised(lambda: hosts.start_alike(load_recipe(line)))}
    ranks.wait()
    told["left"] = str(list(Path(runs).glob("*")))
    told["seed"] = raised(lambda: hosts.start_alike(load_recipe([*line, "--seed", str(ranks.rank())])))
    usual = hosts.environment, hosts.checksum, hosts.run_folder
    if second:
        hosts.environment = lambda: {**usual[0](), "peft": "0.0.1"}
    told["version"] = raised(lambda: hosts.start_alike(load_recipe(line)))
    hosts.environment = usual[0]
    if second:
        hosts.checksum = lambda path: "another" if path.parent.name == "GQA" else usual[1](path)
    told["data"] = raised(lambda: hosts.start_alike(load_recipe(line)))
    hosts.checksum = usual[1]
    if second:
        hosts.run_folder = lambda recipe: Path(runs) / "not shared"
    told["folder"] = raised(lambda: hosts.start_alike(load_recipe(line)))
    told["result"] = raised(lambda: hosts.together(ranks.rank))

    def fail():
        if second:
            raise FileNotFoundError("train.json is missing")

    told["together"] = raised(lambda: hosts.together(fail))
    return told


def main() -> None:
    what, *given, out = sys.argv[1:]
    ranks.start()
    if what == "alike":
        Path(f"{out}.{ranks.rank()}").write_text(json.dumps(alike(*given)))
        ranks.leave()
        return
    hosts.BEAT, hosts.SILENCE = 0.2, 3.0
    hosts.heartbeat()
    Path(f"{out}.{ranks.rank()}").touch()
    dist.recv(torch.zeros(1), src=1 - ranks.rank())


if __name__ == "__main__":
    main()
