"""The metrics against matrices worked by hand and against the paper's printed row."""

import csv
from pathlib import Path

import numpy as np
import pytest

from eval.metrics import KEYS, check_matrix, forward_transfer, summarise, text_figures

METRICS = Path(__file__).parents[1] / "docs" / "METRICS.md"
PAPER = Path(__file__).parents[1] / "eval" / "paper" / "table1_llava7b.csv"
NAN = float("nan")


def test_three_tasks_by_hand():
    A = np.array([[80, NAN, NAN], [85, 60, NAN], [50, 66, 70]], dtype=float)
    figures = summarise(A, ["a", "b", "c"])
    assert figures == {
        "Avg.ACC": pytest.approx(62),  # (50 + 66 + 70) / 3
        "Forgetting": pytest.approx(14.5),  # ((85 - 50) + (60 - 66)) / 2: the best is not the first
        "New.ACC": pytest.approx(70),  # (80 + 60 + 70) / 3
        "MAA": pytest.approx((80 + 72.5 + 62) / 3),
        "BWT": pytest.approx(-8),  # ((50 - 80) + (66 - 60) + 0) / 3
        "per_task": {"a": 50, "b": 66, "c": 70},
    }


def test_paper_lora_row():
    # The diagonal belongs to the same run as the printed row; what lies between never exceeds it.
    diagonal = [82.45, 49.99, 96.05, 56.40, 55.45, 31.27, 62.20, 57.08]
    with PAPER.open() as lines:
        printed = next(row for row in csv.DictReader(lines) if row["method"] == "LoRA Fine-Tune")
    tasks = list(printed)[1:9]
    A = np.where(np.tri(8, dtype=bool), np.minimum(diagonal, 20.0), NAN)
    np.fill_diagonal(A, diagonal)
    A[-1] = [float(printed[task]) for task in tasks]
    figures = summarise(A, tasks)
    for metric in ("Avg.ACC", "Forgetting", "New.ACC"):
        assert f"{figures[metric]:.2f}" == printed[metric]
    assert f"{figures['BWT']:.2f}" == "-32.62"


def test_forgetting_against_a_double_loop():
    generator = np.random.default_rng(0)
    A = np.where(np.tri(6, dtype=bool), generator.uniform(0, 100, (6, 6)), NAN)
    losses = [max(A[j, i] for j in range(i, 5)) - A[5, i] for i in range(5)]
    stage_means = [sum(A[j, i] for i in range(j + 1)) / (j + 1) for j in range(6)]
    figures = summarise(A, list("abcdef"))
    assert figures["Forgetting"] == pytest.approx(sum(losses) / 5)
    assert figures["MAA"] == pytest.approx(sum(stage_means) / 6)


def test_single_row_has_no_stages():
    figures = summarise(np.array([[10.0, 20.0, 60.0]]), ["a", "b", "c"])
    assert figures == {
        "Avg.ACC": pytest.approx(30),
        "Forgetting": None,
        "New.ACC": None,
        "MAA": pytest.approx(30),
        "BWT": None,
        "per_task": {"a": 10, "b": 20, "c": 60},
    }


def test_a_figure_that_lacks_a_cell_is_none():
    last = np.array([[NAN, NAN, NAN], [NAN, NAN, NAN], [50, 66, 70]], dtype=float)
    figures = summarise(last, ["a", "b", "c"])
    assert figures["Avg.ACC"] == pytest.approx(62)
    assert [figures[key] for key in ("Forgetting", "New.ACC", "MAA", "BWT")] == [None] * 4
    np.fill_diagonal(last, [80, 60, 70])
    figures = summarise(last, ["a", "b", "c"])
    assert (figures["New.ACC"], figures["BWT"]) == (pytest.approx(70), pytest.approx(-8))
    assert figures["Forgetting"] is None and figures["MAA"] is None, "stage 2 was not evaluated on task 1"
    gap = np.array([[80, NAN], [NAN, 66]], dtype=float)
    assert summarise(gap, ["a", "b"])["per_task"] == {"a": None, "b": 66}
    assert summarise(gap, ["a", "b"])["Avg.ACC"] is None


def test_forward_transfer_by_hand():
    full = np.array([[80, 20, 5], [85, 60, 35], [50, 66, 70]], dtype=float)
    assert forward_transfer(full, np.array([1.0, 10, 20])) == pytest.approx(((20 - 10) + (35 - 20)) / 2)


def test_text_figures_by_hand():
    full = np.array([[80, 20, NAN], [85, 60, 35], [50, 66, 70]], dtype=float)
    expected = {"AR": 62, "FWT (no base)": (20 + 35) / 2, "BWT (T-1)": ((50 - 80) + (66 - 60)) / 2}
    assert text_figures(full) == pytest.approx(expected)
    full[0, 1] = NAN
    assert text_figures(full)["FWT (no base)"] is None and text_figures(full)["BWT (T-1)"] == pytest.approx(-12)
    assert text_figures(full[-1:]) == {"AR": pytest.approx(62), "FWT (no base)": None, "BWT (T-1)": None}


def test_input_is_left_alone():
    A = np.array([[80, NAN], [50, 66]], dtype=float)
    before = A.copy()
    summarise(A, ["a", "b"])
    np.testing.assert_array_equal(A, before)


@pytest.mark.parametrize(
    ("A", "message"),
    [
        ([[NAN, NAN], [NAN, NAN]], "no cell has a value"),
        ([[80, 3], [50, 66]], "stage 1, task 2 lies above the diagonal"),
        ([[0.8, NAN, NAN], [0.5, 0.6, NAN]], "shape"),
        ([[80, NAN], [50, 166]], "percent"),
    ],
)
def test_matrices_that_are_none_are_refused(A, message):
    with pytest.raises(ValueError, match=message):
        check_matrix(np.array(A, dtype=float))


def test_columns_must_fit_the_tasks():
    with pytest.raises(ValueError, match="2 columns"):
        summarise(np.array([[10.0, 20.0]]), ["a"])


def test_the_documents_row_of_one_matrix():
    """docs/METRICS.md, beside other libraries' numbers."""
    A = np.array([[80.0, 40, 10, 95], [60, 70, 30, 20], [90, 50, 60, 30], [85, 40, 75, 50]])
    below = np.where(np.tri(4, dtype=bool), A, np.nan)
    figures = summarise(below, list("abcd"))
    told = (figures["Forgetting"], figures["BWT"], forward_transfer(A, np.array([0.0, 20, 20, 10])))
    row = next(line for line in METRICS.read_text().splitlines() if line.startswith("| here |"))
    assert row.split("|")[2:5] == [f" {value:.2f} " for value in told]
    assert all(f"| {name} |" in METRICS.read_text() for name in (*KEYS, "FWT"))
