"""What a rank holds while a base is loaded: 1/N under ZeRO 3 from the first tensor on, no second copy anywhere."""

import json
import os
import subprocess

import pytest
import torch
from conftest import make_base
from loading_worker import LINE
from test_llaca_engine import ROOT, TORCHRUN

from llaca.config import load_recipe
from llaca.plan import loading, show
from llava.model import load_base


def loaded(warmup, base, folder, zero: str) -> list[dict]:
    """What each of two ranks tells after loading."""
    out = folder / f"{zero}.json"
    line = [*TORCHRUN, "tests/loading_worker.py", *map(str, (warmup, base, out)), zero]
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
@pytest.mark.parametrize(("zero", "engine"), [("none", "DDP"), ("3", "ZeRO 3"), ("3-offload", "ZeRO 3 offload")])
def test_a_rank_holds_while_loading_what_is_planned(tiny_base, base, tmp_path, zero, engine):
    """Under ZeRO 3 never more than its half and a tensor, where it was the whole model. The file is float32 and the
    model bfloat16: the weights are no pages of the file, which would not be counted."""
    whole = sum(p.nbytes for p in load_base(base, torch.bfloat16, device="meta")[0].parameters())
    planned = sum(loading(load_recipe([*LINE, "--base", str(base)]), 2)[engine])
    for rank in loaded(tiny_base, base, tmp_path, zero):
        assert rank["frozen"] == pytest.approx(whole if zero == "none" else whole / 2, rel=0.01)
        assert planned == pytest.approx(rank["peak"], rel=0.12), rank


def test_the_plan_says_too_much_where_only_the_loading_does_not_fit(tmp_path, capsys):
    """A short record takes little while it is trained; ZeRO 3 offload then peaks while what trains is whole."""
    recipe = load_recipe(["--recipe", "configs/coin_llava7b.yaml", "--lora_rank", "1024"])
    found = show(recipe, 8, 14.0, 50)
    peak, step = found["loading"]["ZeRO 3 offload"]["gpu"], found["engines"]["ZeRO 3 offload"]["total"]
    assert step < 8e9 < peak
    show(recipe, 8, 8.0, 50)
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("ZeRO 3 offload"))
    assert row.endswith("too much")
