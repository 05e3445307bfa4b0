"""A training that stops at any step of any epoch and goes on draws the same records and ends in the same bytes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from resume_worker import CASES

ROOT = Path(__file__).parents[1]
LONG = [name for name in CASES if name != "short"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]


def differences(base, data, folder, launch, zero, *cases) -> dict[str, list[str]]:
    """What tests/resume_worker.py tells."""
    out = folder / "told.json"
    config = ",".join("none" if stage == "none" else f"scripts/zero{stage}.json" for stage in zero)
    line = [*launch, "tests/resume_worker.py", str(base), str(data), str(out), config, *cases]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert out.is_file(), done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.slow
def test_one_process_goes_on_with_the_records_that_are_left(tiny_base, tiny_data, tmp_path):
    found = differences(tiny_base, tiny_data, tmp_path, [sys.executable], ["none"], *LONG)
    assert len(found) == 9 and not any(found.values()), found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("zero", "cases"),
    [
        (["none"], LONG),
        (["0", "1", "2", "3"], ["short"]),
    ],
)
def test_two_processes_go_on_with_the_records_that_are_left(tiny_base, tiny_data, tmp_path, zero, cases):
    """Under DeepSpeed in the middle of each of two epochs, and with micro-batches that are accumulated."""
    found = differences(tiny_base, tiny_data, tmp_path, TORCHRUN, zero, *cases)
    assert len(found) == (8 if "0" in zero else 9) and not any(found.values()), found
