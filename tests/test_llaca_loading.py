"""What a rank holds while a base is loaded: 1/N under ZeRO 3 from the first tensor on, no second copy anywhere."""

import json
import os
import subprocess

import pytest
import torch
from conftest import make_base
from test_llaca_engine import ROOT, TORCHRUN

from llava.model import load_base


def loaded(warmup, base, folder, zero: str, dtype: str) -> list[dict]:
    """What each of two ranks tells after loading."""
    out = folder / f"{zero}-{dtype}.json"
    line = [*TORCHRUN, "tests/loading_worker.py", *map(str, (warmup, base, out)), zero, dtype]
    # glibc gives back at once what is larger than this, so that a peak is of tensors, not of holes between them.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert out.is_file(), done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """32 million weights, none of them in a large tensor."""
    return make_base(tmp_path_factory.mktemp("base"), width=512, layers=12)


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["3", "3-offload"])
def test_under_zero_3_no_rank_ever_holds_more_than_its_half(tiny_base, base, tmp_path, zero):
    """The file is float32 and the model bfloat16: the weights are no pages of the file, which would not be counted."""
    whole = sum(p.nbytes for p in load_base(base, torch.bfloat16, device="meta")[0].parameters())
    for rank in loaded(tiny_base, base, tmp_path, zero, "bfloat16"):
        assert rank["frozen"] == pytest.approx(whole / 2, rel=0.01)
        assert rank["frozen"] < rank["peak"] - rank["trained"] < 0.65 * whole, rank
