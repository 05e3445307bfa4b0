"""What the documents tell a reader to do is done here."""

import importlib.util
import re
from pathlib import Path

import pandas as pd
import pytest
import yaml
from safetensors.torch import load_file
from test_llaca_train import arguments, mini  # noqa: F401

from llaca.config import load_recipe
from llaca.methods import METHODS
from llaca.train import run
from studies.reproduce import command_lines, main, printed_rows, studies

ROOT = Path(__file__).parents[1]


def blocks(document: str, language: str) -> list[str]:
    """The code blocks of a document."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / document).read_text(), re.DOTALL)


def test_the_walkthrough_of_a_new_method(arguments, tmp_path, monkeypatch):  # noqa: F811
    """The file and the line as they stand in docs/extending.md: it trains, and pulls towards the stage's start."""
    path = tmp_path / "l1.py"
    path.write_text(blocks("extending.md", "python")[0])
    spec = importlib.util.spec_from_file_location("l1", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert '`"l1": L1,` in `METHODS`' in (ROOT / "docs/extending.md").read_text()
    monkeypatch.setitem(METHODS, "l1", module.L1)
    apart = {}
    for penalty in ("0.0", "1000.0"):
        line = [*arguments[:-1], f"l1-{penalty}", "--method", "l1", "--penalty", penalty, "--tasks", "TextVQA", "GQA"]
        stages = run(load_recipe(line)) / "stages"
        start, end = (load_file(stages / f"{n}/adapter/adapter_model.safetensors") for n in ("01-TextVQA", "02-GQA"))
        apart[penalty] = sum((end[name] - start[name]).square().sum() for name in start)
    assert 0 < apart["1000.0"] < apart["0.0"] / 2
    assert load_recipe([*arguments, "--method", "l1"]).settings.penalty == 0.1
    with pytest.raises(ValueError, match="penalty: '-1' is not a number of at least 0"):
        load_recipe([*arguments, "--method", "l1", "--penalty", "-1"])


def test_every_file_that_a_document_links_to_is_there():
    for document in [ROOT / "README.md", ROOT / "checkpoints/README.md", *(ROOT / "docs").rglob("*.md")]:
        for link in re.findall(r"\]\((?!http)([^)#]+)", document.read_text()):
            assert (document.parent / link).exists(), f"{document}: {link}"


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("name", studies())
def test_every_row_of_every_study_can_be_run_and_has_its_printed_numbers(name, small):
    study = studies()[name]
    names = []
    for own in command_lines(study, small, [0, 1], []).values():
        for line in own:
            loaded = load_recipe(line)
            METHODS[loaded.method.method](loaded.settings)
            names.append(loaded.run.run)
    assert len(set(names)) == len(names)
    wanted = [row for row in study["rows"].values() if "paper" in row]
    found = printed_rows(study, loaded.stream.tasks)
    assert len(found) == len(wanted)
    assert all(row.mean["AR"] or row.mean["Avg.ACC"] for row in found.values())
    assert all(set(pair) <= set(study["rows"]) for pair in study.get("differences", {}).values())


def test_what_is_given_stands_above_a_studys_own_options(monkeypatch):
    seen = []
    monkeypatch.setattr("studies.reproduce.reproduce", lambda name, options, more: seen.append((name, options, more)))
    main(["strengths", "--split", "test", "--epochs", "1"])
    main(["policies"])
    (_, first, more), (name, second, none) = seen
    assert (first.mini, first.split, str(first.out)) == (True, "test", "docs/results/strengths")
    assert more == ["--epochs", "1"] and none == []
    assert (name, second.mini, second.seeds, second.split) == ("policies", True, [0, 1, 2], "test")


def test_printed_numbers_of_table_7_stand_on_one_line():
    row = printed_rows(studies()["table7"], ["ScienceQA"])["beta 0.992"]
    assert (row.mean["ScienceQA"], row.mean["Avg.ACC"], row.mean["Forgetting"]) == (72.88, 60.69, 5.46)
    assert row.mean["New.ACC"] == 65.24


def test_printed_numbers_of_table_8_have_their_own_columns_and_spread():
    found = printed_rows(studies()["table8"], [])
    mean = found["L2"].mean
    assert (mean["AR"], mean["FWT (no base)"], mean["BWT (T-1)"]) == (35.6, 17.5, -3.8) and mean["Avg.ACC"] is None
    assert found["L2"].cell("BWT (T-1)") == "-3.80 ± 1.20" and found["Init"].cell("AR") == "22.50"
    assert mean["FWT"] is None and found["LLaCA"].mean["AR"] == 39.8


def test_a_study_trains_evaluates_and_sets_the_papers_numbers_beside_ours(arguments, tmp_path, monkeypatch, capsys):  # noqa: F811
    recipe = yaml.safe_load(Path(arguments[1]).read_text())
    monkeypatch.setattr("studies.reproduce.MINI", Path(arguments[1]))
    main(["table6", "--mini", "--rows", "LoRA", "LLaCA", "--seeds", "0", "1", "--runs-dir", str(tmp_path / "runs"),
          "--out", str(tmp_path / "out"), "--max-train-samples", "8"])  # fmt: skip
    printed = capsys.readouterr().out
    assert re.search(r"LLaCA \(n=2\) .*±", printed) and "printed: Dynamic EMA + instruction grouping" in printed
    assert "64.64" in printed and "Question-only majority" in printed and len(recipe["tasks"]) == 3
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"table.md", "table.tex", "table.csv", "runs.csv"}
    costs = [line.split(" | ") for line in (tmp_path / "out" / "costs.md").read_text().splitlines()]
    assert [line[0] for line in costs[2:4]] == ["| LoRA", "| LLaCA"] and costs[2][1] == costs[3][1]
    assert float(costs[2][3]) > 0 and 0.1 < float(costs[2][5].rstrip(" |")) < 20
    runs, cells = (pd.read_csv(tmp_path / "out" / f"{name}.csv") for name in ("runs", "matrices"))
    last = cells[cells["stage"] == cells["stage"].max()].groupby("run")["accuracy"].mean()
    assert len(cells) == 4 * (1 + 2 + 3) and last[runs["run"]].to_numpy() == pytest.approx(runs["Avg.ACC"], rel=1e-3)
    launched, sizes = [], []
    monkeypatch.setattr("studies.reproduce.run_all", lambda lines, side_by_side: launched.extend(lines))
    monkeypatch.setattr("studies.reproduce.answer", lambda runs, options: sizes.append(options.batch_size))
    again = ["table6", "--mini", "--rows", "LoRA", "--runs-dir", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    main([*again, "--seeds", "0", "1", "--max-train-samples", "8", "--eval-batch-size", "3"])
    assert not launched and "2 runs, of which 2 are done" in capsys.readouterr().out and sizes == [3]
    with pytest.raises(SystemExit, match="started with another recipe"):
        main([*again, "--max-train-samples=8", "--learning_rate=5", "--run=lora-recipe-max_train_samples-8-seed0"])
