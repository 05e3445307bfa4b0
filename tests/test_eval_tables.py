"""The files of a run and the table's layout, read back with the standard library."""

import csv
import io
import json
import re
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from eval.metrics import summarise
from eval.report import by_method
from eval.runs import EvaluatedRun
from eval.tables import (
    PAPER_TABLE_1,
    method_row,
    paper_rows,
    read_matrix,
    results_table,
    write_matrix,
    write_metrics,
)
from eval.tasks import TASKS
from llaca.config import load_recipe

NAN = float("nan")
ORDER = ["TextVQA", "ScienceQA"]  # trained the other way round than the table's columns
SEEDS = [
    np.array([[80, NAN], [30, 60]], dtype=float),
    np.array([[84, NAN], [36, 62]], dtype=float),
    np.array([[79, NAN], [33, 70]], dtype=float),
]
BASELINE = {"TextVQA": 10.0, "ScienceQA": 25.0}


@pytest.fixture
def table():
    rows = [
        method_row("LoRA", [summarise(A, ORDER) for A in SEEDS]),
        method_row("Zero-shot", [summarise(np.array([[5.0, 7.5]]), ORDER)]),
    ]
    return results_table(rows, BASELINE)


def test_matrix_file_layout_and_round_trip(tmp_path):
    path = tmp_path / "matrix.csv"
    A = np.array([[100 * 107 / 250, NAN], [1 / 3, 60.4]])
    write_matrix(path, A, ["01-TextVQA", "02-ScienceQA"], ORDER)
    assert path.read_text().splitlines() == [
        "stage,TextVQA,ScienceQA",
        "01-TextVQA,42.8,",
        "02-ScienceQA,0.3333333333,60.4",
    ]
    read, stages, tasks = read_matrix(path)
    np.testing.assert_allclose(read, A, rtol=1e-9)
    assert (stages, tasks) == (["01-TextVQA", "02-ScienceQA"], ORDER)


def test_matrix_file_with_a_value_above_the_diagonal_is_named(tmp_path):
    path = tmp_path / "matrix.csv"
    path.write_text("stage,TextVQA,ScienceQA\n1,42.8,3\n2,,60.4\n")
    with pytest.raises(ValueError, match=r"matrix\.csv: .*stage 1, task 2 lies above the diagonal"):
        read_matrix(path)


def test_metrics_file(tmp_path):
    write_metrics(tmp_path / "metrics.json", SEEDS[0], ORDER)
    read = json.loads((tmp_path / "metrics.json").read_text())
    assert set(read) == {"Avg.ACC", "Forgetting", "New.ACC", "MAA", "BWT", "per_task"}
    assert (read["Avg.ACC"], read["Forgetting"]) == (45, 50)
    assert read["per_task"] == {"TextVQA": 30, "ScienceQA": 60}


def test_columns_are_the_papers_whatever_the_training_order():
    row = method_row("LoRA", [summarise(np.full((1, 8), 50.0), list(TASKS)[::-1])])
    table = results_table([row], dict.fromkeys(TASKS, 1.0), paper=True)
    with PAPER_TABLE_1.open() as lines:
        header = next(csv.reader(lines))
    assert list(table.frame().columns[1:]) == header[1:]
    assert table.frame()["Method"].tolist()[:2] == ["LoRA", "Question-only majority"]


def test_seeds_against_the_statistics_module(table):
    forgotten = [80 - 30, 84 - 36, 79 - 33]
    cell = f"{statistics.mean(forgotten):.2f} ± {statistics.stdev(forgotten):.2f}"
    lora = table.frame().iloc[0]
    assert lora["Method"] == "LoRA (n=3)"
    assert lora["Forgetting"] == cell
    assert lora["TextVQA"] == f"33.00 ± {statistics.stdev([30, 36, 33]):.2f}"


def test_undefined_figures_are_dashes(table):
    frame = table.frame().set_index("Method")
    assert frame.loc["Zero-shot", ["Avg.ACC", "Forgetting", "New.ACC"]].tolist() == ["6.25", "-", "-"]
    majority = frame.loc["Question-only majority"]
    assert majority.tolist() == ["25.00", "10.00", "17.50", "-", "-"]


def test_csv_numbers_come_back(table):
    lines = [line for line in table.csv().splitlines() if not line.startswith("#")]
    rows = list(csv.DictReader(io.StringIO("\n".join(lines))))
    assert [row["method"] for row in rows] == ["LoRA", "Zero-shot", "Question-only majority"]
    assert float(rows[0]["ScienceQA"]) == pytest.approx(64)
    assert float(rows[0]["ScienceQA sd"]) == pytest.approx(statistics.stdev([60, 62, 70]))
    assert (rows[1]["Forgetting"], rows[1]["Avg.ACC sd"], rows[1]["seeds"]) == ("", "", "1")


def test_markdown_and_latex_hold_the_same_cells(table):
    cells = table.frame().to_numpy().tolist()
    markdown = [line.strip("| ").split(" | ") for line in table.markdown().splitlines() if "|" in line]
    assert markdown[2:] == cells
    body = re.search(r"\\midrule\n(.*)\\bottomrule", table.latex(), re.DOTALL).group(1)
    latex = [line.removesuffix(r" \\").split(" & ") for line in body.splitlines()]
    assert [[cell.replace(r"$\pm$", "±") for cell in row] for row in latex] == cells


def test_text_lines_up(table):
    lines = table.text().splitlines()[:4]
    assert len({len(line) for line in lines}) == 1
    assert lines[1].startswith("LoRA (n=3) ") and lines[0].endswith("New.ACC")


def test_latex_escapes_its_notes(table):
    """A bare % would comment out the end of its line."""
    notes = replace(table, notes=("beta fell back in 12.9 % of lcia_release's {steps} & more",)).latex()
    assert r"12.9 \% of lcia\_release's \{steps\} \& more}\par" in notes


def test_runs_of_other_learning_rates_are_no_seeds_of_one_method():
    asked = {"a": ["--seed", "0"], "b": ["--seed", "1", "--learning_rate", "5e-4"], "c": ["--seed", "1"]}
    runs = [EvaluatedRun(Path(n), load_recipe(["--method", "lora", *line]), [], "test") for n, line in asked.items()]
    assert {label: [run.name for run in own] for label, own in by_method(runs).items()} == {
        "lora (learning rates 0.001 and 0.0002)": ["a", "c"],
        "lora (learning rates 0.0005 and 0.0002)": ["b"],
    }
    assert list(by_method([runs[0], runs[2]])) == ["lora"]


@pytest.mark.parametrize("form", ["text", "markdown", "csv", "latex"])
def test_every_table_defines_its_metrics(table, form):
    written = getattr(table, form)()
    for beginning in (
        "Avg.ACC: mean",
        "Forgetting: mean",
        "New.ACC: mean",
        "Question-only majority: answers",
    ):
        assert beginning in written
    assert "ddof=1" in written


def test_paper_rows_are_as_printed():
    rows = {row.method: row for row in paper_rows()}
    assert rows["Ours (paper)"].cell("Forgetting") == "1.93"
    assert rows["Zero-shot (paper)"].cell("New.ACC") == "-"
    for row in rows.values():
        assert statistics.mean(row.mean[task] for task in TASKS) == pytest.approx(row.mean["Avg.ACC"], abs=0.02)


def test_runs_that_are_no_seeds_of_one_recipe():
    trained, zero_shot = summarise(SEEDS[0], ORDER), summarise(np.array([[5.0, 7.5]]), ORDER)
    with pytest.raises(ValueError, match="not seeds of one recipe"):
        method_row("LoRA", [trained, zero_shot])


def test_rows_of_other_tasks_are_refused():
    row = method_row("LoRA", [summarise(SEEDS[0], ["TextVQA", "GQA"])])
    with pytest.raises(ValueError, match=r"LoRA.*GQA, ScienceQA"):
        results_table([row], BASELINE)
