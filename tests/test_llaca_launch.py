"""The launcher: which processes it starts, what it says and refuses, and that its children end with it."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_llaca_train import adapters, arguments, mini  # noqa: F401

from llaca.config import load_recipe
from llaca.launch import announce, choose_launcher, commands, prepare_data
from llaca.stream import only_one


def test_the_launcher_says_under_which_engines_a_method_works(arguments, capsys):  # noqa: F811
    announce(commands([*arguments, "--method", "ewc"]), choose_launcher(None, 1, None, "none"), 1)
    assert "works with --zero none, 0, 1, 2 (" in capsys.readouterr().out


def test_a_recipes_minutes_are_told_for_its_own_work_alone(capsys):
    other = (["--epochs", "9"], ["--tasks", "GQA", "--data-root", "x"])
    for more in ([], ["--seed", "1"], *other):
        announce(commands(more), choose_launcher(None, 1, None, "none"), 1)
        assert ("About 10 minutes" in capsys.readouterr().out) == (more not in other), more


def test_a_folder_that_is_not_there_is_refused_before_it_is_read(arguments):  # noqa: F811
    recipe = load_recipe([*arguments, "--method", "lora", "--data-root", "nowhere"])
    with pytest.raises(FileNotFoundError, match="nowhere is no folder: correct data_root"):
        prepare_data(recipe)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGKILL])  # SIGINT goes SIGTERM's way
def test_the_launchers_children_end_with_it(arguments, tmp_path, stop):  # noqa: F811
    line = [sys.executable, "-m", "llaca.launch", *arguments, "--epochs", "50"]
    launcher = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    folders = [tmp_path / "runs" / f"r-{method}" for method in ("lora", "llaca")]
    while not all((f / "stages").exists() for f in folders) and launcher.poll() is None:
        time.sleep(0.05)
    launcher.send_signal(stop)
    assert launcher.wait(timeout=20) != 0
    for folder in folders:
        with only_one(folder, seconds=10):  # raises while a child still holds the run
            assert not list(folder.glob("stages/03*/DONE"))


def test_the_launcher_stops_on_a_broken_test_record_with_one_message(arguments, mini):  # noqa: F811
    path = mini / "Instructions" / "GQA" / "test.json"
    good = path.read_text()
    records = json.loads(good)
    records[2]["image"] = "GQA/test/none.png"
    try:
        path.write_text(json.dumps(records))
        line = [sys.executable, "-m", "llaca.launch", *arguments]
        stopped = subprocess.run(line, capture_output=True, text=True)
    finally:
        path.write_text(good)
    assert stopped.returncode != 0 and "Traceback" not in stopped.stderr
    assert "GQA/test.json" in stopped.stderr and "record 2" in stopped.stderr and "none.png" in stopped.stderr
    assert not Path(arguments[3]).exists()


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ((None, None, None, "none"), ("python", 1)),
        ((None, None, None, "2"), ("torchrun", 1)),
        ((None, 4, None, "none"), ("torchrun", 4)),
        (("deepspeed", 2, None, "3"), ("deepspeed", 2)),
    ],
)
def test_launcher_by_default_and_by_name(how, expected):
    """tests/test_llaca_hostfile.py has those with a hostfile."""
    chosen = choose_launcher(*how)
    assert (chosen.name, chosen.processes) == expected
    line = chosen.line(["--run", "r"])
    assert line[-3:] == ["llaca.train", "--run", "r"] and line[0] == sys.executable


def test_launchers_that_do_not_fit_are_refused():
    for how in (("python", 2, None, "none"), ("python", None, None, "2"), ("torchrun", None, "hosts", "none")):
        with pytest.raises(ValueError, match="--launcher"):
            choose_launcher(*how)


def test_launch_without_a_method_trains_lora_and_llaca():
    names = [recipe.run.run for recipe, _ in commands(["--seed", "3"])]
    assert names == ["lora-seed3", "llaca-seed3"]
    assert [recipe.run.run for recipe, _ in commands(["--run", "x"])] == ["x-lora", "x-llaca"]
    assert [recipe.run.run for recipe, _ in commands(["--run", "x", "--method", "lora"])] == ["x"]
