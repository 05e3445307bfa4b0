"""The command of a generated benchmark makes what a run makes by itself, and ends in one line where it cannot."""

import sys
from functools import partial

import pytest

from data.mini.folder import command, make


def build(root, seed=7):
    return make(root, {"benchmark": "Birds", "version": 1, "seed": seed}, lambda folder: None)


def test_without_a_seed_the_command_takes_the_builders_own(tmp_path, monkeypatch, capsys):
    root = tmp_path / "birds"
    ask = partial(command, "Birds.", build, root)
    monkeypatch.setattr(sys, "argv", ["birds"])
    build(root)
    ask()
    assert capsys.readouterr().out == f"{root}: already there\n"
    monkeypatch.setattr(sys, "argv", ["birds", "--seed", "0"])
    with pytest.raises(SystemExit):
        ask()
    told = "Birds version 1 of seed 0 as asked for (it differs in seed)"
    assert capsys.readouterr().err == f"{root} exists and is not {told}; move it away\n"
