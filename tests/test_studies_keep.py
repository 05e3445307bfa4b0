"""A table made in several calls, of which the earlier ones' runs are gone, is the table of one call."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from test_eval_retained import skill_folder  # noqa: F401
from test_llaca_train import arguments, mini  # noqa: F401

from llaca.config import load_recipe
from llaca.train import run
from studies import reproduce

ROWS = ["LoRA", "LLaCA", "LoRA + grouping"]


@pytest.fixture
def call(arguments, tmp_path, monkeypatch):  # noqa: F811
    """Calls Table 6 with flags; the runs train in this process."""
    monkeypatch.setattr(reproduce, "MINI", Path(arguments[1]))

    def run_all(lines, side_by_side):
        for line in lines:
            run(load_recipe(line[line.index("llaca.train") + 1 :]))

    monkeypatch.setattr(reproduce, "run_all", run_all)

    def made(out: str, *flags: str, seeds: tuple[str, ...] = ("0",)) -> Path:
        usual = ["--seeds", *seeds, "--runs-dir", str(tmp_path / "runs"), "--max-train-samples", "8"]
        reproduce.main(["table6", "--mini", *usual, "--out", str(tmp_path / out), *flags])
        return tmp_path / out

    return made


def test_kept_rows_are_those_that_were_made(call, tmp_path, capsys):
    seeds = ("0", "1")
    whole = call("whole", "--rows", *ROWS, seeds=seeds)
    parts = call("parts", "--rows", *ROWS[:2], seeds=seeds)
    for folder in (tmp_path / "runs").glob("l*"):
        if "grouping" not in folder.name:
            shutil.rmtree(folder)
    call("parts", "--keep", "--rows", ROWS[2], seeds=seeds)
    assert "2 runs, of which 2 are done; 2 rows are kept" in capsys.readouterr().out
    for name in ("runs.csv", "matrices.csv", "recipes.json", "costs.md"):
        assert (parts / name).read_text() == (whole / name).read_text(), name
    ours, theirs = ((folder / "table.md").read_text().splitlines() for folder in (parts, whole))
    told = "- 4 of the runs are of earlier calls, at the commits that runs.csv names."
    assert [line for line in ours if line != told] == theirs and told in ours
    ours, theirs = ((folder / "differences.md").read_text().splitlines() for folder in (parts, whole))
    assert [line.rsplit("|", 2)[0] for line in ours] == [line.rsplit("|", 2)[0] for line in theirs]
    assert ours[2].endswith("| - |") and not theirs[2].endswith("| - |"), "answers of kept rows are not there"
    for name in ("accuracy_matrices.png", "average_vs_forgetting.png", "accuracy_over_stages.png"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes(), name


def test_what_stays_of_the_base_is_kept_too(call, tmp_path, skill_folder):  # noqa: F811
    measured = ("--retained", str(skill_folder))
    whole = call("whole", "--rows", *ROWS[:2], *measured)
    parts = call("parts", "--rows", ROWS[0], *measured)
    shutil.rmtree(tmp_path / "runs" / pd.read_csv(parts / "runs.csv")["run"][0])
    call("parts", "--keep", "--rows", ROWS[1], *measured)
    for name in ("runs.csv", "retained.md", "retained.csv"):
        assert (parts / name).read_text() == (whole / name).read_text(), name
    ours, theirs = (pd.read_csv(folder / "table.csv", comment="#") for folder in (parts, whole))
    pd.testing.assert_frame_equal(ours, theirs, rtol=1e-4)
    assert ours["Retained"].notna()[0] and ours["Retained loss"][0] > 0


def test_what_does_not_fit_is_not_kept(call):
    out = call("out", "--rows", *ROWS[:2])
    for told, flags in {
        "another recipe:\n  learning_rate: 0.01 there, 5.0 now\nmake the row anew": ["--learning_rate", "5"],
        "another recipe:\n  split: 'test' there, 'dev' now\nmake": ["--split", "dev"],
        "another recipe:\n  cells: 'triangle' there, 'final' now\nmake": ["--cells", "final"],
        r"is of the seeds \[0\], not \[0, 1\]; make the row anew: --keep --rows 'LoRA'": ["--seeds", "0", "1"],
    }.items():
        with pytest.raises(SystemExit, match=told):
            call("out", "--keep", *flags)
    with pytest.raises(SystemExit, match="no table was written there; leave --keep out"):
        call("nowhere", "--keep")
    for part, told in (("questions", "checksum of GQA's questions: '0000"), ("inputs", "checksum of GQA: '0000")):
        written = json.loads((out / "recipes.json").read_text())
        written["all"][part]["GQA"] = "0" * 64
        (out / "recipes.json").write_text(json.dumps(written))
        with pytest.raises(SystemExit, match=told):
            call("out", "--keep")
    call("out", "--keep", "--rows", *ROWS[:2])
    (out / "recipes.json").unlink()
    call("out", "--keep", "--rows", "LoRA")
    note = "1 of the runs are of earlier calls, at the commits that runs.csv names; the recipes of 1 were not recorded"
    assert note in (out / "table.md").read_text()
    (out / "matrices.csv").write_text("run,stage,task,accuracy\n")
    with pytest.raises(SystemExit, match=r"is in runs\.csv and not in matrices\.csv"):
        call("out", "--keep")
