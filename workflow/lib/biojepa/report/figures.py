"""Figures of the scores: plain plotly dictionaries with captions, coloured by the page's theme.

A colour is written as a token such as ``@main``; the page replaces it by a colour of the current
theme. Every text that comes from data passes through :func:`escape`, because plotly draws a subset
of HTML.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from biojepa.contracts import OTHER_CONTEXT
from biojepa.report.glossary import (
    ABLATION,
    BASELINE,
    MAIN,
    NEGATIVE,
    OTHER,
    POSITIVE,
    SEEN_CATEGORIES,
    UNSEEN_CATEGORIES,
    MetricText,
    ModelText,
    category_label,
    metric_text,
    model_text,
)
from biojepa.report.inputs import ReportInputs
from biojepa.report.tables import (
    categories_present,
    format_count,
    format_level,
    format_number,
    ordered_models,
    ranked_among,
)

Spec = dict[str, Any]
MAX_ABLATIONS_DRAWN = 8
# Points of one scatter; genome-wide screens have more perturbations than a page can hold.
MAX_POINTS = 3_000

GROUP_STYLE: dict[str, dict[str, Any]] = {
    MAIN: {"color": "@main", "symbol": "diamond", "size": 11},
    OTHER: {"color": "@other", "symbol": "triangle-up", "size": 9},
    ABLATION: {"color": "@ablation", "symbol": "triangle-down", "size": 9},
    BASELINE: {"color": "@baseline", "symbol": "circle", "size": 8},
    NEGATIVE: {"color": "@negative", "symbol": "x-thin-open", "size": 8},
    POSITIVE: {"color": "@positive", "symbol": "square", "size": 8},
}


@dataclass(frozen=True)
class Caption:
    """What a reader must know to read a figure without being misled."""

    title: str
    shows: str
    read: str
    n: str
    thresholds: str
    misleads: str


@dataclass(frozen=True)
class Figure:
    """One figure: an identifier, one specification per choice of its selector, and a caption.

    ``options`` maps the label of a choice to a specification; a figure without a selector has one
    entry. ``height`` is in CSS pixels.
    """

    key: str
    options: dict[str, Spec]
    caption: Caption
    height: int = 360
    selector: str = ""

    @property
    def spec(self) -> Spec:
        """Return the specification that is shown first."""
        return next(iter(self.options.values()))


def escape(text: object) -> str:
    """Return text that plotly draws as it is: names such as ``<b>x</b>`` are data, not mark-up."""
    return html.escape(str(text), quote=False)


def sentence(text: str) -> str:
    """Return text with a capital first letter, the rest as it is."""
    return text[:1].upper() + text[1:]


def number(value: Any, digits: int = 5) -> float | None:
    """Return a number with a few significant digits, or None, which JSON has for a missing value."""
    if value is None or pd.isna(value) or not math.isfinite(float(value)):
        return None
    return float(f"{float(value):.{digits}g}")


def numbers(values: Any, digits: int = 5) -> list[float | None]:
    """Round every value of a column."""
    return [number(value, digits) for value in values]


def evenly(table: pd.DataFrame, limit: int) -> pd.DataFrame:
    """Return at most ``limit`` rows, evenly spaced in their order, so that every part keeps its share."""
    if len(table) <= limit:
        return table
    return table.iloc[np.linspace(0, len(table) - 1, limit).round().astype(int)]


def from_zero(highest: float) -> list[float]:
    """Return the range of an axis that begins at 0, with room so that points at 0 are drawn whole."""
    highest = max(float(highest), 1.0)
    return [float(f"{-0.04 * highest:.4g}"), float(f"{1.08 * highest:.4g}")]


def line(value: float, axis: str, dash: str = "dot", color: str = "@ink") -> Spec:
    """Return a straight line across the plot at ``value`` of the x or y axis."""
    across = {"x0": value, "x1": value, "y0": 0, "y1": 1, "yref": "paper"}
    along = {"y0": value, "y1": value, "x0": 0, "x1": 1, "xref": "paper"}
    ends = across if axis == "x" else along
    return {"type": "line", "layer": "below", "line": {"color": color, "dash": dash, "width": 1.2}, **ends}


def error_bars(values: Any, low: Any, high: Any, style: Spec, digits: int = 5) -> Spec:
    """Return plotly's error bars from ``low`` to ``high`` around ``values``, missing where a bound is.

    Parameters
    ----------
    values, low, high
        (points,) in the units of the axis.
    style
        Thickness, width of the caps and colour.
    digits
        Significant digits of the lengths.
    """
    values, low, high = (np.asarray(column, dtype=float) for column in (values, low, high))
    return {
        "type": "data",
        "symmetric": False,
        "array": numbers(high - values, digits),
        "arrayminus": numbers(values - low, digits),
        **style,
    }


def calibration_figures(inputs: ReportInputs) -> list[Figure]:
    """Draw one panel per headline metric: every model with its interval, over the dynamic range."""
    return [calibration_panel(inputs, metric_text(name)) for name in inputs.headline_metrics]


def drawn_models(inputs: ReportInputs, present: Iterable[str]) -> tuple[list[ModelText], str]:
    """Return the models that one panel draws, best first, and a note on those that it leaves out.

    Many ablations would bury the controls; they stay in the tables and in the section on the ablation.
    """
    known = set(present)
    models = [model for model in ordered_models(inputs) if model.name in known]
    ablations = sum(model.group == ABLATION for model in models)
    if ablations <= MAX_ABLATIONS_DRAWN:
        return models, ""
    kept = [model for model in models if model.group != ABLATION]
    return kept, f"; {ablations} ablations are left to the tables"


def main_models(inputs: ReportInputs) -> list[str]:
    """Return the main model, the best baseline and the duplicate, where they were run."""
    wanted = [inputs.lead_model, inputs.best_baseline(), "duplicate"]
    return [name for name in dict.fromkeys(wanted) if name and name in inputs.models]


def calibration_panel(inputs: ReportInputs, metric: MetricText) -> Figure:
    """Draw every model with its interval on one metric, over the range that the dataset allows."""
    rows = inputs.pooled[inputs.pooled["metric"] == metric.name].set_index("model")
    models, left_out = drawn_models(inputs, rows.index)
    level, among = format_level(inputs.confidence), ranked_among(inputs, metric.name)
    traces = []
    for group in dict.fromkeys(model.group for model in models):
        members = [model for model in models if model.group == group]
        traces.append(_interval_trace(rows, members, level))
    spec = {
        "data": traces,
        "layout": {
            "showlegend": False,
            "margin": {"t": 8, "r": 12, "b": 36, "l": 8},
            "xaxis": {"title": {"text": f"{metric.label} ({metric.direction})"}, "nticks": 6},
            "yaxis": {
                "type": "category",
                "categoryorder": "array",
                "categoryarray": [escape(model.label) for model in reversed(models)],
                "range": [-0.6, len(models) - 0.4],
                "automargin": True,
                "showgrid": False,
                "tickfont": {"size": 11},
            },
            "shapes": _range_shapes(rows, metric),
        },
    }
    n = rows["n"].max() if len(rows) else 0
    usable = inputs.usable(metric.name)
    dynamic = inputs.verdict.get("dynamic_range", {}).get(metric.name, {})
    interval = (
        f"{format_number(dynamic.get('mean'))} "
        f"({format_number(dynamic.get('low'))} to {format_number(dynamic.get('high'))})"
    )
    caption = Caption(
        title=f"{metric.label} {metric.arrow}",
        shows=f"Mean and {level} interval; band: training mean to duplicate, {interval}.",
        read=f"{sentence(metric.read)}.",
        n=f"{format_count(n)} held-out perturbations{f', each {among}' if among else ''}{left_out}",
        thresholds="unusable where the interval of that range includes 0",
        misleads="" if usable else "Here it cannot tell a replicate from a constant guess.",
    )
    return Figure(f"calibration-{metric.name}", {"": spec}, caption, height=70 + 21 * len(models))


def _interval_trace(rows: pd.DataFrame, models: list[ModelText], level: str) -> Spec:
    names = [model.name for model in models]
    found = rows.loc[names]
    style = GROUP_STYLE[models[0].group]
    return {
        "type": "scatter",
        "mode": "markers",
        "x": numbers(found["mean"]),
        "y": [escape(model.label) for model in models],
        "error_x": error_bars(
            found["mean"], found["ci_low"], found["ci_high"],
            {"thickness": 1.4, "width": 0, "color": style["color"]},
        ),
        "marker": {**style, "line": {"width": 1.6 if style["symbol"].endswith("open") else 0.5,
                                     "color": style["color"]}},
        "customdata": [
            [escape(name), format_number(low), format_number(high), format_count(n), escape(model.about)]
            for name, low, high, n, model in zip(
                names, found["ci_low"], found["ci_high"], found["n"], models, strict=True
            )
        ],
        "hovertemplate": "<b>%{y}</b> (%{customdata[0]})<br>%{x:.3f}, " + level + " interval "
        "%{customdata[1]} to %{customdata[2]}<br>n = %{customdata[3]}<br>%{customdata[4]}<extra></extra>",
    }  # fmt: skip


def _range_shapes(rows: pd.DataFrame, metric: MetricText) -> list[Spec]:
    """Return the band from the training mean to the duplicate and the line of knowing nothing."""
    shapes: list[Spec] = []
    if {"mean", "duplicate"} <= set(rows.index):
        ends = [number(rows.loc[name, "mean"]) for name in ("mean", "duplicate")]
        if None not in ends:
            shapes.append(
                {"type": "rect", "layer": "below", "yref": "paper", "y0": 0, "y1": 1, "x0": ends[0],
                 "x1": ends[1], "fillcolor": "@band", "line": {"width": 0}}
            )  # fmt: skip
    target = metric.null if isinstance(metric.best, str) else metric.best
    if target is not None:
        shapes.append(line(target, "x"))
    return shapes


def category_figure(inputs: ReportInputs) -> Figure | None:
    """Draw the main models by category, one metric at a time, or None without categories."""
    categories = categories_present(inputs)
    if not categories:
        return None
    options = {
        f"{metric_text(name).label} {metric_text(name).arrow}": _category_panel(inputs, name, categories)
        for name in inputs.headline_metrics
    }
    counts = inputs.summary[inputs.summary["category"].isin(categories)].groupby("category")["n"].max()
    caption = Caption(
        title="Scores by what was seen in training",
        shows=f"Mean and {format_level(inputs.confidence)} interval of the main models for each kind of "
        "held-out perturbation.",
        read="Compare within a row." + _what_differs(categories),
        n="; ".join(f"{category_label(name)}: {format_count(counts[name])}" for name in categories),
        thresholds="a row needs at least 3 perturbations before its interval means anything",
        misleads="A bootstrap over a handful of perturbations gives intervals that are too narrow. The best "
        "baseline is marked for all perturbations together; it may differ by category (table below).",
    )
    height = 120 + len(categories) * (26 + 15 * len(comparison_models(inputs)))
    return Figure("categories", options, caption, height=min(height, 900), selector="Metric")


def _what_differs(categories: list[str]) -> str:
    """Say how the tasks of the categories differ, as far as those present do."""
    present, text = set(categories), ""
    if present & set(SEEN_CATEGORIES) and present & set(UNSEEN_CATEGORIES):
        text += (
            " What is composed of seen genes (top) is an easier task than a gene never perturbed in training "
            "(bottom); a mean over both mixes two questions."
        )
    if OTHER_CONTEXT in present:
        text += (
            " A perturbation that was trained in another context asks whether its change carries over to "
            "this one" + ("; a mean with the other rows mixes two questions." if len(categories) > 1 else ".")
        )
    return text


def comparison_models(inputs: ReportInputs) -> list[str]:
    """Return the few models that detailed figures compare, the main model first."""
    wanted = [inputs.lead_model, inputs.best_baseline()]
    wanted += ["multihot", "additive", "no_change", "mean", "duplicate"]
    return [name for name in dict.fromkeys(wanted) if name and name in inputs.models][:7]


def _category_panel(inputs: ReportInputs, metric: str, categories: list[str]) -> Spec:
    models = comparison_models(inputs)
    table = inputs.summary[(inputs.summary["metric"] == metric) & inputs.summary["category"].isin(categories)]
    rows = {(row["category"], row["model"]): row for row in table.to_dict("records")}
    best = inputs.best_baseline(metric)
    traces = []
    for position, name in enumerate(models):
        # Models of one category lie below each other, the first on top.
        offset = 0.36 - 0.72 * position / max(len(models) - 1, 1)
        found = [
            (round(height + offset, 3), rows[category, name])
            for height, category in enumerate(reversed(categories))
            if (category, name) in rows
        ]
        if found:
            traces.append(_category_trace(model_text(name, inputs.lead_model), found, name == best))
    text = metric_text(metric)
    shapes = [line(height + 0.5, "y", dash="solid", color="@grid") for height in range(len(categories) - 1)]
    target = text.null if isinstance(text.best, str) else text.best
    return {
        "data": traces,
        "layout": {
            "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "xanchor": "left"},
            "margin": {"t": 8, "r": 12, "b": 40, "l": 8},
            "xaxis": {"title": {"text": f"{text.label} ({text.direction})"}},
            "yaxis": {
                "tickmode": "array",
                "tickvals": list(range(len(categories))),
                "ticktext": [_wrap(category_label(name)) for name in reversed(categories)],
                "range": [-0.6, len(categories) - 0.4],
                "automargin": True,
                "showgrid": False,
                "zeroline": False,
            },
            "shapes": shapes + ([line(target, "x")] if target is not None else []),
        },
    }


def _category_trace(model: ModelText, found: list[tuple[float, Any]], is_best: bool) -> Spec:
    """Return the points of one model: heights and rows of the summary, one per category."""
    style = dict(GROUP_STYLE[model.group])
    if is_best:
        style["color"] = "@best"
    return {
        "type": "scatter",
        "mode": "markers",
        "name": escape(model.label) + (" (best baseline)" if is_best else ""),
        "x": [number(row["mean"]) for _, row in found],
        "y": [height for height, _ in found],
        "error_x": error_bars(
            [row["mean"] for _, row in found],
            [row["ci_low"] for _, row in found],
            [row["ci_high"] for _, row in found],
            {"thickness": 1.3, "width": 0, "color": style["color"]},
        ),
        "marker": {**style, "line": {"width": 1.5, "color": style["color"]}},
        "customdata": [format_count(row["n"]) for _, row in found],
        "hovertemplate": "%{x:.3f}, n = %{customdata}",
    }


def _wrap(label: str) -> str:
    """Break a label after its comma, in plotly's mark-up."""
    return escape(label).replace(", ", ",<br>", 1)
