"""Whole runs on a random base: what a stage hands on, same seed same bytes, killed and started again."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_base
from safetensors.torch import load_file

from data.mini import build
from data.records import DataError
from eval.report import main as report
from eval.tables import read_matrix
from llaca.config import load_recipe
from llaca.stream import only_one
from llaca.train import run

TASKS = ["ScienceQA", "TextVQA", "GQA"]


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    root = tmp_path_factory.mktemp("benchmark") / "mini"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "SIZES", {"train": 24, "dev": 4, "test": 6})
        build.build(root)
    return root


def three_stages(folder: Path, base: Path, data: Path) -> list[str]:
    """A command line for a run of three small stages in a folder; the run's name comes last."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"base: {base}\ndata_root: {data}\ntasks: [{', '.join(TASKS)}]\nlora_rank: 4\nlora_alpha: 8\n"
        "lora_dropout: 0.1\ndtype: float32\nattention: eager\nreuse_vision_features: true\n"
        "gradient_checkpointing: false\nbatch_size: 8\nlearning_rate: 1.0e-2\nmax_new_tokens: 4\n"
    )
    return ["--recipe", str(recipe), "--runs-dir", str(folder / "runs"), "--run", "r"]


@pytest.fixture
def arguments(tmp_path, tiny_base, mini):
    return three_stages(tmp_path, tiny_base, mini)


def adapters(folder: Path) -> dict[str, bytes]:
    files = sorted(folder.glob("stages/*/adapter/*")) + sorted(folder.glob("stages/*/plain/*.safetensors"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def command(arguments: list[str]) -> list[str]:
    return [sys.executable, "-m", "llaca.train", *arguments]


def test_the_average_stands_between_the_start_of_the_stage_and_its_trained_weights(arguments):
    """beta near 0 hands on the trained weights, beta near 1 the start of the stage; plain/ keeps what was trained."""
    found = {}
    for beta in ("1e-7", "0.9999999"):
        line = [*arguments[:-1], f"beta{beta}", "--method", "fixed_ema", "--beta", beta, "--fallback-beta", beta]
        stages = run(load_recipe(line)) / "stages"
        where = ("01-ScienceQA/adapter", "02-TextVQA/plain", "02-TextVQA/adapter")
        found[beta] = [load_file(stages / path / "adapter_model.safetensors") for path in where]
    start, plain, averaged = found["1e-7"]
    for name in plain:
        np.testing.assert_allclose(averaged[name], plain[name], atol=1e-6)
    assert any(abs(plain[name] - start[name]).max() > 1e-3 for name in plain)
    start, plain, averaged = found["0.9999999"]
    for name in plain:
        np.testing.assert_allclose(averaged[name], start[name], atol=1e-5)


def test_released_projector_reset_is_an_option(arguments):
    """Nothing moves at a learning rate of zero: stage 2 begins with stage 1's projector, or with a random one."""
    still = ["--learning_rate", "0", "--projector_learning_rate", "0", "--method", "lora"]
    for reset in ("false", "true"):
        line = [*arguments, *still, "--legacy_projector_reset", reset, "--run", f"reset-{reset}"]
        folders = sorted((run(load_recipe(line)) / "stages").iterdir())
        first, second = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in folders[:2])
        for name, tensor in first.items():
            assert torch.equal(tensor, second[name]) == (reset == "false" or "multi_modal_projector" not in name), name
    weight = second["base_model.model.model.multi_modal_projector.linear_2.weight"]
    assert weight.abs().max() <= weight.shape[1] ** -0.5  # torch's own bound for a new layer


def test_a_quantized_base_is_trained_upon_and_answers(arguments, tmp_path, capsys):
    base = make_base(tmp_path / "wide", width=64)
    line = [*arguments, "--base", str(base), "--quantization", "nf4", "--method", "llaca"]
    folder = run(load_recipe(line))
    report(["--runs-dir", str(folder.parent), "--run", folder.name, "--out", str(tmp_path / "tables")])
    assert np.isfinite(np.tril(read_matrix(folder / "matrix.csv")[0])).all()


def test_llaca_run_tells_its_story(arguments):
    folder = run(load_recipe([*arguments, "--method", "llaca"]))
    stories = [json.loads((s / "stage.json").read_text()) for s in sorted(folder.glob("stages/*"))]
    assert [s["start"] for s in stories] == [None, "01-ScienceQA", "02-TextVQA"]
    assert [s["averaged"] for s in stories] == [False, False, True]  # only GQA joins a group, TextVQA's
    beta = pd.read_csv(folder / "stages" / "03-GQA" / "beta.csv")
    assert list(beta["step"]) == [1, 2, 3] and beta["fallback_share"][0] == 1  # no previous gradient at the first step
    assert stories[2]["beta_fallback_share"] == pytest.approx(beta["fallback_share"].mean(), rel=1e-4)
    logs = [json.loads(line) for line in (folder / "stages/03-GQA/train_log.jsonl").read_text().splitlines()]
    assert logs[-1]["step"] == 3


def test_the_full_trace_has_a_row_per_step_and_tensor_and_the_log_its_median(arguments):
    line = ["--method", "llaca", "--grouping", "false", "--tasks", "TextVQA", "GQA"]
    folder = run(load_recipe([*arguments, *line, "--beta-trace", "full", "--logging-steps", "1"]))
    stage = folder / "stages" / "02-GQA"
    beta, weights = pd.read_csv(stage / "beta.csv"), load_file(stage / "adapter" / "adapter_model.safetensors")
    assert list(beta.columns) == ["step", "tensor", "beta", "fallback"] and len(beta) == 3 * len(weights)
    assert beta.groupby("step")["tensor"].nunique().tolist() == [len(weights)] * 3
    assert (beta.loc[beta["step"] == 1, ["beta", "fallback"]] == [0.99, 1]).all(axis=None)
    logs = [json.loads(text) for text in (stage / "train_log.jsonl").read_text().splitlines()]
    logged = {log["step"]: (log["beta_median"], log["beta_fallback_share"]) for log in logs if "loss" in log}
    for step, rows in beta.groupby("step"):
        assert logged[step] == pytest.approx((rows["beta"].median(), rows["fallback"].mean()), rel=1e-6)
    saved = ["--save-steps", "1", "--logging-steps", "2"]  # checkpoints in between take nothing from the log
    folder = run(load_recipe([*arguments[:-1], "saved", *line, "--beta-trace", "full", *saved]))
    logs = [json.loads(text) for text in (folder / "stages/02-GQA/train_log.jsonl").read_text().splitlines()]
    both = next(log["beta_median"] for log in logs if log["step"] == 2)
    assert both == pytest.approx(beta.loc[beta["step"] <= 2, "beta"].median(), rel=1e-6)
    quantiles = run(load_recipe([*arguments[:-1], "q", *line])) / "stages" / "02-GQA" / "beta.csv"
    medians = pd.read_csv(quantiles)["beta_q50"]
    assert medians.tolist() == pytest.approx(beta.groupby("step")["beta"].median().tolist(), rel=1e-6)


def test_same_seed_same_bytes_and_other_seed_other_bytes(arguments):
    first, again, other = (
        adapters(run(load_recipe([*arguments[:-1], name, "--method", "llaca", "--seed", seed])))
        for name, seed in (("a", "0"), ("b", "0"), ("c", "1"))
    )
    assert first == again
    weights = "stages/01-ScienceQA/adapter/adapter_model.safetensors"
    assert first[weights] != other[weights]


@pytest.mark.slow
def test_killed_and_typed_again_gives_the_same_adapters_and_matrix(arguments, tmp_path):
    whole = run(load_recipe([*arguments[:-1], "whole", "--method", "llaca"]))
    line = [*arguments[:-1], "killed", "--method", "llaca"]
    killed = tmp_path / "runs" / "killed"
    process = subprocess.Popen(command(line), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=Path.cwd())
    while not (killed / "stages" / "02-TextVQA.partial").exists() and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    assert process.wait() != 0
    assert not (killed / "stages" / "03-GQA" / "DONE").exists()
    subprocess.run(command(line), check=True, capture_output=True)
    assert adapters(killed) == adapters(whole)
    for name in ("whole", "killed"):
        report(["--runs-dir", str(tmp_path / "runs"), "--run", name])
    answers = [sorted((f / "answers").rglob("*.jsonl")) for f in (whole, killed)]
    assert [p.read_bytes() for p in answers[0]] == [p.read_bytes() for p in answers[1]] and len(answers[0]) == 4
    assert (whole / "matrix.csv").read_bytes() == (killed / "matrix.csv").read_bytes()


@pytest.mark.slow
def test_killed_at_random_moments_inside_the_stages(arguments, tmp_path):
    """A checkpoint after every step, so that many kills hit one being written. LLACA_KILLS sets their number."""
    more = ["--method", "llaca", "--grouping", "false", "--epochs", "3", "--save-steps", "1"]
    whole = run(load_recipe([*arguments[:-1], "whole", *more]))
    line, killed = command([*arguments[:-1], "killed", *more]), tmp_path / "runs" / "killed"
    rng, resumed = random.Random(0), 0

    def complete():
        return set(killed.glob("stages/*.partial/trainer/checkpoint-*/COMPLETE"))

    for kill in range(int(os.environ.get("LLACA_KILLS", 2))):
        before = complete()
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, bufsize=1)
        seen = ""
        while "step/s" not in seen and process.poll() is None:
            seen += process.stderr.read(1)
        if kill % 2:
            time.sleep(rng.uniform(0, 1.5))
        else:  # however slow the machine is: soon after a checkpoint
            while not complete() - before and process.poll() is None:
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.wait()
        resumed += bool(complete())
    assert resumed > 0, "no kill left a checkpoint to go on from"
    subprocess.run(line, check=True, capture_output=True)
    assert adapters(killed) == adapters(whole)
    for stage in sorted(whole.glob("stages/*")):
        other = killed / "stages" / stage.name
        assert (stage / "codebook.json").read_bytes() == (other / "codebook.json").read_bytes()
        assert not (other / "trainer").exists()
        if (stage / "beta.csv").exists():
            assert (stage / "beta.csv").read_bytes() == (other / "beta.csv").read_bytes()


@pytest.mark.slow
def test_a_signal_saves_and_the_next_start_goes_on_from_there(arguments, tmp_path):
    line = [*arguments[:-1], "r", "--method", "llaca", "--grouping", "false", "--epochs", "40", "--tasks", "GQA"]
    folder = tmp_path / "runs" / "r"
    process = subprocess.Popen(command(line), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    log = folder / "stages" / "01-GQA.partial" / "train_log.jsonl"
    while not log.exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM and "the same command goes on" in told
    (complete,) = folder.glob("stages/*.partial/trainer/*/COMPLETE")
    step = json.loads(complete.read_text())["step"]
    assert 10 <= step < 120
    with pytest.raises(ValueError, match="written by 2 processes"):
        complete.write_text(json.dumps({**json.loads(complete.read_text()), "processes": 2}))
        run(load_recipe(line))
    complete.write_text(json.dumps({**json.loads(complete.read_text()), "processes": 1, "seconds": 1000.0}))
    run(load_recipe(line))
    story = json.loads((folder / "stages/01-GQA/stage.json").read_text())
    assert story["seconds"] > 1000 and story["steps"] == 120
    logged = [json.loads(row)["step"] for row in (folder / "stages/01-GQA/train_log.jsonl").read_text().splitlines()]
    assert logged == sorted(logged) and logged[-1] == 120


WATCH = """
import json, sys, weakref
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from llaca import run
from llaca.config import load_recipe
load, seen = run.load_adapted, []
def watched(*given):
    alive = [reference for reference in seen if reference() is not None]
    assert not alive, f"{len(alive)} of {len(seen)} weights of the stages before are still in memory"
    adapted = load(*given)
    frozen = [p for p in adapted.model.parameters() if not p.requires_grad]
    assert {hasattr(p, "ds_id") for p in frozen} == {given[0].engine.zero == "3"}, "loaded in shards, every time"
    seen.extend(weakref.ref(parameter) for parameter in adapted.model.parameters())
    return adapted
run.load_adapted = watched
for line in json.loads(sys.argv[1]):
    run.Run(load_recipe(line)).train()
    unset_hf_deepspeed_config()
print(f"watched {len(seen)}")
"""


@pytest.mark.slow
def test_under_deepspeed_the_model_of_a_stage_goes_before_the_next_comes(arguments, tmp_path):
    """A GPU may have no room for two 13B bases. One rank, which holds all of a tensor, but flat, trains as without.
    All runs in one process."""
    cases = [("0", "llaca"), ("2", "lwf"), ("2", "pgp"), ("3", "llaca")]
    script = tmp_path / "watch.py"
    script.write_text(WATCH)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", "--", str(script)]
    more = ["--grouping", "false", "--tasks", "ScienceQA", "GQA"]
    lines = {(zero, method): ["--method", method, *more] for zero, method in cases}
    runs = [[*arguments[:-1], f"{method}-{zero}", *line, "--zero", zero] for (zero, method), line in lines.items()]
    around = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    done = subprocess.run([*launch, json.dumps(runs)], capture_output=True, text=True, env=around)
    assert done.returncode == 0 and "watched" in done.stdout, done.stderr[-2000:]
    for (zero, method), line in lines.items():
        folders = [
            tmp_path / "runs" / f"{method}-{zero}",
            run(load_recipe([*arguments[:-1], f"{method}-plain", *line])),
        ]
        for stage in ("01-ScienceQA", "02-GQA"):
            found, wanted = (load_file(f / "stages" / stage / "adapter" / "adapter_model.safetensors") for f in folders)
            for name, tensor in wanted.items():
                torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_pictures_that_workers_read_ahead_are_the_same(arguments, mini):
    line = ["--method", "lora", "--tasks", "GQA", "--reuse_vision_features", "false", "--loader_workers"]
    found = [adapters(run(load_recipe([*arguments[:-1], f"w{n}", *line, str(n)]))) for n in (0, 2)]
    assert found[0] == found[1]


def test_report_of_all_kinds_of_run(arguments, tmp_path, capsys):
    for method in ("lora", "llaca", "multi_task", "zero_shot"):
        run(load_recipe([*arguments[:-1], method, "--method", method]))
    report(["--runs-dir", str(tmp_path / "runs")])
    printed = capsys.readouterr().out
    for label in ("lora", "llaca (eq45) + grouping", "multi_task", "zero_shot", "Question-only majority"):
        assert f"\n{label}" in printed
    A, stages, tasks = read_matrix(tmp_path / "runs" / "lora" / "matrix.csv")
    assert tasks == TASKS and stages == ["01-ScienceQA", "02-TextVQA", "03-GQA"]
    assert np.isnan(A[np.triu_indices(3, 1)]).all() and not np.isnan(A[np.tril_indices(3)]).any()
    assert read_matrix(tmp_path / "runs" / "zero_shot" / "matrix.csv")[0].shape == (1, 3)
    metrics = json.loads((tmp_path / "runs" / "llaca" / "metrics.json").read_text())
    assert set(metrics) == {"Avg.ACC", "Forgetting", "New.ACC", "MAA", "BWT", "per_task"}
    assert (tmp_path / "runs" / "tables" / "table.tex").is_file()
    # ScienceQA's parameters are untouched by the other groups: one answer file serves three cells.
    assert len(list((tmp_path / "runs" / "llaca" / "answers").rglob("ScienceQA.jsonl"))) == 1
    assert len(list((tmp_path / "runs" / "lora" / "answers").rglob("ScienceQA.jsonl"))) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record.update(image="TextVQA/train/none.png"), "none.png"),
        (lambda record: record["conversations"].pop(), "alternate"),
        (lambda record: record["conversations"][1].update(value=" "), "answer 1 is empty"),
    ],
    ids=["missing image", "no answer", "empty answer"],
)
def test_a_broken_record_of_the_last_task_stops_before_the_first_is_trained(arguments, mini, change, message):
    path = mini / "Instructions" / "GQA" / "train.json"
    good = path.read_text()
    records = json.loads(good)
    change(records[7])
    try:
        path.write_text(json.dumps(records))
        with pytest.raises(DataError, match=r"GQA/train\.json") as error:
            run(load_recipe([*arguments, "--method", "lora"]))
    finally:
        path.write_text(good)
    assert message in str(error.value) and "record 7" in str(error.value)
    assert not Path(arguments[3]).exists(), "a run that cannot start leaves nothing behind"


def test_an_unknown_task_is_named(arguments):
    with pytest.raises(ValueError, match="'Cooking' is not known"):
        run(load_recipe([*arguments, "--method", "lora", "--tasks", "GQA", "Cooking"]))


def test_a_run_refuses_another_recipe_other_data_and_a_second_process(arguments, mini):
    line = [*arguments, "--method", "lora", "--tasks", "TextVQA"]
    folder = run(load_recipe(line))
    assert run(load_recipe(line)) == folder
    with pytest.raises(ValueError, match=r"learning_rate: 0.01 there, 0.5 now"):
        run(load_recipe([*line, "--learning-rate", "0.5"]))
    path = mini / "Instructions" / "TextVQA" / "train.json"
    good = path.read_text()
    try:
        path.write_text(good + " ")
        with pytest.raises(
            ValueError, match=r"TextVQA/train.json \(the training records of TextVQA\) has changed since"
        ):
            run(load_recipe(line))
    finally:
        path.write_text(good)
    with (
        only_one(folder),
        pytest.raises(BlockingIOError, match="another process trains this run"),
        only_one(folder, 0.2),
    ):
        pass


def test_report_of_a_run_that_is_not_complete(arguments, tmp_path, capsys):
    folder = run(load_recipe([*arguments, "--method", "lora"]))
    report(["--runs-dir", str(tmp_path / "runs")])
    assert (folder / "metrics.json").exists()
    for stage in ("02-TextVQA", "03-GQA"):
        (folder / "stages" / stage / "DONE").unlink()
    report(["--runs-dir", str(tmp_path / "runs")])
    assert "r: 1 stages are done, the stream is not" in capsys.readouterr().out
    assert read_matrix(folder / "matrix.csv")[0].shape == (1, 1)
    assert not (folder / "metrics.json").exists(), "figures of half a stream would look like a result"
    (folder / "stages" / "01-ScienceQA" / "DONE").unlink()
    report(["--runs-dir", str(tmp_path / "runs")])


@pytest.mark.parametrize(("samples", "epochs", "accumulation"), [(24, 1, 1), (25, 2, 1), (24, 1, 2), (40, 1.5, 2)])
def test_the_steps_announced_are_the_steps_made(arguments, samples, epochs, accumulation):
    line = [*arguments, "--method", "lora", "--tasks", "TextVQA", "--epochs", str(epochs), "--max-train-samples"]
    recipe = load_recipe([*line, str(samples), "--gradient-accumulation", str(accumulation)])
    folder = run(recipe)
    made = json.loads((folder / "stages" / "01-TextVQA" / "stage.json").read_text())["steps"]
    assert made == recipe.train.steps(min(samples, 24), 1)
