"""The pages' charts, in Vega-Lite: specifications with their data in them, without colours of the page."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

POINTS = 200  # of beta, a stage
SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"


def line_chart(found: pd.DataFrame, what: str) -> dict[str, Any]:
    """A Vega-Lite chart of percentages [stages, columns], a line a column, which is a `what`."""
    values = [
        {"stage": stage, what: name, "accuracy": round(float(value), 2)}
        for stage, cells in found.iterrows()
        for name, value in cells.items()
        if not np.isnan(value)
    ]
    hover = {"on": "pointerover", "type": "point", "fields": [what], "clear": "pointerout"}
    scheme = "tableau10" if found.shape[1] <= 10 else "tableau20"
    return {
        "$schema": SCHEMA,
        "description": f"Accuracy in percent of every {what} after every stage.",
        "data": {"values": values},
        "width": "container",
        "height": 300,
        "params": [{"name": "hover", "select": hover}],
        "mark": {"type": "line", "point": {"size": 60, "filled": True}},
        "encoding": {
            "x": {"field": "stage", "type": "ordinal", "sort": list(found.index), "title": "After stage",
                  "axis": {"labelAngle": -30}},
            "y": {"field": "accuracy", "type": "quantitative", "scale": {"domain": [0, 100]}, "title": "Accuracy, %"},
            "color": {"field": what, "type": "nominal", "sort": list(found.columns), "title": what.capitalize(),
                      "scale": {"scheme": scheme}},
            "opacity": {"condition": {"param": "hover", "value": 1, "empty": True}, "value": 0.15},
            "tooltip": [{"field": name, "type": kind} for name, kind in
                        ((what, "nominal"), ("stage", "nominal"), ("accuracy", "quantitative"))],
        },
    }  # fmt: skip


def beta_chart(traces: Sequence[tuple[str, int, pd.DataFrame | None]]) -> dict[str, Any] | None:
    """A Vega-Lite chart of beta's quantiles over the optimizer steps of all stages; None where no stage averages."""
    values, begin = [], 0
    for number, (task, steps, trace) in enumerate(traces):
        if trace is not None and len(trace):
            for row in trace.iloc[:: max(1, len(trace) // POINTS)].to_dict("records"):
                values.append(
                    {
                        "step": begin + int(row["step"]),
                        "stage": f"{number + 1}, {task}",
                        **{name: round(float(row[f"beta_{name}"]), 6) for name in ("q05", "q50", "q95")},
                    }
                )
        begin += steps
    if not values:
        return None
    x = {"field": "step", "type": "quantitative", "scale": {"domain": [0, begin]}, "title": "Optimizer step of the run"}
    color = {"field": "stage", "type": "nominal", "sort": None, "title": "Stage", "legend": {"symbolOpacity": 1}}
    scale = {"zero": False}
    return {
        "$schema": SCHEMA,
        "description": "Median and 5th to 95th percentile over tensors of the balance weight, step by step.",
        "data": {"values": values},
        "width": "container",
        "height": 220,
        "encoding": {"x": x, "color": color},
        "layer": [
            {"mark": {"type": "area", "opacity": 0.25},
             "encoding": {"y": {"field": "q05", "type": "quantitative", "scale": scale, "title": "beta"},
                          "y2": {"field": "q95"}}},
            {"mark": {"type": "line"},
             "encoding": {"y": {"field": "q50", "type": "quantitative", "scale": scale},
                          "tooltip": [{"field": "stage"}, {"field": "step"}, {"field": "q50", "title": "median"}]}},
        ],
    }  # fmt: skip


def scatter(points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A Vega-Lite chart of Avg.ACC against Forgetting, a point a run; a click on the legend shows one method."""
    names = list(dict.fromkeys(point["method"] for point in points))
    values = [{**point, "avg": point["Avg.ACC"], "forgetting": point["Forgetting"]} for point in points]
    chosen = {"type": "point", "fields": ["method"]}
    return {
        "$schema": SCHEMA,
        "description": "Avg.ACC against Forgetting of every run; the table below has the same numbers.",
        "data": {"values": values},
        "width": "container",
        "height": 380,
        "params": [{"name": "chosen", "select": chosen, "bind": "legend"}],
        "mark": {"type": "point", "filled": True, "size": 90},
        "encoding": {
            "x": {"field": "forgetting", "type": "quantitative", "title": "Forgetting (points; less is better)"},
            "y": {"field": "avg", "type": "quantitative", "scale": {"zero": False}, "title": "Avg.ACC (percent)"},
            "color": {"field": "method", "type": "nominal", "sort": names, "title": "Method",
                      "scale": {"scheme": "tableau20" if len(names) > 10 else "tableau10"},
                      "legend": {"columns": 1, "symbolLimit": 60}},
            "opacity": {"condition": {"param": "chosen", "value": 0.95}, "value": 0.08},
            "tooltip": [{"field": name} for name in ("method", "run", "seed", "avg", "forgetting")],
        },
    }  # fmt: skip
