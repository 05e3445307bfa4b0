"""scripts/gpu_check.py: the parts that a CPU can run, at the size of tiny-llava; what it makes of failures and time."""

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from llava.adapters import attach_lora, trainable_parameters
from llava.backbones import open_backbone
from llava.backbones.llava15 import (
    Llava15,
)
from llava.generate import encode_questions
from scripts import gpu_check
from scripts.random_llava import SIZES, TINY, Context, Records, asked, configuration, random_model

ROOT = Path(__file__).parents[1]
KEYS = {"status", "seconds", "found", "checks", "error"}


def check(*arguments: str) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", "scripts.gpu_check", *arguments]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_every_kind_of_part_goes_through_on_a_cpu(tmp_path):
    """Of the engines those that differ most: tests/test_llaca_engine.py has the others, with two processes."""
    out, engines = tmp_path / "told.json", ("one", "ddp", "2", "3-offload")
    left_out = {f"engine-{name}" for name in gpu_check.ENGINES} - {f"engine-{name}" for name in engines}
    parts = [name for name in gpu_check.PARTS if name not in left_out]
    done = check("--device", "cpu", "--size", "tiny", "--minutes", "20", "--out", str(out), "--parts", *parts)
    told = json.loads(out.read_text())
    assert done.returncode == 0, done.stdout[-5000:]
    assert json.dumps(told) in done.stdout.splitlines() and told["ok"]
    assert list(told["parts"]) == parts
    assert all(set(part) == KEYS and part["status"] == "ok" for part in told["parts"].values())
    assert all(one["ok"] for part in told["parts"].values() for one in part["checks"])
    found = {name: part["found"] for name, part in told["parts"].items()}
    assert found["machine"]["versions"]["torch"] == torch.__version__ and found["machine"]["versions"]["commit"]
    for name in ("step", "step-plain", "nf4"):
        assert found[name]["ratio"] > 0 and found[name]["measured_bytes"] > found[name]["planned_bytes"] > 0
    wanted = {"one": "one process", "ddp": "one process", "3-offload": "DeepSpeed ZeRO 3"}
    for engine in engines:
        here = found[f"engine-{engine}"]["float32"]
        assert here["engine"] == wanted.get(engine, f"DeepSpeed ZeRO {engine}")
        assert 0 < here["beta_fallback_share"] < 1, "both branches of the range rule are compared"
    compared = {f"{engine} float32 {kind}" for engine in engines[1:] for kind in ("averages", "weights")}
    assert set(found["agreement"]) == compared and found["agreement"]["2 float32 averages"] < 1e-5
    assert found["answers"]["same_answers"] == found["answers"]["questions"] == 8
    assert 0.01 < found["nf4"]["logits_off"] < 0.5
    assert found["attention"]["sdpa"]["available"]


def test_without_a_gpu_it_says_so_and_ends_with_2():
    done = check()
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("gpu_check: torch sees no GPU here")
    assert check("--device", "cpu").returncode == 2, "7b is not for a CPU"


def test_what_does_not_fit_into_the_time_is_skipped_and_a_failure_loses_no_other_part(tmp_path, monkeypatch, capsys):
    """`agreement` fails, since no engine has run; what it said is kept."""
    options = Namespace(device="cpu", size="tiny", minutes=5.0, parts=["step", "agreement", "answers"])
    monkeypatch.setitem(gpu_check.PARTS, "answers", (400, 500))
    monkeypatch.setitem(gpu_check.PARTS, "step", (0, 0.2))
    found = gpu_check.run_all(options, tmp_path)
    assert list(found) == options.parts and all(set(part) == KEYS for part in found.values())
    assert found["agreement"]["status"] == "failed"
    assert found["agreement"]["error"].startswith("exit status 1\n")
    assert "no engine has handed on anything to compare" in found["agreement"]["error"]
    assert found["answers"]["status"] == "skipped" and "of 5 minutes were left" in found["answers"]["error"]
    assert found["step"]["status"] == "failed" and found["step"]["error"].startswith("no end after 1 s")
    assert "answers           skipped" in capsys.readouterr().out


def test_a_random_model_has_the_real_ones_tensors_and_no_empty_one():
    config = LlavaConfig.from_pretrained(TINY)
    model = random_model(config, torch.float32, torch.device("cpu"))
    real = LlavaForConditionalGeneration.from_pretrained(TINY)
    shapes = {name: tensor.shape for name, tensor in real.state_dict().items()}
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes
    buffers = dict(model.named_buffers())
    assert all(torch.equal(buffers[name], tensor) for name, tensor in real.named_buffers())
    for name, tensor in model.state_dict().items():
        norm = "norm" in name and name.endswith("weight")
        assert tensor.device.type == "cpu" and (
            torch.equal(tensor, torch.ones_like(tensor)) if norm else tensor.std() < 1
        )
    assert (
        trainable_parameters(attach_lora(model, Llava15, 4, 8, 0.0)).keys()
        == trainable_parameters(attach_lora(real, Llava15, 4, 8, 0.0)).keys()
    )


def test_what_is_asked_at_7b_fits_its_sizes(tmp_path):
    """No CPU runs that, so its processor and records are looked at: 336 pixels, 576 tokens of the picture."""
    size = SIZES["7b"]
    assert size.dtype == torch.bfloat16 and size.batch == 16
    context = Context(torch.device("cpu"), "7b", size, tmp_path)
    config = configuration(size.base, 4)
    placeholder = config.image_token_id  # of a model that is made before anything is asked, too
    backbone, questions, paths = asked(context, config)
    assert placeholder == backbone.placeholder == config.image_token_id
    assert len(questions) == len(paths) == 4 * size.pictures
    pixels = backbone.picture(paths[0])["pixel_values"]
    ids = encode_questions(backbone, questions[:1], paths[:1])[0]
    assert pixels.shape == (3, 336, 336) and ids.count(config.image_token_id) == 576
    item = Records(backbone, 1, size.tokens)[0]
    assert (item["input_ids"] == config.image_token_id).sum() == 576 and len(item["input_ids"]) == 700
    config.text_config.vocab_size = len(backbone.tokenizer)
    backbone.processor.save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    open_backbone(tmp_path)  # raises unless they fit
    assert context.recipe().train.batch_size == 16
    assert context.recipe().for_stage(("GQA",)).gradient_accumulation == 1
