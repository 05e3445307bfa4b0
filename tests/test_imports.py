"""Importing the packages is light: nothing that is optional comes along."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for room in ("llava", "llaca", "eval", "data")
    for path in (ROOT / room).rglob("*.py")
)


def test_no_module_imports_what_is_optional():
    """transformers' own Trainer brings bitsandbytes in; nothing imports the two modules that need it early."""
    modules = [module for module in MODULES if module not in ("llava.trainer", "llaca.callbacks")]
    code = f"import sys\nfor m in {modules}: __import__(m)\nprint(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    heavy = {"deepspeed", "bitsandbytes", "wandb"} & set(loaded.stdout.split())
    assert not heavy


def test_what_stands_between_a_launcher_and_its_runs_starts_at_once():
    code = "import sys, llaca.processes\nprint(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert not {"torch", "transformers"} & set(loaded.stdout.split())


def test_the_trainer_does_not_import_deepspeed_or_wandb():
    code = "import sys, llava.trainer\nprint(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert not {"deepspeed", "wandb"} & set(loaded.stdout.split())
