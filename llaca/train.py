"""Trains one run: `python -m llaca.train --method llaca --seed 0`; `--help` lists every field of a recipe.

Walks the stream; every stage starts from a parameter set of the pool, trains it with the method's hooks and puts it
back. After a kill the same command goes on with the first stage that is not DONE, from its last checkpoint or from its
start, and the result is the same, since everything random in a stage comes from the seed and the stage's number.
"""

import gc
import os
import sys
from dataclasses import fields
from pathlib import Path

from data.progress import say
from llaca import ranks
from llaca.config import Recipe, help_of, load_recipe
from llaca.methods import METHODS
from llaca.processes import die_with_launcher, leave_at_once
from llaca.run import Run


def run(recipe: Recipe) -> Path:
    """Train the run of `recipe` as far as it is not done yet, and return its folder. Raises as Run and Run.train do."""
    return Run(recipe).train()


def help_method(names: list[str]) -> str | None:
    """Prints what the named methods are and their settings, from their own files; returns what is wrong with a name."""
    if not names or (unknown := [name for name in names if name not in METHODS]):
        return f"--help-method NAME: {unknown[0] if names else 'no name'}; the methods are {', '.join(METHODS)}"
    for name in names:
        kind = METHODS[name]
        about, _, _ = kind.__doc__.partition("\n\n")
        print(f"{name} ({kind.__module__.replace('.', '/')}.py): {' '.join(about.split())}")
        for one in fields(kind.Settings):
            print(f"  --{one.name} {help_of(one)}")
        for field, value in kind.changes.items():
            print(f"  changes the recipe's default of {field} to {value}")
    return None


def main(arguments: list[str] | None = None) -> None:
    """Command line; `--list-methods` prints the methods, `--help-method NAME` a method's settings."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if "--list-methods" in arguments:
        for name, kind in METHODS.items():
            print(f"{name:14s}{kind.__doc__.partition(chr(10))[0]}")
        return
    if "--help-method" in arguments:
        sys.exit(help_method(arguments[arguments.index("--help-method") + 1 :]))
    leave_at_once()
    die_with_launcher()
    try:
        recipe = load_recipe(arguments)
        gc.freeze()  # accelerate calls the collector at every stage's end: it need not look at what the imports left
        folder = run(recipe)
        ranks.leave()
    except (ValueError, OSError) as error:
        if os.environ.get("LLACA_TRACEBACK"):
            raise
        sys.exit(f"llaca.train: {error}\n(LLACA_TRACEBACK=1 shows where)")
    except RuntimeError as error:
        if os.environ.get("LLACA_TRACEBACK") or not ranks.lost(error):
            raise
        sys.exit(
            f"llaca.train: another process of this run has gone, see its own messages: {error}\n"
            "What is saved is whole; the same command on every host goes on from there"
        )
    say(f"{recipe.run.run}: done, {folder}")


if __name__ == "__main__":
    main()
