"""Figures of the accuracy matrix as PNG, drawn without a display and safe for the colour-blind.

python -m eval.figures DIR ...      average_vs_forgetting.png of tables, anew from their runs.csv
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from adjustText import adjust_text
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from eval.metrics import check_matrix, is_single

# Okabe and Ito's palette without its yellow, which vanishes on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")  # not as many as colours: 56 styles
PANELS_A_ROW = 4
MATRICES_A_ROW = 3
LONGEST = 14  # characters of a task's name at an axis
LEAST_SPAN = 10.0  # points of an axis of the scatter
BETA_SHOWN = (1e-2, 1 - 1e-4)  # the axis is logarithmic towards 0 and towards 1
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "savefig.dpi": 160,
    "savefig.bbox": "tight",
}


def save(figure: Figure, path: Path | str) -> None:
    """Write the figure as PNG, without a library version in it: equal data give equal bytes."""
    figure.savefig(path, metadata={"Software": None})


def style(position: int) -> dict[str, str]:
    """Colour and marker of the position-th method; both change, so that grey prints can be read."""
    return {"color": COLOURS[position % len(COLOURS)], "marker": MARKERS[position % len(MARKERS)]}


def accuracy_heatmap(A: np.ndarray, tasks: Sequence[str], title: str, path: Path | str) -> None:
    """A (T, T) in percent as a lower triangle, a row per stage; A (1, T) as one row."""
    A = check_matrix(A)
    with rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(1.2 + 0.85 * A.shape[1], 1.6 + 0.45 * len(A)), layout="constrained")
        axes = figure.subplots()
        image = draw_matrix(axes, A, tasks, title, 9)
        axes.set_xlabel(axis_label("evaluated on", tasks, 14 * len(tasks)))
        axes.set_ylabel("" if is_single(A) else "after training on")
        figure.colorbar(image, ax=axes, label="accuracy, %", pad=0.02)
        save(figure, path)


def accuracy_heatmaps(runs: Mapping[str, tuple[np.ndarray, Sequence[str]]], path: Path | str) -> None:
    """A panel per run: `accuracy_heatmap` of those that have stages; `runs` as in `accuracy_over_stages`."""
    tasks = common_order(runs)
    several = {label: np.asarray(A, float) for label, (A, _) in runs.items() if not is_single(A)}
    if not several:
        raise ValueError("no run with stages to draw")
    columns = min(MATRICES_A_ROW, len(several))
    rows = -(-len(several) // columns)
    with rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(4.4 * columns, 2.7 * rows + 0.8), layout="constrained")
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for axes in grid.flat[len(several) :]:
            axes.set_visible(False)
        for axes, (label, A) in zip(grid.flat, several.items(), strict=False):
            image = draw_matrix(axes, A, tasks, label, 7.5)
            axes.tick_params(labelbottom=axes in grid.flat[max(0, len(several) - columns) :])
        figure.supxlabel(axis_label("evaluated on", tasks, 50 * columns))
        figure.supylabel("after training on")
        figure.colorbar(image, ax=grid, label="accuracy, %", pad=0.01, shrink=min(1.0, 2 / rows))
        save(figure, path)


def shown_names(tasks: Sequence[str]) -> list[str]:
    """What stands at an axis: the tasks, or their numbers where a name is too long."""
    return list(tasks) if max(map(len, tasks)) <= LONGEST else [str(number) for number in range(1, len(tasks) + 1)]


def axis_label(words: str, tasks: Sequence[str], width: int) -> str:
    """An axis's label, with the tasks by their numbers where these stand at the axis; lines of so many characters."""
    if shown_names(tasks) == list(tasks):
        return words
    named = ", ".join(f"{number} {task}" for number, task in enumerate(tasks, 1))
    return "\n".join([words, *textwrap.wrap(named, width)])


def draw_matrix(axes: Axes, A: np.ndarray, tasks: Sequence[str], title: str, fontsize: float) -> AxesImage:
    """One matrix with its cells written out."""
    image = axes.imshow(np.ma.masked_invalid(A), cmap="YlGnBu", vmin=0, vmax=100, aspect="auto")
    for (stage, task), value in np.ndenumerate(A):
        if not np.isnan(value):
            ink = "white" if value > 55 else "black"
            text = f"{value:.1f}" if value < 99.95 else "100"
            axes.text(task, stage, text, ha="center", va="center", color=ink, fontsize=fontsize)
    names = shown_names(tasks)
    turned = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if names == list(tasks) else {}
    axes.set_xticks(range(len(tasks)), names, **turned)
    axes.set_yticks(range(len(A)), [""] if is_single(A) else names)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_title(title)
    return image


def accuracy_over_stages(runs: Mapping[str, tuple[np.ndarray, Sequence[str]]], path: Path | str) -> None:
    """A panel per task, a line per run from the task's own stage to the last.

    `runs` maps a label to (A, tasks); a run without stages (one row) is a dashed level. Raises ValueError
    if the runs have not one order of tasks: their stages could not be compared.
    """
    tasks = common_order(runs)
    columns = min(PANELS_A_ROW, len(tasks))
    rows = -(-len(tasks) // columns)
    with rc_context(STYLE):
        figure = Figure(figsize=(2.6 * columns, 2.0 * rows + 0.6), layout="constrained")
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for panel, axes in enumerate(grid.flat):
            if panel >= len(tasks):
                axes.set_visible(False)
                continue
            for position, (label, (A, _)) in enumerate(runs.items()):
                draw_task(axes, np.asarray(A, float), panel, label, style(position))
            name = tasks[panel] if len(tasks[panel]) <= LONGEST else tasks[panel].replace("_", " ")
            axes.set_title(textwrap.fill(f"{panel + 1}. {name}", 24), fontsize=10)
            axes.set_ylim(-3, 103)
            axes.set_xlim(0.7, len(tasks) + 0.3)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        figure.supxlabel("stage (tasks trained so far)", fontsize=10)
        figure.supylabel("accuracy, %", fontsize=10)
        handles, labels = grid.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 4))
        save(figure, path)


def draw_task(axes: Axes, A: np.ndarray, task: int, label: str, look: dict[str, str]) -> None:
    """One run's line in one task's panel."""
    if is_single(A):
        axes.axhline(A[0, task], label=label, color=look["color"], linestyle="--", linewidth=1.3)
    else:
        stages = np.arange(task, len(A))
        axes.plot(stages + 1, A[stages, task], label=label, markersize=4, linewidth=1.5, **look)


def common_order(runs: Mapping[str, tuple[np.ndarray, Sequence[str]]]) -> list[str]:
    """The runs' tasks; ValueError naming the run that has others or another order, or if there is no run."""
    if not runs:
        raise ValueError("no runs to draw")
    first, *others = ((label, list(tasks), check_matrix(A)) for label, (A, tasks) in runs.items())
    for label, tasks, _ in others:
        if tasks != first[1]:
            raise ValueError(f"'{label}' has not the tasks or order of '{first[0]}': draw them apart")
    return first[1]


def average_vs_forgetting(points: Mapping[str, np.ndarray], path: Path | str) -> None:
    """Avg.ACC against Forgetting, both in percent: top left is best.

    `points` maps a method to (Avg.ACC, Forgetting), or to an array (seeds, 2) of them: small marks for
    seeds, a large one with its name for their mean.
    """
    if not points:
        raise ValueError("no methods to draw")
    with rc_context(STYLE):
        figure = Figure(figsize=(9.6, 6.4))
        axes, middles, marks = figure.subplots(), {}, []
        for position, (label, values) in enumerate(points.items()):
            seeds = np.atleast_2d(np.asarray(values, float))
            average, forgotten = seeds.mean(axis=0)
            look = style(position)
            if len(seeds) > 1:
                axes.scatter(seeds[:, 1], seeds[:, 0], s=14, alpha=0.5, linewidths=0, **look)
            axes.scatter(forgotten, average, s=70, edgecolors="white", linewidths=0.8, **look)
            middles.setdefault((round(forgotten, 6), round(average, 6)), []).append(label)
            marks += [(forgotten, average), *seeds[:, ::-1]]
        axes.set_xlabel("Forgetting (lower is better)")
        axes.set_ylabel("Avg.ACC, % (higher is better)")
        axes.margins(0.12)
        for limits, set_limits in ((axes.get_xlim(), axes.set_xlim), (axes.get_ylim(), axes.set_ylim)):
            missing = max(0.0, LEAST_SPAN - (limits[1] - limits[0])) / 2
            set_limits(limits[0] - missing, limits[1] + missing)
        names = [axes.text(*place, ", ".join(own), color="#222222", fontsize=9) for place, own in middles.items()]
        FigureCanvasAgg(figure).draw()  # names are moved apart by their sizes
        (x, y), (target_x, target_y) = np.transpose(marks), np.transpose(list(middles))
        arrow = {"arrowstyle": "-", "color": "#999999", "lw": 0.6}
        adjust_text(names, x, y, target_x=target_x, target_y=target_y, ax=axes, expand=(1.1, 1.5), iter_lim=500,
                    arrowprops=arrow)  # fmt: skip
        save(figure, path)


def beta_moves(stages: Sequence[tuple[str, int, pd.DataFrame | None]]) -> bool:
    """Whether a run, as `beta_over_steps` takes it, averages with more than one beta."""
    traces = [trace for *_, trace in stages if trace is not None]
    return bool(traces) and min(t["beta_q05"].min() for t in traces) < max(t["beta_q95"].max() for t in traces)


def beta_over_steps(runs: Mapping[str, Sequence[tuple[str, int, pd.DataFrame | None]]], path: Path | str) -> None:
    """The balance weight over a stream's optimizer steps, two panels per run: beta (median over the tensors, and the
    band from 5 to 95 %), and below it the share of tensors whose beta fell back.

    `runs` maps a label to (task, optimizer steps, trace) of every stage in its order. A trace has a row per step with
    the columns step, beta_q05, beta_q50, beta_q95 and fallback_share; None where the stage did not average.
    """
    if not runs:
        raise ValueError("no runs to draw")
    with rc_context(STYLE):
        figure = Figure(figsize=(10.4, 3.0 * len(runs) + 0.4), layout="constrained")
        panels = figure.subplots(2 * len(runs), 1, squeeze=False, height_ratios=[3, 1] * len(runs))[:, 0]
        for number, (label, stages) in enumerate(runs.items()):
            upper, lower = panels[2 * number : 2 * number + 2]
            end = 0
            for task, steps, trace in stages:
                middle = end + steps / 2
                words = {"transform": upper.get_xaxis_transform(), "ha": "center", "fontsize": 8}
                upper.text(middle, 1.02, task, **words)
                if trace is None:
                    upper.axvspan(end, end + steps, color="#eeeeee", linewidth=0)
                    upper.text(middle, 0.5, "no average", **words)
                else:
                    low, median, high = (trace[f"beta_q{q}"].clip(*BETA_SHOWN) for q in ("05", "50", "95"))
                    upper.fill_between(end + trace["step"], low, high, color=COLOURS[4], alpha=0.4, linewidth=0)
                    upper.plot(end + trace["step"], median, color=COLOURS[0], linewidth=0.9)
                    lower.fill_between(
                        end + trace["step"], 100 * trace["fallback_share"], color=COLOURS[1], step="mid", linewidth=0
                    )
                end += steps
                upper.axvline(end, color="#999999", linewidth=0.6)
                lower.axvline(end, color="#999999", linewidth=0.6)
            upper.set_yscale("logit")
            upper.set_yticks(ticks := [0.01, 0.1, 0.5, 0.9, 0.99, 0.999, 0.9999], [f"{tick:g}" for tick in ticks])
            upper.minorticks_off()
            upper.set_ylim(BETA_SHOWN[0] / 1.3, 1 - (1 - BETA_SHOWN[1]) / 1.3)
            upper.set_xlim(0, end)
            upper.tick_params(labelbottom=False)
            upper.set_ylabel("beta")
            upper.set_title(label, pad=18, loc="left")
            lower.set_xlim(0, end)
            lower.set_ylim(0, 100)
            lower.set_ylabel("fell\nback, %")
        panels[-1].set_xlabel("optimizer step of the stream")
        save(figure, path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m eval.figures", description="Draws scatters anew.")
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="a table's folder, with its runs.csv")
    for folder in parser.parse_args(arguments).folders:
        try:
            runs = pd.read_csv(folder / "runs.csv").dropna(subset="Forgetting").groupby("method", sort=False)
            points = {label: own[["Avg.ACC", "Forgetting"]].to_numpy() for label, own in runs}
            average_vs_forgetting(points, folder / "average_vs_forgetting.png")
        except (OSError, ValueError, KeyError) as error:
            raise SystemExit(f"eval.figures: {folder}: {error}") from error


if __name__ == "__main__":
    main()
