"""A stage's folder through every order of kills: what is whole is kept, what came from something else is not used."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_llaca_methods import method_of
from test_llaca_train import adapters, arguments, mini  # noqa: F401

from data.benchmark import image_root
from eval.report import main as report
from llaca import folders
from llaca import run as run_module
from llaca.callbacks import latest, truncate_log
from llaca.config import load_recipe
from llaca.folders import checksums, handed_on
from llaca.stream import only_one, run_folder
from llaca.train import run
from llava.trainer import StepLog

TWO = ["--method", "llaca", "--grouping", "false", "--tasks", "TextVQA", "GQA", "--save-steps", "1"]
WEIGHTS = "adapter/adapter_model.safetensors"


class Killed(Exception):
    """Nobody catches it."""


def raiser(*_, **__):
    raise Killed


def killed_in(monkeypatch, line: list[str], owner, name: str, call: int = 1) -> Path:
    """The run of `line` as a kill leaves it that comes when `owner.name` is called for the `call`-th time."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    calls, stock = [], getattr(owner, name)

    def counted(*given, **more):
        calls.append(1)
        return raiser() if len(calls) == call else stock(*given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, counted)
        with pytest.raises(Killed):
            run(load_recipe(line))
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return run_folder(load_recipe(line))


@pytest.fixture
def broken_off(arguments, monkeypatch):  # noqa: F811
    """A command line, and its run with a checkpoint in the second of two stages."""
    line = [*arguments, *TWO]
    folder = killed_in(monkeypatch, line, StepLog, "on_step_end", 5)
    assert list(folder.glob("stages/02-GQA.partial/trainer/*/COMPLETE"))
    return line, folder


def inodes(folder: Path) -> dict[str, int]:
    """A file that is written anew has another one."""
    return {str(path.relative_to(folder)): path.stat().st_ino for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("where", ["seal", "publish", "tidy"])
def test_a_kill_at_the_end_of_a_stage_loses_nothing_that_is_whole(arguments, monkeypatch, where):  # noqa: F811
    """Before DONE, before the stage's name, before its checkpoints go."""
    one = [*TWO[:-4], "GQA", "--save-steps", "1"]
    whole = run(load_recipe([*arguments[:-1], "whole", *one]))
    line = [*arguments, *one]
    folder = killed_in(monkeypatch, line, run_module if where == "seal" else folders, where)
    stage, partial = folder / "stages/01-GQA", folder / "stages/01-GQA.partial"
    assert stage.is_dir() == (where == "tidy") != partial.is_dir()
    found = stage if where == "tidy" else partial
    assert (found / "DONE").is_file() == (where != "seal") and list((found / "trainer").iterdir())
    kept = {key: inode for key, inode in inodes(found).items() if not key.startswith("trainer")}
    run(load_recipe(line))
    assert (inodes(stage) == kept) == (where != "seal") and not partial.exists()
    assert adapters(folder) == adapters(whole)
    logs = [
        path.read_text().splitlines()[:-1] for path in (f / "stages/01-GQA/train_log.jsonl" for f in (folder, whole))
    ]
    assert logs[0] == logs[1]


def test_what_a_name_vouches_for_is_on_the_disk_before(arguments, monkeypatch):  # noqa: F811
    """COMPLETE in a checkpoint, DONE in a stage's folder, and then the folder's name."""
    events, fsync, replace, rename = [], os.fsync, os.replace, Path.rename

    def synced(number):
        events.append(("sync", os.readlink(f"/proc/self/fd/{number}")))
        fsync(number)

    def replaced(source, target):
        events.append(("name", str(target)))
        replace(source, target)

    def renamed(source, target):
        events.append(("name", str(target)))
        there = [str(path) for path in source.rglob("*") if path.is_file() and "trainer" not in path.parts]
        assert {("sync", path) for path in there} - {("sync", str(source / "DONE"))} <= set(events)
        return rename(source, target)

    for owner, name, wrapped in ((os, "fsync", synced), (os, "replace", replaced), (Path, "rename", renamed)):
        monkeypatch.setattr(owner, name, wrapped)
    folder = run(load_recipe([*arguments, *TWO[:-4], "GQA", "--save-steps", "2"]))
    partial = folder / "stages/01-GQA.partial"
    names = [path for kind, path in events if kind == "name" and Path(path).name in ("COMPLETE", "DONE", "01-GQA")]
    assert names[-2:] == [str(partial / "DONE"), str(folder / "stages/01-GQA")] and len(names) == 4
    first = events.index(("name", names[0]))
    checkpoint = Path(names[0]).parent
    before = {path for kind, path in events[:first] if kind == "sync"}
    assert {str(checkpoint / f) for f in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "method-0.pt")} <= before
    assert events[first + 1] == ("sync", str(checkpoint)), "the name itself"


def test_a_stage_under_way_goes_on_from_what_it_was_begun_from_alone(broken_off, arguments, capsys):  # noqa: F811
    """Stage 1 is trained again, to other weights: the checkpoint of stage 2 came from parameters that are no more."""
    line, folder = broken_off
    first = folder / "stages/01-TextVQA"
    other = {name: 1.5 * tensor for name, tensor in load_file(first / WEIGHTS).items()}
    save_file(other, first / WEIGHTS, metadata={"format": "pt"})
    told = json.loads((first / "stage.json").read_text())
    (first / "stage.json").write_text(json.dumps({**told, "handed_on": checksums(first)}))
    fresh = folder.with_name("fresh")
    shutil.copytree(folder, fresh, ignore=shutil.ignore_patterns("*.partial"))
    recipe = (fresh / "recipe.yaml").read_text()
    (fresh / "recipe.yaml").write_text(recipe.replace("run: r\n", "run: fresh\n"))
    run(load_recipe(line))
    assert "02-GQA.partial: removed, it was begun from other parameters" in capsys.readouterr().out
    run(load_recipe([*arguments[:-1], "fresh", *TWO]))
    assert adapters(folder) == adapters(fresh)


def test_a_partial_folder_that_does_not_say_what_it_was_begun_from_is_not_used(broken_off, capsys):
    line, folder = broken_off
    (folder / "stages/02-GQA.partial/origin.json").unlink()
    run(load_recipe(line))
    assert "it does not say what it began from" in capsys.readouterr().out


def test_a_checkpoint_of_other_records_is_refused_and_not_removed(arguments, mini, monkeypatch):  # noqa: F811
    """--unchecked leaves out a record whose picture has gone; it comes back."""
    line = [*arguments, *TWO, "--unchecked", "true", "--reuse_vision_features", "false"]
    folder = killed_in(monkeypatch, line, StepLog, "on_step_end", 5)
    records = json.loads((mini / "Instructions/GQA/train.json").read_text())
    picture = image_root(mini) / next(record["image"] for record in records if "image" in record)
    picture.rename(picture.with_suffix(".gone"))
    try:
        with pytest.raises(ValueError, match=r"02-GQA\.partial was trained on other records than GQA has now"):
            run(load_recipe(line))
    finally:
        picture.with_suffix(".gone").rename(picture)
    assert list(folder.glob("stages/02-GQA.partial/trainer/*/COMPLETE"))
    run(load_recipe(line))
    assert (folder / "stages/02-GQA/DONE").is_file()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n"


@pytest.mark.parametrize(
    ("name", "spoil", "told"),
    [
        (WEIGHTS, lambda content: content[:-7], r"is cut off: .*copy it again, or remove .*01-TextVQA/DONE"),
        (WEIGHTS, lambda content: POINTER, r"Git LFS pointer.*git lfs pull.*remove .*01-TextVQA/DONE"),
        ("adapter/adapter_config.json", lambda content: content[:40], r"is cut off after 40 bytes.*01-TextVQA/DONE"),
    ],
)
def test_a_file_of_a_done_stage_that_was_cut_short_is_named_with_the_remedy(broken_off, name, spoil, told):
    line, folder = broken_off
    path = folder / "stages/01-TextVQA" / name
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"{path.name} .*{told}"):
        run(load_recipe(line))


@pytest.mark.parametrize("content", [b"", POINTER, b"PK\x03\x04 half a file"])
def test_a_memory_that_was_cut_short_is_named_with_the_remedy(tmp_path, content):
    torch.save({"fisher": {"a": torch.ones(99)}}, tmp_path / "method.pt")
    assert handed_on(method_of("ewc"), tmp_path)["fisher"]["a"].sum() == 99
    (tmp_path / "method.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"method\.pt was cut short or damaged: .*EWC has to know .*remove .*/DONE"):
        handed_on(method_of("ewc"), tmp_path)


def test_a_checkpoint_that_has_lost_something_is_named_with_the_remedy(broken_off):
    line, folder = broken_off
    (optimizer,) = folder.glob("stages/*.partial/trainer/*/optimizer.pt")
    os.truncate(optimizer, 100)
    with pytest.raises(
        ValueError, match=r"optimizer\.pt has 100 bytes and was written with \d{4,}: .*delete .*checkpoint-\d"
    ):
        run(load_recipe(line))


def test_of_checkpoints_half_written_and_half_removed_the_newest_whole_one_is_read(broken_off, tmp_path):
    _, folder = broken_off
    (whole,) = folder.glob("stages/*.partial/trainer/checkpoint-*")
    trainer = tmp_path / "trainer"
    for step, complete in ((3, True), (10, True), (20, False)):
        shutil.copytree(whole, trainer / f"checkpoint-{step}")
        if not complete:
            (trainer / f"checkpoint-{step}" / "COMPLETE").unlink()
    (trainer / "checkpoint-3" / "optimizer.pt").unlink()
    assert latest(trainer) == trainer / "checkpoint-10"
    assert [path.name for path in trainer.iterdir()] == ["checkpoint-10"]


def test_answers_and_results_of_a_stage_that_is_trained_again_are_gone(arguments, tmp_path):  # noqa: F811
    folder = run(load_recipe([*arguments, *TWO]))
    for more in ([], ["--split", "dev"]):
        report(["--runs-dir", str(tmp_path / "runs"), *more])
    (folder / "stages/02-GQA/DONE").unlink()
    run(load_recipe([*arguments, *TWO]))
    left = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix in (".csv", ".json", ".jsonl")}
    left = {name for name in left if not name.startswith("stages/")}
    assert left == {
        "environment.json",
        *(f"{answers}/01-TextVQA/TextVQA.jsonl" for answers in ("answers", "answers-dev")),
        *(f"{scores}/01-TextVQA/TextVQA.csv" for scores in ("scores", "dev/scores")),
    }


def test_the_log_is_cut_where_the_checkpoint_is(tmp_path):
    log = tmp_path / "train_log.jsonl"
    lines = [
        {"step": 2, "loss": 1.0},
        {"step": 4, "loss": 1.0},
        {"step": 4, "train_runtime": 9.0},
        {"step": 6, "loss": 1},
    ]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 8, "lo')
    truncate_log(log, 4)
    assert [json.loads(line) for line in log.read_text().splitlines()] == lines[:2]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks_is_told_and_goes_on(tmp_path, monkeypatch, capsys, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with only_one(tmp_path):
        pass
    assert f"{tmp_path}: its file system has no locks" in capsys.readouterr().out
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
    with pytest.raises(OSError, match="broken"), only_one(tmp_path):
        pass


@pytest.mark.parametrize("preset", [{"RANK": "0", "WORLD_SIZE": "1"}, {"LOCAL_RANK": "0", "MASTER_ADDR": "nowhere"}])
def test_variables_that_a_platform_sets_for_one_process_do_not_make_it_look_for_others(preset):
    code = "from llaca import ranks; ranks.start(); print(ranks.count(), ranks.rank(), ranks.first())"
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, capture_output=True, text=True, env={**os.environ, **preset}, timeout=100)
    assert done.stdout.split() == ["1", "0", "True"], done.stderr


def test_what_a_killed_writer_left_beside_its_file_is_no_part_of_the_stage(arguments, tmp_path, monkeypatch):  # noqa: F811
    """safetensors writes `.tmp...` and renames it."""
    line = [*arguments, "--method", "lora", "--tasks", "GQA", "--save_steps", "1"]

    def dies(model, path, state):
        path.mkdir()
        (path / ".tmpV0XIBR").write_text("half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("llaca.stage.save_adapter", dies)
        run(load_recipe(line))
    assert list(tmp_path.glob("runs/*/stages/01-GQA.partial/adapter/.tmp*"))
    folder = run(load_recipe(line))
    assert not list(folder.glob("stages/*/adapter/.*")) and list(folder.glob("stages/01-GQA/adapter/*.safetensors"))
