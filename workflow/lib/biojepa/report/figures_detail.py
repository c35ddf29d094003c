"""Figures of effect sizes, of the spread between perturbations, and of gene sets."""

from __future__ import annotations

import pandas as pd

from biojepa.report.figures import (
    GROUP_STYLE,
    MAX_POINTS,
    Caption,
    Figure,
    Spec,
    calibration_panel,
    comparison_models,
    drawn_models,
    escape,
    evenly,
    line,
    main_models,
    number,
    numbers,
)
from biojepa.report.glossary import ModelText, metric_text, model_text
from biojepa.report.inputs import ReportInputs
from biojepa.report.tables import format_count, format_number, format_percent, ordered_models

# Points of all choices of a figure together: a point takes about 70 bytes of the page.
MAX_SETS_DRAWN, MIN_SETS_DRAWN = 4_000, 500
MAX_NORMS_DRAWN = 6_000
SIGNIFICANT_FDR = 0.05


def effect_figures(inputs: ReportInputs) -> list[Figure]:
    """Draw predicted against observed effect size, and the spread of the predictions by model."""
    figures = []
    if len(inputs.norms):
        figures.append(_norm_figure(inputs))
    spread = inputs.pooled[inputs.pooled["metric"] == "spread_ratio"].set_index("model")
    if len(spread):
        figures.append(_spread_figure(inputs, spread))
    return figures


def _norm_figure(inputs: ReportInputs) -> Figure:
    slopes = inputs.pooled[inputs.pooled["metric"] == "effect_slope"].set_index("model")["mean"]
    shown = comparison_models(inputs)
    others = [model.name for model in ordered_models(inputs) if model.name not in shown]
    names = shown + others if len(inputs.norms) <= MAX_NORMS_DRAWN else main_models(inputs)
    options = {}
    for name in names:
        rows = inputs.norms[inputs.norms["model"] == name]
        if len(rows):
            model = model_text(name, inputs.lead_model)
            options[model.label] = _norm_panel(model, evenly(rows, MAX_POINTS), slopes.get(name))
    caption = Caption(
        title="Effect size, predicted against observed",
        shows="Each point is a held-out perturbation: length of its change against the training mean, over "
        "all genes (log1p units), predicted and in half B of its cells.",
        read="On the dotted line the size is right; below it, shrunk. A flat cloud means one size for all.",
        n=f"{format_count(inputs.norms['perturbation'].nunique())} perturbations, at most "
        f"{format_count(MAX_POINTS)} drawn",
        thresholds="none; the printed slope is the metric effect_slope, folds pooled",
        misleads="Observed length contains sampling noise, so weak perturbations with few cells look larger "
        "than they are, and a good model lies below the line there.",
    )
    return Figure("norms", options, caption, height=400, selector="Model")


def _norm_panel(model: ModelText, rows: pd.DataFrame, slope: float | None) -> Spec:
    """Return one point per perturbation, on axes of the same length, and the line of the right size."""
    style = GROUP_STYLE[model.group]
    ends = [0, number(rows[["observed", "predicted"]].max().max() * 1.05) or 1.0]
    identity = {"type": "scatter", "mode": "lines", "x": ends, "y": ends, "hoverinfo": "skip",
                "line": {"color": "@ink", "dash": "dot", "width": 1.2}}  # fmt: skip
    points = {
        "type": "scatter",
        "mode": "markers",
        "x": numbers(rows["observed"], 4),
        "y": numbers(rows["predicted"], 4),
        "marker": {**style, "size": 8, "opacity": 0.8, "line": {"width": 1, "color": style["color"]}},
        "customdata": [escape(name) for name in rows["perturbation"]],
        "hovertemplate": "<b>%{customdata}</b><br>observed %{x:.2f}, predicted %{y:.2f}<extra></extra>",
    }
    note = {
        "x": 0.02,
        "y": 0.98,
        "xref": "paper",
        "yref": "paper",
        "xanchor": "left",
        "showarrow": False,
        "text": f"{escape(model.label)}: slope {format_number(slope)}",
    }
    return {
        "data": [identity, points],
        "layout": {
            "showlegend": False,
            "xaxis": {"title": {"text": "observed ‖Δ‖"}, "range": ends},
            "yaxis": {"title": {"text": "predicted ‖Δ‖"}, "range": ends},
            "annotations": [note],
        },
    }


def _spread_figure(inputs: ReportInputs, spread: pd.DataFrame) -> Figure:
    models, left_out = drawn_models(inputs, spread.index)
    floor = 1e-3
    values = spread.loc[[model.name for model in models], "mean"]
    spec = {
        "data": [
            {
                "type": "scatter",
                "mode": "markers",
                "x": [number(max(float(v), floor)) if not pd.isna(v) else None for v in values],
                "y": [escape(model.label) for model in models],
                "marker": {
                    "symbol": [GROUP_STYLE[model.group]["symbol"] for model in models],
                    "color": [GROUP_STYLE[model.group]["color"] for model in models],
                    "size": 9,
                    "line": {"width": 1.5, "color": [GROUP_STYLE[model.group]["color"] for model in models]},
                },
                "customdata": [format_number(value) for value in values],
                "hovertemplate": "<b>%{y}</b><br>spread ratio %{customdata}<extra></extra>",
            }
        ],
        "layout": {
            "showlegend": False,
            "margin": {"t": 8, "r": 12, "b": 40, "l": 8},
            "xaxis": {"type": "log", "title": {"text": "spread of predictions / spread of truths"},
                      "tickvals": [0.001, 0.01, 0.1, 1, 10],
                      "ticktext": ["≤ 0.001", "0.01", "0.1", "1", "10"]},
            "yaxis": {"type": "category", "categoryorder": "array", "automargin": True, "showgrid": False,
                      "categoryarray": [escape(model.label) for model in reversed(models)],
                      "tickfont": {"size": 11}},
            "shapes": [line(1, "x")],
        },
    }  # fmt: skip
    caption = Caption(
        title="Spread between perturbations",
        shows="How much predictions differ between perturbations, over how much the truths do.",
        read="1 is right. Near 0 the model says the same whatever is perturbed: it has collapsed, however "
        "well it scores on average.",
        n=f"{len(models)} models{left_out}; one value per model, averaged over folds and seeds",
        thresholds="values below 0.001 are drawn at 0.001",
        misleads="A ratio of 1 says nothing about being right: random guesses of the right size reach it. "
        "Truths contain sampling noise, so a perfect noise-free model lies below 1.",
    )
    return Figure("spread", {"": spec}, caption, height=90 + 20 * len(models))


def gene_set_figures(inputs: ReportInputs) -> list[Figure]:
    """Draw predicted against observed enrichment scores for each scored model, or nothing without sets."""
    table = inputs.enrichment.dropna(subset=["nes_pred", "nes_true"])
    if table.empty:
        return []
    options = {}
    scored = [model for model in ordered_models(inputs) if (table["model"] == model.name).any()]
    scored.sort(key=lambda model: model.name != inputs.lead_model)
    limit = max(MIN_SETS_DRAWN, MAX_SETS_DRAWN // len(scored))
    for model in scored[: MAX_SETS_DRAWN // MIN_SETS_DRAWN]:
        rows = table[table["model"] == model.name]
        rows = rows.sort_values(["fdr_true", "perturbation", "gene_set"], kind="stable").head(limit)
        clear = rows["fdr_true"] < SIGNIFICANT_FDR
        traces = [
            _nes_trace(rows[~clear], "observed FDR ≥ 5 %", "@negative"),
            _nes_trace(rows[clear], "observed FDR < 5 %", GROUP_STYLE[model.group]["color"]),
        ]
        ends = [-3.2, 3.2]
        identity = {"type": "scatter", "mode": "lines", "x": ends, "y": ends, "hoverinfo": "skip",
                    "showlegend": False, "line": {"color": "@ink", "dash": "dot", "width": 1.2}}  # fmt: skip
        options[model.label] = {
            "data": [identity, *traces],
            "layout": {
                "xaxis": {"title": {"text": "observed NES"}},
                "yaxis": {"title": {"text": "predicted NES"}},
                "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
            },
        }
    caption = Caption(
        title="Gene sets, predicted against observed enrichment",
        shows="Each point is a gene set in one held-out perturbation: normalized enrichment score (NES) of "
        "the genes ranked by predicted and by observed change against control.",
        read="Coloured points were clearly enriched in half B and should lie on the dotted line.",
        n=f"{format_count(table['perturbation'].nunique())} perturbations, "
        f"{format_count(table['gene_set'].nunique())} gene sets",
        thresholds=f"observed FDR below {format_percent(SIGNIFICANT_FDR)}; at most the "
        f"{format_count(limit)} clearest points",
        misleads="NES avoid 0 by construction and sets share genes, so points are not independent; "
        "permutation p-values over genes ignore correlation between genes and are too small.",
    )
    figures = [Figure("gene-sets", options, caption, height=400, selector="Model")]
    if (inputs.pooled["metric"] == "pathway_correlation").any():
        figures.append(calibration_panel(inputs, metric_text("pathway_correlation")))
    return figures


def _nes_trace(rows: pd.DataFrame, name: str, color: str) -> Spec:
    pairs = list(zip(rows["perturbation"], rows["gene_set"], strict=True))
    return {
        "type": "scatter",
        "mode": "markers",
        "name": escape(name),
        "x": numbers(rows["nes_true"], 3),
        "y": numbers(rows["nes_pred"], 3),
        "marker": {"size": 6, "color": color, "opacity": 0.65},
        "customdata": [[escape(p), escape(s)] for p, s in pairs],
        "hovertemplate": "<b>%{customdata[1]}</b><br>%{customdata[0]}<br>"
        "observed %{x:.2f}, predicted %{y:.2f}",
    }
