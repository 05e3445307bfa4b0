"""A folder of a generated benchmark: made whole or not at all, with a stamp that says what it is."""

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

STAMP = "made.json"


def is_version(root: Path, benchmark: str, version: int) -> bool:
    """Whether `root` holds this version of a benchmark, of whatever seed."""
    stamp = root / STAMP
    if not stamp.is_file():
        return False
    told = json.loads(stamp.read_text())
    return (told["benchmark"], told["version"]) == (benchmark, version)


def make(root: Path, described: dict[str, Any], fill: Callable[[Path], None]) -> bool:
    """Makes `root` by `fill`, which gets an empty folder, unless exactly what is `described` (benchmark, version, seed
    and more) is there; returns whether it was made.

    Raises FileExistsError if something else is there: it deletes nothing of the user's.
    """
    stamp = root / STAMP
    there = json.loads(stamp.read_text()) if stamp.is_file() else {}
    if there == described:
        return False
    if root.exists():
        named = f"{described['benchmark']} version {described['version']} of seed {described['seed']}"
        other = [key for key, told in described.items() if there.get(key) != told] if there else []
        differs = f" (it differs in {', '.join(other)})" if other else ""
        raise FileExistsError(f"{root} exists and is not {named} as asked for{differs}; move it away")
    partial = Path(tempfile.mkdtemp(prefix=f"{root.name}.partial-", dir=root.parent))
    try:
        fill(partial)
    except BaseException:
        shutil.rmtree(partial)
        raise
    (partial / STAMP).write_text(json.dumps(described, indent=1) + "\n")
    partial.chmod(0o755)
    partial.rename(root)
    return True


def command(description: str, build: Callable[[Path, int], bool], usual: Path) -> None:
    """The command line of what makes a benchmark, in the `usual` folder and of the seed that `build` has, or others."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=usual)
    parser.add_argument("--seed", type=int, help="instead of the one that runs take")
    args = parser.parse_args()
    try:
        made = build(args.out) if args.seed is None else build(args.out, args.seed)
    except OSError as error:
        parser.exit(1, f"{error}\n")
    print(f"{args.out}: {'made' if made else 'already there'}")
