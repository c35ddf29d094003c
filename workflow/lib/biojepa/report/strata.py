"""Show where the model works: scores by strata of the held-out perturbations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd

from biojepa.contracts import CATEGORY
from biojepa.evaluation.strata import MISSING as UNKNOWN
from biojepa.evaluation.strata import PROPERTIES
from biojepa.evaluation.verdict import BETTER, DECIDING, WORSE
from biojepa.report.figures import (
    GROUP_STYLE,
    Caption,
    Figure,
    Spec,
    error_bars,
    escape,
    line,
    main_models,
    number,
)
from biojepa.report.glossary import MetricText, metric_text, model_text
from biojepa.report.inputs import ReportInputs
from biojepa.report.tables import MISSING, format_count, format_level, format_number, format_percent

LABELS = {
    "n_genes_seen": "Genes seen in training",
    "nearest_distance": "Distance to the nearest training gene",
    "prior_coverage": "Share of prior sources that cover it",
    "n_cells": "Cells",
    "n_significant": "Genes that differ from control",
    "effect_size": "Effect size",
    "duplicate_score": "Score of the duplicate",
    "baseline_gap": "Gap closed by the best baseline",
}
ABOUT = {
    "n_genes_seen": "how many of its genes occur in training perturbations",
    "nearest_distance": "1 − similarity of prior codes, least known gene; 0 where training perturbed it",
    "prior_coverage": "sources that have a code for all of its genes",
    "n_cells": "cells of the perturbation, both halves",
    "n_significant": "in half A of its cells, which no score but the duplicate's looks at",
    "effect_size": "length of the change of half A against control, sampling noise subtracted (log1p units)",
    "duplicate_score": "how well the truth itself can be measured; drawn from the cells that are scored",
    "baseline_gap": "how much a simple model explains already; drawn from the scores that are compared",
}
assert set(LABELS) == set(ABOUT) == set(PROPERTIES) - {CATEGORY}


@dataclass(frozen=True)
class StratumRow:
    """One stratum in the table: its range and the scores of the three models that matter."""

    label: str
    range: str
    n: str
    scores: list[tuple[str, str]]
    difference: str
    interval: str
    outcome: str
    gap: str


def strata_view(inputs: ReportInputs) -> dict[str, Any] | None:
    """Return the figure and the tables of the section, None where nothing was stratified."""
    table = inputs.strata
    if table is None:
        return None
    table = table[table["property"].isin(LABELS)]
    metrics = [metric_text(name) for name in DECIDING if (table["metric"] == name).any()]
    if not metrics:
        return None
    tables = [_table(inputs, table[table["metric"] == metric.name], metric) for metric in metrics]
    return {
        "figure": _figure(inputs, table, metrics),
        "tables": tables,
        "models": tables[0]["models"],
        "left_out": [LABELS[name] for name in LABELS if name not in set(table["property"])],
    }


def _shown_models(inputs: ReportInputs, table: pd.DataFrame) -> list[str]:
    """Return the model under test, the baseline that the strata are compared with, and the duplicate."""
    best = table["best_baseline"].dropna().astype(str)
    wanted = [inputs.lead_model, *best.head(1), "duplicate"]
    present = set(table["model"])
    return [name for name in dict.fromkeys(wanted) if name in present] or [
        name for name in main_models(inputs) if name in present
    ]


def _range(row: dict[str, Any]) -> str:
    if row["stratum"] == UNKNOWN:
        return "not known"
    ends = [f"{float(row[end]):.3g}".replace("-", "−") for end in ("lower", "upper")]
    return ends[0] if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"


def _strata_of(table: pd.DataFrame, prop: str) -> list[dict[str, Any]]:
    """Return the strata of a property in their order, each with its rows by model."""
    rows = table[table["property"] == prop]
    strata = []
    for name in dict.fromkeys(rows["stratum"]):
        inside = rows[rows["stratum"] == name].to_dict("records")
        strata.append({**inside[0], "rows": {str(row["model"]): row for row in inside}})
    return strata


def _n_of(stratum: dict[str, Any]) -> int:
    """Return the perturbations of a stratum that some model was scored on."""
    return max(row["n"] for row in stratum["rows"].values())


def _table(inputs: ReportInputs, table: pd.DataFrame, metric: MetricText) -> dict[str, Any]:
    names = _shown_models(inputs, table)
    groups = []
    for prop, label in LABELS.items():
        rows = []
        for stratum in _strata_of(table, prop):
            scores = []
            for name in names:
                row = stratum["rows"].get(name)
                scores.append(
                    (MISSING, "")
                    if row is None
                    else (format_number(row["mean"]), _interval(row, "ci_low", "ci_high"))
                )
            lead = stratum["rows"].get(inputs.lead_model, {})
            low, high = lead.get("difference_ci_low"), lead.get("difference_ci_high")
            rows.append(
                StratumRow(
                    label=str(stratum["stratum"]),
                    range=_range(stratum),
                    n=format_count(_n_of(stratum)),
                    scores=scores,
                    difference=format_number(lead.get("difference")),
                    interval=_interval(lead, "difference_ci_low", "difference_ci_high"),
                    outcome=_outcome(low, high),
                    gap=format_percent(lead.get("gap_closed")),
                )
            )
        if rows:
            groups.append((label, ABOUT[prop], rows))
    models = [model_text(name, inputs.lead_model) for name in names]
    return {"metric": metric, "models": models, "groups": groups, "usable": inputs.usable(metric.name)}


def _interval(row: dict[str, Any], low: str, high: str) -> str:
    ends = [format_number(row.get(name)) for name in (low, high)]
    return "" if MISSING in ends else " to ".join(ends)


def _outcome(low: Any, high: Any) -> str:
    """Say of the difference to the best baseline what its interval alone supports; empty for neither."""
    if low is None or pd.isna(low) or pd.isna(high):
        return ""
    if low > 0:
        return BETTER
    return WORSE if high < 0 else ""


def _figure(inputs: ReportInputs, table: pd.DataFrame, metrics: list[MetricText]) -> Figure:
    options = {
        f"{label}: {metric.label} {metric.arrow}": _panel(
            inputs, table[table["metric"] == metric.name], prop, metric
        )
        for metric in metrics
        for prop, label in LABELS.items()
        if ((table["metric"] == metric.name) & (table["property"] == prop)).any()
    }
    largest = table.groupby(["metric", "property", "stratum"])["n"].max()
    caption = Caption(
        title="Scores by properties of the perturbation",
        shows=f"Mean and {format_level(inputs.confidence)} interval of the model, of the simple model that "
        "is best over all perturbations, and of the duplicate, in parts of about equal size by one property.",
        read="Where the duplicate falls, the truth is noise and no model can score. Where it stays high and "
        "the model falls, the model does not know such perturbations.",
        n=f"{format_count(largest.min())} to {format_count(largest.max())} perturbations in a part",
        thresholds="cut at terciles, equal values kept together, as many parts as hold the least number of "
        "perturbations that the verdict asks for",
        misleads="Properties go together: strong effects have more significant genes. Effects are those of "
        "half A, which is what the duplicate predicts, so chance flatters it in the highest part. Sorted by "
        "the score of the duplicate or the baseline, chance alone makes that score low in the lowest part, "
        "and a model looks better than the baseline there.",
    )
    return Figure("strata", options, caption, height=360, selector="By")


def _panel(inputs: ReportInputs, table: pd.DataFrame, prop: str, metric: MetricText) -> Spec:
    strata = _strata_of(table, prop)
    names = _shown_models(inputs, table)
    traces = []
    for position, name in enumerate(names):
        found = [(place, s["rows"][name]) for place, s in enumerate(strata) if name in s["rows"]]
        if found:
            traces.append(_trace(inputs, name, found, 0.16 * (position - (len(names) - 1) / 2)))
    target = metric.null if isinstance(metric.best, str) else metric.best
    ticks = [
        f"{escape(stratum['stratum'])}<br>{escape(_range(stratum))}<br>n = {format_count(_n_of(stratum))}"
        for stratum in strata
    ]
    return {
        "data": traces,
        "layout": {
            "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "xanchor": "left"},
            "margin": {"t": 8, "r": 12, "b": 76, "l": 8},
            "xaxis": {
                "title": {"text": LABELS[prop]},
                "tickmode": "array",
                "tickvals": list(range(len(strata))),
                "ticktext": ticks,
                "range": [-0.5, len(strata) - 0.5],
                "showgrid": False,
                "zeroline": False,
            },
            "yaxis": {"title": {"text": f"{metric.label} ({metric.direction})"}, "automargin": True},
            "shapes": [line(target, "y")] if target is not None else [],
        },
    }


def _trace(inputs: ReportInputs, name: str, found: list[tuple[int, dict[str, Any]]], offset: float) -> Spec:
    model = model_text(name, inputs.lead_model)
    style = dict(GROUP_STYLE[model.group])
    rows = [row for _, row in found]
    level = format_level(inputs.confidence)
    is_best = name == str(rows[0]["best_baseline"])
    if is_best:
        style["color"] = "@best"
    return {
        "type": "scatter",
        "mode": "markers",
        "name": escape(model.label) + (" (best baseline)" if is_best else ""),
        "x": [round(place + offset, 3) for place, _ in found],
        "y": [number(row["mean"]) for row in rows],
        "error_y": error_bars(
            [row["mean"] for row in rows],
            [row["ci_low"] for row in rows],
            [row["ci_high"] for row in rows],
            {"thickness": 1.3, "width": 0, "color": style["color"]},
        ),
        "marker": {**style, "line": {"width": 1.5, "color": style["color"]}},
        "customdata": [
            [format_count(row["n"]), _interval(row, "ci_low", "ci_high") or MISSING] for row in rows
        ],
        "hovertemplate": "%{y:.3f} (" + level + " interval %{customdata[1]}), n = %{customdata[0]}",
    }
