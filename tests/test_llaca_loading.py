"""What a rank holds while a base is loaded: 1/N under ZeRO 3 from the first tensor on, no second copy anywhere."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import make_base
from loading_worker import LINE, Peak
from safetensors.torch import load_file, save_file
from test_llaca_engine import ROOT, TORCHRUN

from llaca.config import load_recipe
from llaca.plan import loading, show
from llava.backbones import load_base


def loaded(warmup, base, data, folder, zero: str) -> list[dict]:
    """What each of two ranks tells after loading."""
    out = folder / f"{zero}.json"
    line = [*TORCHRUN, "tests/loading_worker.py", *map(str, (warmup, base, data, out)), zero]
    # glibc gives back at once what is larger than this, so that a peak is of tensors, not of holes between them.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert out.is_file(), done.stderr
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """32 million weights, none of them in a large tensor."""
    return make_base(tmp_path_factory.mktemp("base"), width=512, layers=12)


@pytest.mark.slow
@pytest.mark.parametrize(("zero", "engine"), [("none", "DDP"), ("3", "ZeRO 3"), ("3-offload", "ZeRO 3 offload")])
def test_a_rank_holds_while_loading_what_is_planned(tiny_base, base, tiny_data, tmp_path, zero, engine):
    """And computes the features of pictures to the same bits. Under ZeRO 3 never more than its half and a tensor, where
    it was the whole model. The file is float32 and the model bfloat16: the weights are no pages of the file, and those
    would not be counted."""
    whole = sum(p.nbytes for p in load_base(base, torch.bfloat16, device="meta")[0].parameters())
    planned = sum(loading(load_recipe([*LINE, "--base", str(base)]), 2)[engine])
    ranks = loaded(tiny_base, base, tiny_data, tmp_path, zero)
    for rank in ranks:
        assert rank["frozen"] == pytest.approx(whole if zero == "none" else whole / 2, rel=0.01)
        assert rank["peak"] < 1.12 * planned, rank
    # A thread looks at the memory now and then, and may miss a peak beside other work.
    assert planned == pytest.approx(max(rank["peak"] for rank in ranks), rel=0.12), ranks
    features = torch.load(tmp_path / f"{zero}.json.features")
    model, backbone = load_base(tiny_base, attn_implementation="eager")  # as the recipe has it
    wanted = dict(zip(features, backbone.tower_states(model, list(map(Path, features))), strict=True))
    assert len(features) == 10 and all(torch.equal(found, wanted[name]) for name, found in features.items())


def test_the_host_holds_no_copy_of_weights_that_go_to_another_device(tiny_base, base):
    """The other device is none here: meta keeps nothing, so that all that is seen is the host's."""
    load_base(tiny_base, torch.bfloat16, device="meta")
    peak = Peak()
    model, _ = load_base(base, torch.bfloat16, device="meta")
    assert peak.most - peak.before < sum(p.nbytes for p in model.parameters()) / 4


@pytest.mark.slow
def test_weights_that_do_not_fit_are_refused_on_every_rank_before_they_are_sharded(tiny_base, tiny_data, tmp_path):
    """The loader of shards would take no notice of them."""
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    weights = load_file(base / "model.safetensors")
    save_file({**weights, "stranger.weight": torch.zeros(2)}, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AssertionError) as error:
        loaded(tiny_base, base, tiny_data, tmp_path, "3")
    assert str(error.value).count("do not fit: {'unexpected_keys': ['stranger.weight']}") >= 2


def test_the_plan_says_too_much_where_only_the_loading_does_not_fit(tmp_path, capsys):
    """A short record takes little while it is trained; ZeRO 3 offload then peaks while what trains is whole."""
    recipe = load_recipe(["--recipe", "configs/coin_llava7b.yaml", "--lora_rank", "1024"])
    found = show(recipe, 8, 14.0, 50)
    peak, step = found["loading"]["ZeRO 3 offload"]["gpu"], found["engines"]["ZeRO 3 offload"]["total"]
    assert step < 8e9 < peak < 14e9
    show(recipe, 8, 8.0, 50)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("ZeRO 3 offload")]
    assert rows[0].endswith("fits") and rows[1].endswith("too much")
