"""Still figures for Snakemake's own report: SVG drawn by matplotlib, the same bytes for the same input."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from biojepa.report.glossary import MAIN, metric_text, model_text
from biojepa.report.inputs import ReportInputs
from biojepa.report.tables import ordered_models, per_perturbation_scores

COLORS = {
    "main": "#d55e00",
    "ablation": "#cc79a7",
    "other": "#e69f00",
    "baseline": "#0072b2",
    "negative": "#7d8288",
    "positive": "#009e73",
}
MARKERS = {"main": "D", "ablation": "v", "other": "^", "baseline": "o", "negative": "x", "positive": "s"}


@contextmanager
def _plain_style() -> Iterator[None]:
    """Draw names as they are (no mathematics in ``$``) and identifiers that do not change by the run."""
    settings: dict[Any, Any] = {
        "text.parse_math": False,
        "svg.hashsalt": "biojepa",
        "svg.fonttype": "path",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 9,
        "axes.titlelocation": "left",
    }
    with matplotlib.rc_context(settings):
        yield


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def calibration_svg(inputs: ReportInputs) -> str:
    """Draw every model on every headline metric with its interval, as SVG text.

    The band runs from the training mean to the technical duplicate.
    """
    models = ordered_models(inputs)[::-1]
    metrics = inputs.headline_metrics
    columns = min(3, len(metrics)) or 1
    rows = max(1, -(-len(metrics) // columns))
    with _plain_style():
        figure = Figure(
            figsize=(3.1 * columns + 1.6, (0.21 * len(models) + 1.0) * rows), layout="constrained"
        )
        axes = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
        for axis, name in zip(axes, metrics, strict=False):
            table = inputs.pooled[inputs.pooled["metric"] == name].set_index("model")
            if {"mean", "duplicate"} <= set(table.index):
                ends = table.loc[["mean", "duplicate"], "mean"].to_numpy(float)
                if np.isfinite(ends).all():
                    axis.axvspan(*sorted(ends), color="#009e73", alpha=0.10, linewidth=0)
            for position, model in enumerate(models):
                if model.name not in table.index:
                    continue
                row = table.loc[model.name]
                color = COLORS[model.group]
                axis.plot([row["ci_low"], row["ci_high"]], [position, position], color=color, linewidth=1.3)
                axis.plot([row["mean"]], [position], MARKERS[model.group], color=color, markersize=4.5)
            text = metric_text(name)
            axis.set_title(
                f"{text.label} {text.arrow}" + ("" if inputs.usable(name) else "  (unusable here)")
            )
            axis.grid(axis="x", color="#e3e3e0", linewidth=0.6)
            axis.set_axisbelow(True)
            axis.set_yticks(range(len(models)), [model.label for model in models], fontsize=7.5)
        for axis in axes[len(metrics) :]:
            axis.set_axis_off()
        return _svg(figure)


def scatter_svg(inputs: ReportInputs) -> str:
    """Draw the main model against the best baseline, one point per perturbation and headline metric."""
    scores = per_perturbation_scores(inputs)
    lead = inputs.lead_model
    metrics = [name for name in inputs.headline_metrics if name in set(scores["metric"])]
    columns = min(3, len(metrics)) or 1
    rows = max(1, -(-len(metrics) // columns))
    with _plain_style():
        figure = Figure(figsize=(3.3 * columns, 3.2 * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for axis, name in zip(axes, metrics, strict=False):
            baseline = inputs.best_baseline(name) or inputs.models[0]
            wide = scores[scores["metric"] == name].pivot(
                index="perturbation", columns="model", values="value"
            )
            pairs = _pairs(wide, lead, baseline)
            if len(pairs):
                low, high = float(pairs.to_numpy().min()), float(pairs.to_numpy().max())
                axis.plot([low, high], [low, high], color="#555555", linewidth=0.9, linestyle=":")
                axis.plot(pairs[baseline], pairs[lead], "o", color=COLORS[MAIN], alpha=0.75, markersize=4)
            text = metric_text(name)
            axis.set_title(f"{text.label} {text.arrow}, n = {len(pairs)}")
            axis.set_xlabel(f"{model_text(baseline).label} (best baseline)")
            axis.set_ylabel(model_text(lead, lead).label)
        for axis in axes[len(metrics) :]:
            axis.set_axis_off()
        return _svg(figure)


def _pairs(wide: pd.DataFrame, lead: str, baseline: str) -> pd.DataFrame:
    """Return the scores of both models where both have one; nothing when they are the same model."""
    if lead == baseline or not {lead, baseline} <= set(wide.columns):
        return pd.DataFrame()
    return wide[[baseline, lead]].dropna()
