"""Show whether one can know beforehand how good a prediction will be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from biojepa.contracts import CATEGORY, PERTURBATION
from biojepa.evaluation.resampling import bootstrap_means, interval
from biojepa.evaluation.trust import METRIC
from biojepa.report.figures import Caption, Figure, Spec, error_bars, escape, number, numbers
from biojepa.report.glossary import category_label, metric_text, model_text
from biojepa.report.inputs import ReportInputs
from biojepa.report.tables import MISSING, format_count, format_level, format_number, format_percent

MIN_BIN, MAX_BINS = 8, 5
DRAWS = 1000


def trust_view(inputs: ReportInputs) -> dict[str, Any] | None:
    """Return sentence, facts and figures of the section, None where nothing was recorded."""
    table = inputs.trust
    judged = inputs.verdict.get("trust")
    if table is None or not judged:
        return None
    fitted = table[table["expected"].notna() & table["observed"].notna()].reset_index(drop=True)
    return {
        "sentence": judged.get("sentence", ""),
        "skill": bool(judged.get("skill")),
        "facts": _facts(judged, inputs.confidence) if len(fitted) else [],
        "figures": [_figure(inputs, fitted, judged)] if len(fitted) else [],
    }


def _facts(judged: dict[str, Any], confidence: float) -> list[tuple[str, str]]:
    def between(name: str, show: Any) -> str:
        ends = [show(judged.get(f"{name}_ci_{end}")) for end in ("low", "high")]
        return "" if MISSING in ends else f" ({ends[0]} to {ends[1]})"

    return [
        ("Mean error of the expected accuracy", format_number(judged.get("mae"))),
        ("Mean error of one guess for all", format_number(judged.get("mae_guess"))),
        (
            f"Gain, {format_level(confidence)} interval",
            format_number(judged.get("gain")) + between("gain", format_number),
        ),
        (
            "Correlation of observed accuracy with what the features add",
            format_number(judged.get("correlation")),
        ),
        (
            f"Share of held-out scores inside their {format_percent(judged.get('nominal'))} interval",
            format_percent(judged.get("coverage")) + between("coverage", format_percent),
        ),
    ]


def quantile_bins(table: pd.DataFrame, confidence: float) -> pd.DataFrame:
    """Average expected and observed accuracy in bins of about equal size by the expected one.

    Returns
    -------
    pandas.DataFrame
        ``expected``, ``observed``, ``low``, ``high`` (bootstrap interval of the observed mean), ``n``; at
        most 5 bins of at least 8 rows, none where not even two are that large. Equal expectations may
        fall into two bins.
    """
    n_bins = min(MAX_BINS, len(table) // MIN_BIN)
    rows = []
    if n_bins >= 2:
        order = np.lexsort((table[PERTURBATION].to_numpy(), table["expected"].to_numpy()))
        rng = np.random.default_rng(0)
        for inside in np.array_split(order, n_bins):
            observed = table["observed"].to_numpy(float)[inside]
            n = len(inside)
            counts = rng.multinomial(n, np.full(n, 1 / n), size=DRAWS).astype(float)
            low, high = interval(bootstrap_means(observed[:, None], counts), confidence)
            mean = float(table["expected"].to_numpy(float)[inside].mean())
            rows.append((mean, float(observed.mean()), float(low[0]), float(high[0]), n))
    return pd.DataFrame(rows, columns=["expected", "observed", "low", "high", "n"])


def _figure(inputs: ReportInputs, table: pd.DataFrame, judged: dict[str, Any]) -> Figure:
    metric, model = metric_text(METRIC), model_text(str(judged.get("model", inputs.lead_model)))
    bins = quantile_bins(table, inputs.confidence)
    ends = [-1.0, 1.0]
    # Expectations vary less than what is observed, and would fill a corner of a square.
    across = [number(table["expected"].min() - 0.05), number(table["expected"].max() + 0.05)]
    drawn = table[["observed", "low", "high"]]
    along = [number(drawn.min().min() - 0.05), number(drawn.max().max() + 0.05)]
    identity = {"type": "scatter", "mode": "lines", "x": ends, "y": ends, "hoverinfo": "skip",
                "showlegend": False, "line": {"color": "@ink", "dash": "dot", "width": 1.2}}  # fmt: skip
    seen = table["n_genes_seen"] > 0
    traces = [identity, _intervals(table)]
    for rows, name, color, symbol in (
        (table[seen], "a gene of it was seen in training", "@main", "diamond"),
        (table[~seen], "no gene of it was seen", "@other", "circle"),
    ):
        if len(rows):
            traces.append(_points(rows, name, color, symbol))
    if len(bins):
        traces.append(_means(bins))
    size = f" in each of {len(bins)} bins" if len(bins) else ""
    caption = Caption(
        title="Expected against observed accuracy",
        shows=f"Each point is a held-out perturbation: the accuracy of {model.label} ({metric.label}) that "
        "was to be expected of it from a fit to other perturbations, and the one observed. Thin lines: its "
        f"{format_percent(judged.get('nominal'))} interval; squares: means{size} with their "
        f"{format_level(inputs.confidence)} interval.",
        read="On the dotted line the expectation is right on average. A cloud without a slope means that "
        "nothing known beforehand tells good from bad predictions.",
        n=f"{format_count(len(table))} perturbations",
        thresholds=f"bins of about equal size, at least {MIN_BIN} perturbations each",
        misleads="Perturbations that nobody has measured may differ from all that were held out; the fit is "
        "never extended beyond the range that it saw. Observed accuracy holds the noise of half the cells.",
    )
    return Figure("trust", {"": _layout(traces, across, along, metric.label)}, caption, height=420)


def _layout(traces: list[Spec], across: list[float | None], along: list[float | None], label: str) -> Spec:
    return {
        "data": traces,
        "layout": {
            "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "xanchor": "left"},
            "xaxis": {"title": {"text": f"expected {label}"}, "range": across},
            "yaxis": {"title": {"text": f"observed {label}"}, "range": along},
        },
    }


def _intervals(table: pd.DataFrame) -> Spec:
    """Draw the interval of each expectation as a thin vertical line."""
    return {
        **_with_intervals(table, "expected", {"thickness": 1, "width": 0, "color": "@rule"}),
        "mode": "markers",
        "marker": {"size": 1, "color": "@rule"},
        "hoverinfo": "skip",
        "showlegend": False,
    }


def _with_intervals(table: pd.DataFrame, column: str, look: dict[str, Any]) -> Spec:
    """Return what a trace over the expectation has in common: places, and an interval at each."""
    return {
        "type": "scatter",
        "x": numbers(table["expected"], 4),
        "y": numbers(table[column], 4),
        "error_y": error_bars(table[column], table["low"], table["high"], look, digits=4),
    }


def _points(rows: pd.DataFrame, name: str, color: str, symbol: str) -> Spec:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": escape(name),
        "x": numbers(rows["expected"], 4),
        "y": numbers(rows["observed"], 4),
        "marker": {"size": 8, "color": color, "symbol": symbol, "opacity": 0.75},
        "customdata": [
            [
                escape(row[PERTURBATION]),
                escape(category_label(str(row[CATEGORY]))),
                f"{format_number(row['low'], 2)} to {format_number(row['high'], 2)}",
                escape(MISSING if pd.isna(row["nearest_training_gene"]) else row["nearest_training_gene"]),
                format_number(row["nearest_similarity"], 2),
                format_number(row["predicted_effect"], 2),
            ]
            for row in rows.to_dict("records")
        ],
        "hovertemplate": "<b>%{customdata[0]}</b><br>%{customdata[1]}<br>"
        "expected %{x:.2f} (%{customdata[2]}), observed %{y:.2f}<br>"
        "nearest training gene %{customdata[3]}, similarity %{customdata[4]}<br>"
        "predicted effect size %{customdata[5]}<extra></extra>",
    }


def _means(bins: pd.DataFrame) -> Spec:
    return {
        **_with_intervals(bins, "observed", {"thickness": 1.6, "width": 4, "color": "@ink"}),
        "mode": "lines+markers",
        "name": "mean of a bin",
        "line": {"width": 1, "color": "@ink"},
        "marker": {"size": 9, "symbol": "square", "color": "@ink"},
        "customdata": [format_count(n) for n in bins["n"]],
        "hovertemplate": "bin of %{customdata}: expected %{x:.2f}, observed %{y:.2f}<extra></extra>",
    }
