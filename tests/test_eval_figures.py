"""The figures: that they show the right numbers, clip nothing, and come out the same every time."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from eval import figures

TASKS = ["ScienceQA", "TextVQA", "ImageNet"]
NAN = float("nan")
LORA = np.array([[80, NAN, NAN], [40, 60, NAN], [10, 20, 70]], dtype=float)
ZERO_SHOT = np.array([[5.0, 6.0, 7.0]])


@pytest.fixture
def drawn(monkeypatch):
    """The figures as they are saved."""
    saved = []
    save = figures.save
    monkeypatch.setattr(figures, "save", lambda figure, path: (saved.append(figure), save(figure, path)))
    return saved


def test_heatmap_writes_every_cell_once(tmp_path, drawn):
    figures.accuracy_heatmap(LORA, TASKS, "LoRA", tmp_path / "a.png")
    axes = drawn[0].axes[0]
    written = sorted(float(text.get_text()) for text in axes.texts)
    assert written == [10, 20, 40, 60, 70, 80]
    assert [label.get_text() for label in axes.get_xticklabels()] == TASKS
    assert [label.get_text() for label in axes.get_yticklabels()] == TASKS


def test_heatmap_of_a_single_row(tmp_path, drawn):
    figures.accuracy_heatmap(ZERO_SHOT, TASKS, "Zero-shot", tmp_path / "a.png")
    assert [text.get_text() for text in drawn[0].axes[0].texts] == ["5.0", "6.0", "7.0"]


def test_lines_run_from_the_tasks_own_stage(tmp_path, drawn):
    runs = {"LoRA": (LORA, TASKS), "Zero-shot": (ZERO_SHOT, TASKS)}
    figures.accuracy_over_stages(runs, tmp_path / "a.png")
    panels = drawn[0].axes
    assert [axes.get_title() for axes in panels] == ["1. ScienceQA", "2. TextVQA", "3. ImageNet"]
    lines = [axes.get_lines()[0].get_xydata().tolist() for axes in panels]
    assert lines == [[[1, 80], [2, 40], [3, 10]], [[2, 60], [3, 20]], [[3, 70]]]
    assert [axes.get_lines()[1].get_ydata()[0] for axes in panels] == [5, 6, 7]
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["LoRA", "Zero-shot"]


def test_runs_with_other_orders_are_not_drawn_together(tmp_path):
    runs = {"one": (LORA, TASKS), "two": (LORA, TASKS[::-1])}
    with pytest.raises(ValueError, match="'two'"):
        figures.accuracy_over_stages(runs, tmp_path / "a.png")


def test_a_panel_for_every_run_with_stages(tmp_path, drawn):
    runs = {"LoRA": (LORA, TASKS), "Zero-shot": (ZERO_SHOT, TASKS), "LLaCA": (LORA / 2, TASKS)}
    figures.accuracy_heatmaps(runs, tmp_path / "a.png")
    panels = [axes for axes in drawn[0].axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == ["LoRA", "LLaCA"]
    assert [float(text.get_text()) for text in panels[1].texts] == [40, 20, 30, 5, 10, 35]
    with pytest.raises(ValueError, match="no run with stages"):
        figures.accuracy_heatmaps({"Zero-shot": (ZERO_SHOT, TASKS)}, tmp_path / "b.png")


def test_beta_stands_at_its_step_of_the_stream(tmp_path, drawn):
    """Two stages of 3 and 2 steps, of which the second averages."""
    columns = {"step": [1, 2], "beta_q05": [0.5, 0.6], "beta_q50": [0.9, 0.95], "beta_q95": [0.99, 1.0]}
    trace = pd.DataFrame({**columns, "fallback_share": [1.0, 0.25]})
    figures.beta_over_steps({"LLaCA": [("A", 3, None), ("B", 2, trace)]}, tmp_path / "a.png")
    upper, lower = drawn[0].axes
    assert upper.get_lines()[1].get_xydata().tolist() == [[4, 0.9], [5, 0.95]]
    assert [text.get_text() for text in upper.texts] == ["A", "no average", "B"]
    band = upper.collections[0].get_paths()[0].vertices
    assert band.min(axis=0).tolist() == [4, 0.5] and band.max(axis=0).tolist() == [5, figures.BETA_SHOWN[1]]
    assert lower.collections[0].get_paths()[0].vertices[:, 1].max() == 100


def test_seeds_and_their_mean(tmp_path, drawn):
    points = {"LoRA": np.array([[30.0, 40.0], [34.0, 44.0]]), "LLaCA": (60.0, 5.0)}
    figures.average_vs_forgetting(points, tmp_path / "a.png")
    marks = [collection.get_offsets().tolist() for collection in drawn[0].axes[0].collections]
    assert marks == [[[40, 30], [44, 34]], [[42, 32]], [[5, 60]]]


def test_the_names_of_methods_that_lie_together_do_not_cover_each_other(tmp_path, drawn):
    points = {f"method {i}": (30 + 5 * (i % 4), 40 + 5 * (i // 4)) for i in range(16)}
    for name in ("a.png", "b.png"):
        figures.average_vs_forgetting(points, tmp_path / name)
    [axes] = drawn[0].axes
    names = [text for text in axes.texts if text.get_text() in points]  # the others are the lines to the marks
    assert [text.get_text() for text in names] == list(points)
    boxes = [text.get_window_extent() for text in names]
    assert not [(i, j) for i in range(16) for j in range(i) if boxes[i].overlaps(boxes[j])]
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_equal_points_share_a_name_and_an_axis_is_never_without_extent(tmp_path, drawn):
    figures.average_vs_forgetting({"one": (50, 20), "other": (50, 20)}, tmp_path / "a.png")
    [axes] = drawn[0].axes
    assert [text.get_text() for text in axes.texts if text.get_text()] == ["one, other"]
    for least, most in (axes.get_xlim(), axes.get_ylim()):
        assert most - least == pytest.approx(figures.LEAST_SPAN)


def test_a_tables_scatter_is_drawn_anew_from_its_runs(tmp_path, drawn):
    rows = {"method": ["LoRA", "LoRA", "Zero-shot"], "Avg.ACC": [30.0, 34, 1], "Forgetting": [40.0, 44, None]}
    pd.DataFrame(rows).to_csv(tmp_path / "runs.csv")
    figures.main([str(tmp_path)])
    marks = [collection.get_offsets().tolist() for collection in drawn[0].axes[0].collections]
    assert marks == [[[40, 30], [44, 34]], [[42, 32]]] and (tmp_path / "average_vs_forgetting.png").is_file()


def test_nothing_reaches_over_the_edge_and_bytes_repeat(tmp_path):
    runs = {f"a method with a rather long name {i}": (LORA, TASKS) for i in range(7)}
    for name in ("a.png", "b.png"):
        figures.accuracy_over_stages(runs, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    pixels = np.asarray(Image.open(tmp_path / "a.png").convert("L"))
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    assert (border == 255).all()


def test_a_fixed_beta_does_not_move():
    fixed = pd.DataFrame({"step": [1, 2], "beta_q05": 0.99, "beta_q50": 0.99, "beta_q95": 0.99})
    first, second = fixed.assign(beta_q05=[0.99, 0.9]), fixed.assign(beta_q05=0.9, beta_q50=0.9, beta_q95=0.9)
    assert not figures.beta_moves([("A", 2, None), ("B", 2, fixed), ("C", 2, fixed)])
    assert not figures.beta_moves([("A", 2, None)])
    assert figures.beta_moves([("A", 2, None), ("B", 2, first)])
    assert figures.beta_moves([("A", 2, fixed), ("B", 2, second)])


def test_long_names_stand_below_a_matrix_and_their_numbers_at_its_axes():
    tasks = ["task848_pubmedqa_classification", "task611_mutual_multi_turn_dialogue"]
    assert figures.shown_names(["GQA", "VizWiz"]) == ["GQA", "VizWiz"] and figures.axis_label("on", ["GQA"], 20) == "on"
    assert figures.shown_names(tasks) == ["1", "2"]
    lines = figures.axis_label("on", tasks, 40).split("\n")
    assert lines == ["on", "1 task848_pubmedqa_classification, 2", "task611_mutual_multi_turn_dialogue"]
    axes = Figure().subplots()
    figures.draw_matrix(axes, np.array([[100.0, np.nan], [99.94, 5.0]]), tasks, "t", 8)
    assert [text.get_text() for text in axes.texts] == ["100", "99.9", "5.0"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2"]
