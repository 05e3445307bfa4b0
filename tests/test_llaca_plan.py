"""The plan against closed forms, and against the bytes that real steps take."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import make_base
from test_llaca_engine import ROOT, TORCHRUN, work
from text_bases import make_text
from vl_bases import KINDS, make_vl

from llaca.config import CONFIGS, load_recipe
from llaca.ema import DynamicAverage
from llaca.methods import METHODS
from llaca.plan import REDUCE_BUCKET, answering_bytes, average_bytes, base_bytes, blank_of, counts, plan
from llava.adapters import trainable_parameters
from llava.backbones import load_base

SEVEN = ["--recipe", str(CONFIGS / "coin_llava7b.yaml")]


def test_llava_7b_trains_exactly_the_language_models_linears_and_the_projector():
    """The figures of the released adapters; no weights are needed."""
    model = blank_of(load_recipe(SEVEN)).model
    assert counts(model) == {"tensors": 452, "lora": 319_815_680, "connector": 20_979_712}
    lora = [name for name in trainable_parameters(model) if "lora_" in name]
    assert len(lora) == 448 and len({name.split(".lora_")[0] for name in lora}) == 224
    assert not any("vision" in name for name in trainable_parameters(model))


@pytest.mark.parametrize(
    ("recipe", "parameters"),
    [
        ("coin_qwen25vl_7b", 8_292_166_656),
        ("coin_qwen25vl_3b", 3_754_622_976),
        ("coin_qwen3vl_8b", 8_767_123_696),
    ],
)
def test_a_qwen_has_as_many_parameters_as_its_published_weights(recipe, parameters):
    """Of the three Instruct checkpoints, from the configurations that ship with the recipes."""
    model = blank_of(load_recipe(["--recipe", str(CONFIGS / f"{recipe}.yaml"), "--train-connector", "false"])).model
    assert sum(p.numel() for p in model.parameters() if not p.requires_grad) == parameters
    assert counts(model)["connector"] == 0


def test_what_trains_is_the_methods():
    eproj = counts(blank_of(load_recipe([*SEVEN, "--method", "eproj"])).model)
    assert eproj == {"tensors": 4, "lora": 0, "connector": 20_979_712}
    moelora = counts(blank_of(load_recipe([*SEVEN, "--method", "moelora", "--experts", "2"])).model)
    routers = 32 * 2 * (6 * 4096 + 11008)  # two experts, six linears of width 4096 and one of 11008 in 32 layers
    assert moelora["lora"] == 319_815_680 + routers


def test_bytes_of_a_quantized_base_are_those_of_the_loaded_one(tmp_path):
    base = make_base(tmp_path / "base", width=128)
    for kind in ("none", "8bit", "nf4", "nf4-double"):
        line = ["--base", str(base), "--quantization", kind, "--dtype", "float32", "--lora_rank", "4"]
        planned = base_bytes(blank_of(load_recipe(line)), kind)
        model, _ = load_base(base, quantization=kind)
        found = sum(p.nbytes for p in model.parameters())
        for module in model.modules():
            state = getattr(getattr(module, "weight", None), "quant_state", None)
            if state is not None:
                found += state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)
            found += getattr(getattr(module, "weight", None), "SCB", torch.empty(0)).nbytes if kind == "8bit" else 0
        assert planned == pytest.approx(found, rel=0.01), kind


@pytest.mark.parametrize("rule", ["eq45", "eq14", "lcia_release", "secant", "fixed"])
def test_bytes_of_the_average_are_those_that_it_counts_itself(rule):
    recipe = load_recipe(["--method", "llaca", "--average", rule])
    average = DynamicAverage(["a"], [torch.zeros(300)], rule)
    average.step([torch.ones(300)], [torch.ones(300)])
    assert average_bytes(recipe, 300) == average.bytes()


def test_copies_of_the_weights_are_planned():
    """What BEMA holds through a stage, its start and its average, and the average of averaged PGP."""
    method = METHODS["bema"]()
    shards = SimpleNamespace(parameters=[torch.zeros(300)])
    method.before_task(shards, True, 5)
    assert average_bytes(load_recipe(["--method", "bema"]), 300) == sum(t.nbytes for t in method.start + method.average)
    assert average_bytes(load_recipe(["--method", "averaged_pgp"]), 300) == 4 * 300
    assert average_bytes(load_recipe(["--method", "lora"]), 300) == 0


@pytest.mark.slow
def test_planned_bytes_are_those_of_real_steps(tiny_data, tmp_path):
    """All tensors of a process directly after a step, when activations and buffers are gone; of each family."""
    bases = [make_base(tmp_path / "base", width=256), *(make_vl(tmp_path / k, k, width=256) for k in KINDS)]
    bases.append(make_text(tmp_path / "t5", "t5", width=256))
    names = [f"{number}.bytes" for number in range(len(bases))]
    found = work(bases, tiny_data, tmp_path, [sys.executable], {"none": names})
    found |= work(bases, tiny_data, tmp_path, TORCHRUN, {"1": names[:1], "2": names, "3": names})
    for base, name in zip(bases, names, strict=True):
        line = ["--base", str(base), "--method", "llaca", "--average", "eq45", "--lora_rank", "64"]
        recipe = load_recipe([*line, "--dtype", "float32"])
        for zero, engine, gpus in (("none", "DDP", 1), ("1", "ZeRO 1", 2), ("2", "ZeRO 2", 2), ("3", "ZeRO 3", 2)):
            if name not in found[zero]:
                continue
            told = found[zero][name]["bytes"]
            parts = plan(recipe, gpus, 60, "cpu")[engine]
            planned = parts.total - parts.activations - parts.buffers
            told -= 4 * REDUCE_BUCKET if zero == "3" else 0  # the one that stays
            assert planned == pytest.approx(told, rel=0.15), (base, engine, parts)


def test_activations_grow_with_what_makes_them(tmp_path):
    recipe = load_recipe(["--method", "lora"])
    checkpointed = load_recipe(["--method", "lora", "--gradient_checkpointing", "true"])
    one, two, short = (plan(r, 1, t)["DDP"].activations for r, t in ((recipe, 200), (checkpointed, 200), (recipe, 100)))
    assert two < one / 2 and short < one
    half = load_recipe(["--method", "lora", "--batch_size", "8"])
    assert plan(half, 1, 200)["DDP"].activations == pytest.approx(one / 2, rel=0.01)


def test_what_a_question_takes_while_it_is_answered():
    """Keys and values of 32 layers of 4096 in bfloat16, three times 11008 in one layer; two bases of 7.06 billion."""
    recipe = load_recipe(SEVEN)
    models, question = answering_bytes(recipe, blank_of(recipe), 700)
    assert question == 700 * (2 * 32 * 4096 + 3 * 11008) * 2
    assert models == pytest.approx(2 * 2 * 7.06e9, rel=0.01)


@pytest.mark.parametrize(
    ("records", "gpus", "batch", "accumulation", "epochs", "wanted"),
    [(1500, 1, 16, 1, 2.0, 188), (128, 8, 16, 1, 1.0, 1), (129, 8, 16, 1, 1.0, 2), (100, 2, 5, 2, 1.0, 5)],
)
def test_steps(records, gpus, batch, accumulation, epochs, wanted):
    line = ["--batch_size", str(batch), "--gradient_accumulation", str(accumulation), "--epochs", str(epochs)]
    assert load_recipe(line).train.steps(records, gpus) == wanted


def test_the_command_says_what_fits_and_needs_no_weights():
    line = [sys.executable, "-m", "llaca.plan", *SEVEN, "--method", "llaca", "--tokens", "700", "--gpu-memory", "24"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "452 tensors train, 319,815,680 values in LoRA and 20,979,712 in the connector" in done.stdout
    rows = {row[:15].strip(): row for row in done.stdout.splitlines() if row.startswith(("DDP", "ZeRO"))}
    assert rows["DDP"].endswith("too much") and rows["ZeRO 3 offload"].endswith("fits")
    done = subprocess.run([*line, "--base", "nowhere"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode and "nowhere has no config.json" in done.stderr
