"""Every method in the harness: broken off and started again, and in two processes, it gives what one process gives."""

import json
import os
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from test_llaca_train import adapters, arguments, mini  # noqa: F401
from vl_bases import KINDS, make_vl

from eval.report import main as report
from eval.tables import read_matrix
from llaca.config import load_recipe
from llaca.methods import METHODS
from llaca.stream import run_folder
from llaca.train import run
from llava.trainer import StepLog

ROOT = Path(__file__).parents[1]
TRAINED = sorted(set(METHODS) - {"zero_shot"})
TWO = ["--blocks", "2"]  # of a small rank
OWN = {"stacked_lora": TWO, "olora": TWO, "sd_lora": TWO, "pathweave": TWO, "oft": ["--block", "8"],
       "inflora": [*TWO, "--estimate_records", "6"], "keeplora": [*TWO, "--estimate_records", "6"]}  # fmt: skip


def interrupted(monkeypatch, line: list[str], last: int) -> Path:
    """The run of `line`, which ends in an error after so many optimizer steps, and is started again."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    steps, on_step_end = [], StepLog.on_step_end

    def fall(log, *state, **more):
        on_step_end(log, *state, **more)
        steps.append(1)
        if len(steps) == last:
            raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr(StepLog, "on_step_end", fall)
        with pytest.raises(InterruptedError):
            run(load_recipe(line))
    for number, handler in handlers.items():
        signal.signal(number, handler)
    folder = run_folder(load_recipe(line))
    assert list(folder.glob("stages/*.partial/trainer/checkpoint-*/COMPLETE")), "inside a stage"
    return run(load_recipe(line))


@pytest.mark.parametrize("name", TRAINED)
def test_broken_off_inside_the_second_stage_and_started_again_gives_the_same_bytes(arguments, monkeypatch, name):  # noqa: F811
    """Weights, what the method hands on to later stages, and what it tells; with dropout."""
    more = ["--method", name, *OWN.get(name, []), "--tasks", "TextVQA", "GQA", "--save-steps", "2"]
    whole = run(load_recipe([*arguments[:-1], "whole", *more]))
    broken = interrupted(monkeypatch, [*arguments, *more], 6)
    assert adapters(broken) == adapters(whole)
    stages = sorted(path.name for path in whole.glob("stages/*"))
    assert len(stages) == (1 if name == "multi_task" else 2)
    for stage in stages:
        told = [json.loads((folder / "stages" / stage / "stage.json").read_text()) for folder in (whole, broken)]
        for own in told:
            assert own.pop("seconds") > 0 and own.pop("peak_memory_bytes") > 1e8 and own["trained_parameters"] > 0
        assert told[0] == told[1]
        memories = [folder / "stages" / stage / "method.pt" for folder in (whole, broken)]
        assert memories[0].is_file() == memories[1].is_file()
        if memories[0].is_file():
            one, two = (torch.load(path, weights_only=True) for path in memories)
            torch.testing.assert_close(one, two, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_qwen_base_trains_goes_on_and_answers(arguments, tmp_path, monkeypatch, kind):  # noqa: F811
    """Two stages with the average, broken off inside the second; then the matrix of accuracies."""
    base = make_vl(tmp_path / "base", kind)
    more = ["--base", str(base), "--reuse_vision_features", "false", "--method", "llaca", "--grouping", "false"]
    more += ["--tasks", "TextVQA", "GQA", "--save-steps", "1", "--max-pixels", "1024"]
    whole = run(load_recipe([*arguments[:-1], "whole", *more]))
    broken = interrupted(monkeypatch, [*arguments, *more], 5)
    assert adapters(broken) == adapters(whole)
    assert json.loads((whole / "stages" / "02-GQA" / "stage.json").read_text())["averaged"]
    report(["--runs-dir", str(whole.parent), "--run", "whole", "--out", str(tmp_path / "tables")])
    assert np.isfinite(np.tril(read_matrix(whole / "matrix.csv")[0])).all()
    with pytest.raises(ValueError, match=r"reuse_vision_features: .* leave it out"):
        run(load_recipe([*arguments[:-1], "reused", *more, "--reuse_vision_features", "true"]))


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]
HALF = ("agem.bf16", "pgp.bf16", "ewc.bf16")
COMPUTED = ("agem", "bema", "ccfi", "cofima", "coma", "dgg", "discriminant_router", "dsee", "ewc", "l2", "lwf",
            "magmax", "model_tailor", "moelora", "olora", "pgp", "rcl", "reglora", "replay", "sd_lora")  # fmt: skip
CHANGING = ("agem", "discriminant_router", "ewc", "pgp", "rcl")  # gradients, steps, what is added up, and the loss


def work(base: Path, data: Path, out: Path, launch: list[str], methods: dict[str, tuple[str, ...]]) -> dict:
    """What tests/method_worker.py tells of the methods of each engine, in one start: engine -> method -> tensors."""
    asked = [f"{engine}:{name}" for engine, names in methods.items() for name in names]
    line = [*launch, "tests/method_worker.py", str(base), str(data), str(out), *asked]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return {
        engine: {name: torch.load(f"{out}.{engine}.{name}.pt") for name in names} for engine, names in methods.items()
    }


@pytest.fixture(scope="module")
def alone(tiny_base, tiny_data, tmp_path_factory):
    """One process that makes the two processes' micro-batches one after the other."""
    out = tmp_path_factory.mktemp("alone") / "told"
    return work(tiny_base, tiny_data, out, [sys.executable], {"none": COMPUTED})["none"]


@pytest.fixture(scope="module")
def together(tiny_base, tiny_data, tmp_path_factory):
    """What two processes tell under an engine: one start for DDP, one for all of DeepSpeed."""

    @cache
    def start(deepspeed: bool) -> dict:
        methods = {"1": CHANGING, "2": (*COMPUTED, *HALF)} if deepspeed else {"none": COMPUTED}
        return work(tiny_base, tiny_data, tmp_path_factory.mktemp("together") / "told", TORCHRUN, methods)

    return lambda zero: start(zero != "none")[zero]


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["none", "1", "2"])
def test_two_processes_train_as_one(alone, together, zero):
    """Under ZeRO the partitions meet inside a row of a tensor, whose projection takes both ranks."""
    told = together(zero)
    for name in CHANGING if zero == "1" else COMPUTED:
        one, two = alone[name], told[name]
        assert one["moved"] > 0 and two["shown"], "the model computes with the weights that the method wrote"
        for key, weight in one["weights"].items():
            assert (two["weights"][key] - weight).norm() <= 1e-5 * weight.norm(), (name, key)
        for key, weight in one["handed"].items():
            assert (two["handed"][key] - weight).norm() <= 1e-4 * weight.norm(), (name, key)
        assert two["report"] == pytest.approx(one["report"], rel=1e-3)
    routers = (one["discriminant_router"]["router"] for one in (told, alone))
    torch.testing.assert_close(*routers, rtol=1e-4, atol=1e-5)
    assert 0 < alone["agem"]["report"]["projected_share"] < 1
    assert told["pgp"]["cut"] == (0 if zero == "none" else 1)
    for key, energies in alone["pgp"]["energies"].items():
        assert (told["pgp"]["energies"][key] - energies).norm() <= 1e-4 * energies.norm(), key


def test_in_bfloat16_alone(tiny_base, tiny_data, tmp_path):
    """As at 7B under DDP: what methods compute besides the trainer's own passes, they compute in bfloat16, too."""
    names = [f"{name}.bf16" for name in ("agem", "cofima", "ewc", "l2", "lwf", "model_tailor", "pgp")]
    told = work(tiny_base, tiny_data, tmp_path / "told", [sys.executable], {"none": names})["none"]
    for name, one in told.items():
        assert one["moved"] > 0 and all(w.isfinite().all() for w in one["weights"].values()), name
        assert all(w.dtype == torch.float32 for w in one["weights"].values()), name
    assert told["agem.bf16"]["report"]["projected_share"] > 0


@pytest.mark.slow
def test_in_bfloat16_the_model_shows_what_methods_write_into_float32_masters(together):
    """Under ZeRO 2, where the gradients of later parameter groups are joined and cast only when their turn comes."""
    told = together("2")
    for name in HALF:
        one = told[name]
        assert one["moved"] > 0 and one["shown"] and all(w.isfinite().all() for w in one["weights"].values()), name
        assert any(not torch.equal(w, w.bfloat16().float()) for w in one["weights"].values()), "masters are float32"
    assert 0 < told["agem.bf16"]["report"]["projected_share"] <= 1


@pytest.mark.slow
def test_runs_under_zero_2_in_two_processes(arguments, tmp_path):  # noqa: F811
    """Three stages, the third continuing a group, by methods that compute with whole tensors after a stage."""
    names = ("cofima", "model_tailor", "moelora")
    more = ["--grouping", "true", "--zero", "2", "--batch-size", "4"]
    lines = [[*arguments[:-1], name, "--method", name, *more] for name in names]
    script = tmp_path / "runs.py"  # one start of the processes for all
    script.write_text(f"from llaca import ranks\nfrom llaca.config import load_recipe\nfrom llaca.train import run\n"
                      f"for line in {lines}:\n    run(load_recipe(line))\nranks.leave()\n")  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*TORCHRUN, str(script)], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in names:
        told = [json.loads(path.read_text()) for path in sorted(tmp_path.glob(f"runs/{name}/stages/*/stage.json"))]
        assert [own["engine"] for own in told] == ["DeepSpeed ZeRO 2"] * 3
        assert len({own["trained_parameters"] for own in told}) == 1
