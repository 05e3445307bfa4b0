"""Run folders: what is frozen and when, what a run tells of what went in, and what it ran on."""

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import pytest
import yaml
from test_llaca_train import arguments, mini  # noqa: F401

from eval.report import main as report
from llaca import machine, stream
from llaca.config import load_recipe
from llaca.stream import check_run, commit, environment, freeze_run, input_files
from llaca.train import run

ROOT = Path(__file__).parents[1]
LINE = ["--method", "lora", "--tasks", "TextVQA", "--max-train-samples", "8"]


@pytest.fixture
def line(arguments):  # noqa: F811
    return [*arguments, *LINE]


@pytest.fixture
def lent(mini, tmp_path):  # noqa: F811
    """A copy of the benchmark that a test may change."""
    return shutil.copytree(mini, tmp_path / "lent")


def change(path, edit):
    records = json.loads(path.read_text())
    edit(records[2])
    path.write_text(json.dumps(records))


def lengthen(record):
    record["conversations"][0]["value"] = "why " * 3000 + record["conversations"][0]["value"]


def forget(record):
    record["conversations"][0]["value"] = "<image>"


@pytest.mark.parametrize(
    ("edit", "more", "message"),
    [(lengthen, [], r"record 2"), (forget, ["--method", "llaca"], r"record 2")],
    ids=["too long", "no instruction"],
)
def test_a_run_that_is_refused_leaves_nothing_and_starts_when_its_data_are_right(line, lent, edit, more, message):
    path = lent / "Instructions" / "TextVQA" / "train.json"
    good = path.read_text()
    change(path, edit)
    recipe = load_recipe([*line, "--data-root", str(lent), *more])
    with pytest.raises(ValueError, match=message):
        run(recipe)
    assert not Path(recipe.run.runs_dir).exists()
    path.write_text(good)
    assert (run(recipe) / "stages" / "01-TextVQA" / "DONE").is_file()


def test_a_base_that_cannot_be_loaded_leaves_nothing(line, tiny_base, tmp_path):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    (base / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    recipe = load_recipe([*line, "--base", str(base)])
    with pytest.raises(Exception, match=r"(?i)header|safetensors"):
        run(recipe)
    assert not Path(recipe.run.runs_dir).exists()
    shutil.copy(tiny_base / "model.safetensors", base)
    run(recipe)


def test_what_was_never_trained_may_be_started_with_another_recipe(line):
    first, other = load_recipe(line), load_recipe([*line, "--learning-rate", "0.5"])
    folder = freeze_run(first)
    left = folder / "stages" / "01-TextVQA.partial" / "trainer" / "checkpoint-3"
    left.mkdir(parents=True)  # the Trainer was writing it
    check_run(other)
    (left / "COMPLETE").touch()
    with pytest.raises(ValueError, match=r"learning_rate: 0.01 there, 0.5 now\nGive this run another name with --run"):
        run(other)
    (left / "COMPLETE").unlink()
    run(other)
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["learning_rate"] == 0.5
    assert not list(folder.glob("stages/*.partial"))
    with pytest.raises(ValueError, match=r"learning_rate: 0.5 there, 0.01 now"):
        run(first)


def test_answers_are_of_one_recipe(line):
    folder = run(load_recipe([*line, "--method", "zero_shot"]))
    run(load_recipe([*line, "--method", "zero_shot", "--max-new-tokens", "5"]))
    (folder / "answers" / "base").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"max_new_tokens: 5 there, 4 now"):
        run(load_recipe([*line, "--method", "zero_shot"]))


def test_a_file_that_changed_is_named_with_what_to_do(line, lent, tiny_base, tmp_path):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    recipe = load_recipe([*line, "--data-root", str(lent), "--base", str(base)])
    folder = run(recipe)
    told = yaml.safe_load((folder / "recipe.yaml").read_text())["inputs"]
    assert told.keys() >= {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "TextVQA"}
    records = lent / "Instructions" / "TextVQA" / "train.json"
    for path, name in ((records, "TextVQA"), *((base / name, name) for name in told if name != "TextVQA")):
        good = path.read_bytes()
        assert told[name] == hashlib.sha256(good).hexdigest()
        path.write_bytes(good + b"\n")
        what = "the training records of TextVQA" if name == "TextVQA" else "of the base"
        with pytest.raises(ValueError) as refused:
            check_run(recipe)
        assert str(refused.value) == (
            f"{folder}/recipe.yaml was started with other files:\n  {path} ({what}) has changed since\n"
            f"Put those files back, give this run another name with --run, or delete {folder}."
        )
        path.write_bytes(good)
    (base / "added_tokens.json").write_text("{}")
    with pytest.raises(ValueError, match=r"added_tokens.json \(of the base\) was not there"):
        check_run(recipe)
    (base / "added_tokens.json").unlink()
    (base / "tokenizer_config.json").rename(base / "elsewhere")
    with pytest.raises(ValueError, match=r"tokenizer_config.json \(of the base\) is not there any more"):
        check_run(recipe)
    (base / "elsewhere").rename(base / "tokenizer_config.json")
    check_run(recipe)
    # A run of before the configuration was recorded goes on, and one of before large files had checksums.
    frozen = yaml.safe_load((folder / "recipe.yaml").read_text())
    weights = base / "model.safetensors"
    for content in (told["model.safetensors"], f"{weights.stat().st_size} bytes"):
        frozen["inputs"] = {"model.safetensors": content, "TextVQA": told["TextVQA"]}
        (folder / "recipe.yaml").write_text(yaml.safe_dump(frozen))
        check_run(recipe)
    weights.write_bytes(weights.read_bytes() + b" ")
    with pytest.raises(ValueError, match=r"model.safetensors \(of the base\) has changed since"):
        check_run(recipe)


def test_deepspeeds_configuration_is_one_of_the_files(line, tmp_path, monkeypatch):
    recipe = load_recipe([*line, "--zero", "2"])
    assert input_files(recipe)["zero2.json"] == ROOT / "scripts/zero2.json"
    folder = freeze_run(recipe)
    (folder / "stages/01-TextVQA").mkdir(parents=True)
    check_run(recipe)
    changed = tmp_path / "zero2.json"
    changed.write_text((ROOT / "scripts/zero2.json").read_text() + " ")
    monkeypatch.setattr(stream, "deepspeed_file", lambda zero: changed)
    with pytest.raises(ValueError, match=r"zero2.json \(DeepSpeed's configuration\) has changed since"):
        check_run(recipe)


def test_a_stage_tells_what_it_ran_on_and_was_made_from(line):
    recipe = load_recipe([*line, "--tasks", "TextVQA", "GQA", "--batch-size", "2", "--global-batch-size", "4"])
    folder = run(recipe)
    story = json.loads((folder / "stages" / "02-GQA" / "stage.json").read_text())
    assert [story[key] for key in ("processes", "micro_batch", "accumulation", "global_batch")] == [1, 2, 2, 4]
    assert story["engine"] == "one process" and story["steps"] == 2
    for name, told in story["inputs"].items():
        places = {
            "GQA": Path(recipe.stream.data_root) / "Instructions/GQA/train.json",
            "benchmark.yaml": Path(recipe.stream.data_root) / "benchmark.yaml",
        }
        content = places.get(name, Path(recipe.model.base) / name).read_bytes()
        assert told == hashlib.sha256(content).hexdigest()
    assert story["inputs"].keys() >= {"GQA", "benchmark.yaml", "model.safetensors", "config.json", "tokenizer.json"}
    assert "TextVQA" not in story["inputs"]
    told = json.loads((folder / "environment.json").read_text())
    assert told == story["environment"]
    assert (told["launcher"], told["processes"], told["hosts"]) == ("python", 1, {platform.node(): 1})
    for package in ("torch", "deepspeed", "tokenizers", "safetensors", "bitsandbytes"):
        assert told[package] == version(package)
    assert told["commit"] == commit()
    ((device, count),) = told["devices"].items()
    (memory,) = re.findall(r"MemTotal: +(\d+) kB", Path("/proc/meminfo").read_text())
    assert count == 1 and f"{int(memory) / 2**20:.1f} GiB" in device and f" of {os.cpu_count()} cores" in device


def test_a_package_that_is_not_there_is_told():
    assert machine.versions(["torch", "no-such-package"]) == {
        "torch": version("torch"),
        "no-such-package": "not installed",
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n"
            "GCC version:  gcc version 12.3.0",
            "535.104.05",
        ),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (dvs-builder)\n",
            "570.86.15",
        ),
        ("", "unknown"),
    ],
)
def test_the_drivers_version(text, expected):
    assert machine.driver(text) == expected


def test_cores_are_those_that_this_process_may_use(monkeypatch):
    allowed = os.sched_getaffinity(0)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert machine.side_by_side() <= len(allowed)
    try:
        os.sched_setaffinity(0, {min(allowed)})  # as `taskset` does
        assert machine.side_by_side() == machine.cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)


@pytest.mark.parametrize(("threads", "expected"), [("1", 8), ("3", 2), ("16", 1), ("2,1", 4), ("", 8), (None, 8)])
def test_as_many_processes_as_the_cores_hold(monkeypatch, threads, expected):
    monkeypatch.setattr(machine, "cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS") if threads is None else monkeypatch.setenv("OMP_NUM_THREADS", threads)
    assert machine.side_by_side() == expected


@pytest.mark.parametrize("threads", ["0", "two", "-1"])
def test_a_number_of_threads_that_cannot_be(monkeypatch, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    with pytest.raises(ValueError, match=f"OMP_NUM_THREADS is '{threads}'"):
        machine.side_by_side()


def test_the_commit_is_this_projects(monkeypatch, tmp_path):
    """A copy without its history, inside another project, is at no commit of that one."""
    name = ["-c", "user.name=n", "-c", "user.email=e"]
    for command in (["init", "-q"], [*name, "commit", "-q", "--allow-empty", "-m", "m"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    (tmp_path / "copy" / "llaca").mkdir(parents=True)
    monkeypatch.setattr("llaca.stream.__file__", str(tmp_path / "copy" / "llaca" / "stream.py"))
    assert commit().startswith("unknown: fatal: not a git repository")


def test_a_stage_that_is_trained_again_takes_its_answers_along_and_not_before_later_ones(arguments, tmp_path):  # noqa: F811
    folder = run(load_recipe([*arguments, "--method", "lora"]))
    report(["--runs-dir", str(tmp_path / "runs")])
    (folder / "stages" / "02-TextVQA" / "DONE").unlink()
    with pytest.raises(ValueError, match=r"03-GQA is done and 02-TextVQA, which comes first, is not"):
        run(load_recipe([*arguments, "--method", "lora"]))
    (folder / "stages" / "03-GQA" / "DONE").unlink()
    run(load_recipe([*arguments, "--method", "lora"]))
    assert [path.name for path in (folder / "answers").iterdir()] == ["01-ScienceQA"]


def test_a_run_that_goes_on_at_another_commit_tells_both(arguments, tmp_path, monkeypatch):  # noqa: F811
    folder = run(load_recipe([*arguments, "--method", "lora"]))
    (folder / "stages" / "03-GQA" / "DONE").unlink()
    here = environment()
    monkeypatch.setattr("llaca.run.environment", lambda: here | {"commit": "later"})
    run(load_recipe([*arguments, "--method", "lora"]))
    report(["--runs-dir", str(tmp_path / "runs")])
    assert pd.read_csv(tmp_path / "runs/tables/runs.csv")["commit"][0] == f"{here['commit']} later"
