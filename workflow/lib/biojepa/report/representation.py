"""Compare what embeddings hold of cells that training never saw: table, sentence and figures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from biojepa.contracts import ALL_CATEGORIES, CATEGORIES, CATEGORY, PERTURBATION
from biojepa.evaluation.registry import Metric
from biojepa.evaluation.resampling import WholeModelScores, interval, make_scopes
from biojepa.evaluation.settings import EvaluationSettings
from biojepa.evaluation.statistics import MetricTable, metric_tables, paired_difference
from biojepa.evaluation.verdict import BETTER
from biojepa.report.ablation import Estimate, estimate, estimate_cell, signed
from biojepa.report.figures import Caption, Figure, Spec, error_bars, escape, line, number, numbers
from biojepa.report.glossary import model_text
from biojepa.report.inputs import ReportInputs
from biojepa.report.tables import format_count, format_level, format_number

TRAINED = "trained"
OTHERS = ("pca50", "untrained")
IN_TEXT = {"pca50": "PCA-50", "untrained": "the untrained encoder"}
# A random order or a guess, beside the embeddings.
CHANCE = "chance"
DECIDING = "knn_map_distinctiveness"
MAX_POINTS = 1500
STYLES: dict[str, dict[str, Any]] = {
    TRAINED: {"color": "@main", "symbol": "diamond", "size": 11},
    "trained_pooled": {"color": "@main", "symbol": "diamond-open", "size": 9},
    "untrained": {"color": "@negative", "symbol": "square", "size": 9},
    "untrained_pooled": {"color": "@negative", "symbol": "square-open", "size": 9},
    "pca50": {"color": "@baseline", "symbol": "circle", "size": 9},
}


@dataclass(frozen=True)
class Measure:
    """How a metric of ``representation.tsv`` is shown; ``best`` is empty where no direction is better."""

    name: str
    label: str
    best: Literal["max", "min", ""]
    read: str

    @property
    def arrow(self) -> str:
        """Return the sign of the better direction."""
        return {"max": "↑", "min": "↓", "": ""}[self.best]

    @property
    def direction(self) -> str:
        """Say the better direction in words."""
        return {"max": "higher is better", "min": "lower is better", "": "neither end is better"}[self.best]

    @property
    def by_perturbation(self) -> bool:
        """Whether every perturbation has a value of its own."""
        return self.name.startswith("knn_map")


MEASURES = (
    Measure(
        DECIDING,
        "kNN-mAP, others",
        "max",
        "own kind before other held-out cells",
    ),
    Measure("knn_map_activity", "kNN-mAP, control", "max", "own kind before control cells"),
    Measure("probe_perturbation", "Perturbation probe", "max", "a linear probe names the perturbation"),
    Measure("rankme", "RankMe", "max", "dimensions in use, of 50"),
    Measure("lidar", "LiDAR", "max", "dimensions that tell perturbations apart"),
    Measure("std_cells", "Std over cells", "", "0 where all cells are one point"),
    Measure("probe_batch", "Batch probe", "min", "a linear probe names the batch"),
    Measure("probe_depth", "Depth probe R²", "min", "a linear probe tells the library size"),
)


@dataclass(frozen=True)
class Comparison:
    """One metric of all embeddings.

    Attributes
    ----------
    measure
        The metric.
    scores
        Embedding, or ``chance``, to its score. Bounds are those of the bootstrap over perturbations where
        each has a value, else the lowest and highest of the folds.
    gains
        Other embedding, or ``chance``, to the paired gain of the trained one; only where perturbations have
        values.
    """

    measure: Measure
    scores: Mapping[str, Estimate]
    gains: Mapping[str, Estimate]

    @property
    def n(self) -> int:
        """Perturbations, or folds, behind the scores."""
        return max(score.n for score in self.scores.values())


def compare(table: pd.DataFrame, settings: EvaluationSettings | None = None) -> list[Comparison]:
    """Pool ``representation.tsv`` of all folds and seeds, metric by metric.

    Parameters
    ----------
    table
        Rows of all files.
    settings
        Draws, seed and level of the intervals; defaults where not given.
    """
    settings = settings or EvaluationSettings()
    found = []
    for measure in MEASURES:
        rows = table[(table["metric"] == measure.name) & table["value"].notna()]
        if not rows.empty:
            pooled = _over_perturbations if measure.by_perturbation else _over_folds
            found.append(pooled(measure, rows, settings))
    return found


def _with_chance(rows: pd.DataFrame) -> pd.DataFrame:
    """Append a random order as one more embedding, once for each value."""
    keys = ["fold", "seed", PERTURBATION]
    guess = rows[rows["chance"].notna()].drop_duplicates(keys)
    return pd.concat([rows, guess.assign(embedding=CHANCE, value=guess["chance"])], ignore_index=True)


def _over_folds(measure: Measure, rows: pd.DataFrame, settings: EvaluationSettings) -> Comparison:
    by_fold = _with_chance(rows).groupby(["embedding", "fold"], sort=False)["value"].mean()
    scores = {}
    for embedding in by_fold.index.unique("embedding"):
        values = by_fold[embedding].to_numpy()
        scores[str(embedding)] = estimate(
            float(values.mean()), float(values.min()), float(values.max()), len(values)
        )
    return Comparison(measure, scores, {})


def pooled_table(measure: Measure, rows: pd.DataFrame, settings: EvaluationSettings) -> MetricTable:
    """Pool a metric that every perturbation has, with the bootstrap of the evaluation."""
    scores = _with_chance(rows).rename(columns={"model": "of", "embedding": "model"})
    # The scope of all categories does not ask which.
    scores = scores.assign(**{CATEGORY: CATEGORIES[0]})
    scope = make_scopes(scores[[PERTURBATION, CATEGORY]], settings.draws, settings.seed)[ALL_CATEGORIES]
    metric = Metric(measure.name, "secondary", "max", "", "", "perturbation")
    scopes = {ALL_CATEGORIES: scope}
    return metric_tables(scores, WholeModelScores(scopes), {measure.name: metric}, scopes)[0]


def _over_perturbations(measure: Measure, rows: pd.DataFrame, settings: EvaluationSettings) -> Comparison:
    table = pooled_table(measure, rows, settings)
    low, high = interval(table.draws, settings.confidence)
    scores = {
        name: estimate(float(table.mean[at]), float(low[at]), float(high[at]), int(table.n[at]))
        for at, name in enumerate(table.models)
    }
    gains = {
        other: estimate(*paired_difference(table, TRAINED, other, settings.confidence), n)
        for other in (*OTHERS, CHANCE)
        if (n := len(table.difference(TRAINED, other)))
    }
    return Comparison(measure, scores, gains)


def representation_sentence(
    comparison: Comparison, label: str, min_perturbations: int, confidence: float
) -> str:
    """Say by rule whether the trained embedding retrieves better than the others, with the numbers.

    Better or worse is said where the interval of the paired difference excludes 0, and nothing below
    ``min_perturbations`` perturbations.
    """
    n = comparison.scores[TRAINED].n
    if n < min_perturbations:
        return (
            f"Only {n} held-out perturbations have two cells or more; below {min_perturbations} nothing is "
            "said of embeddings."
        )
    parts = []
    for other in OTHERS:
        if other in comparison.gains:
            gain = comparison.gains[other]
            outcome = f"{gain.outcome} {IN_TEXT[other]}"
            bounds = f"{signed(gain.low)} to {signed(gain.high)}"
            parts.append(f"{outcome} (paired difference {signed(gain.mean)}, {bounds})")
    score, chance = comparison.scores[TRAINED], comparison.scores.get(CHANCE)
    guess = "" if chance is None else f", {format_number(chance.mean)} for a random order"
    text = (
        f"At finding cells of the same perturbation among those of other held-out ones (kNN-mAP "
        f"{format_number(score.mean)}{guess}), the embedding of {label} is {' and '.join(parts)}; "
        f"{format_level(confidence)} intervals over {n} perturbations."
    )
    above = comparison.gains.get(CHANCE)
    if above is not None and above.outcome != BETTER:
        text += " It is not clearly better than a random order."
    return text


def labels_of(label: str) -> dict[str, str]:
    """Return what embeddings are called, in the order of the table."""
    return {
        TRAINED: f"{label}, tokens",
        "trained_pooled": f"{label}, pooled",
        "pca50": "PCA-50",
        "untrained": "Untrained, tokens",
        "untrained_pooled": "Untrained, pooled",
        CHANCE: "Guess",
    }


def representation_view(inputs: ReportInputs) -> dict[str, Any] | None:
    """Return what the page shows of the embeddings, or None where none was measured.

    Returns
    -------
    dict
        ``sentence``; ``heads`` (embeddings), ``others`` (those with a paired difference) and ``rows`` of
        the table, as text; ``label`` of the model; ``cells`` that were measured; ``confidence``; ``figures``.
    """
    table = inputs.representation
    if table is None or table.empty:
        return None
    settings = EvaluationSettings.from_mapping(inputs.settings.get("evaluate"))
    comparisons = compare(table, settings)
    if not comparisons:
        return None
    label = model_text(str(table["model"].iloc[0]), inputs.lead_model).label
    labels = {
        name: text
        for name, text in labels_of(label).items()
        if any(name in comparison.scores for comparison in comparisons)
    }
    paired = [comparison for comparison in comparisons if comparison.gains]
    deciding = next((c for c in paired if c.measure.name == DECIDING and set(OTHERS) & set(c.gains)), None)
    sentence = (
        "No held-out perturbation could be told from another, so retrieval was not scored."
        if deciding is None
        else representation_sentence(deciding, label, settings.min_perturbations, settings.confidence)
    )
    return {
        "sentence": sentence,
        "heads": list(labels.values()),
        "others": [labels[name] for name in OTHERS if name in labels],
        "rows": [
            {
                "measure": c.measure,
                "n": _count(c),
                "cells": [
                    estimate_cell(c.scores.get(name), format_number)
                    # How a guess varies over perturbations is a matter of their sizes.
                    | ({"interval": ""} if name == CHANCE else {})
                    for name in labels
                ],
                "gains": [estimate_cell(c.gains.get(name), signed) for name in OTHERS if name in labels],
            }
            for c in comparisons
        ],
        "label": label,
        "confidence": format_level(settings.confidence),
        "cells": _cells(table),
        "figures": [
            _comparison_figure(comparisons, labels, settings.confidence),
            *([_pairs_figure(table, paired, label, settings)] if paired else []),
        ],
    }


def _count(comparison: Comparison) -> str:
    unit = "perturbation" if comparison.measure.by_perturbation else "fold"
    return f"{format_count(comparison.n)} {unit}{'' if comparison.n == 1 else 's'}"


def _cells(table: pd.DataFrame) -> str:
    """Say how many cells were measured in a fold."""
    counts = table.groupby("cells")["n_cells"].agg(["min", "max"])
    parts = []
    for name, words in (("test", "held-out cells"), ("test and control", "with control cells")):
        if name in counts.index:
            low, high = (format_count(counts.loc[name, end]) for end in ("min", "max"))
            parts.append(f"{low if low == high else f'{low} to {high}'} {words}")
    return ", ".join(parts)


def _comparison_figure(comparisons: list[Comparison], labels: Mapping[str, str], confidence: float) -> Figure:
    options = {
        f"{c.measure.label} {c.measure.arrow}".strip(): _comparison_panel(c, labels) for c in comparisons
    }
    level = format_level(confidence)
    caption = Caption(
        title="Embeddings of cells that training never saw",
        shows=f"One metric of every embedding; kNN-mAP with its {level} interval over perturbations, the "
        "others with lowest and highest fold. Dotted: a random guess.",
        read="The trained encoder (diamonds) should lie beyond PCA-50 and the untrained one on the side that "
        "the axis names; in the probes of batch and depth, that is to the left.",
        n=", ".join(dict.fromkeys(_count(c) for c in comparisons)),
        thresholds="50 principal components of each embedding, fitted on training cells",
        misleads="Intervals of two embeddings may overlap although their paired difference is clear. Noise "
        "fills dimensions too, so an untrained encoder can lead RankMe. Where a perturbation sits in few "
        "batches, an embedding of the batch finds its cells as well.",
    )
    return Figure("embedding-metrics", options, caption, height=300, selector="Metric")


def _comparison_panel(comparison: Comparison, labels: Mapping[str, str]) -> Spec:
    measure, scores = comparison.measure, comparison.scores
    names = [name for name in labels if name in scores and name != CHANCE]
    heights = {name: len(names) - 1 - place for place, name in enumerate(names)}
    traces = []
    for name in names:
        score, style = scores[name], STYLES[name]
        known = not math.isnan(score.low)
        bounds = f"{format_number(score.low)} to {format_number(score.high)}" if known else "no interval"
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": escape(labels[name]),
                "x": numbers([score.mean]),
                "y": [heights[name]],
                "error_x": error_bars(
                    [score.mean],
                    [score.low],
                    [score.high],
                    {"thickness": 1.4, "width": 0, "color": style["color"]},
                ),
                "marker": style | {"line": {"width": 1.5, "color": style["color"]}},
                "customdata": [[bounds, _count(comparison)]],
                "hovertemplate": f"<b>{escape(labels[name])}</b><br>%{{x:.3f}} (%{{customdata[0]}})<br>"
                "%{customdata[1]}<extra></extra>",
            }
        )
    guess = scores.get(CHANCE)
    return {
        "data": traces,
        "layout": {
            "showlegend": False,
            "margin": {"t": 8, "r": 12, "b": 40, "l": 8},
            "xaxis": {"title": {"text": f"{measure.label} ({measure.direction})"}},
            "yaxis": {
                "tickmode": "array",
                "tickvals": list(heights.values()),
                "ticktext": [escape(labels[name]) for name in names],
                "range": [-0.6, len(names) - 0.4],
                "automargin": True,
                "showgrid": False,
                "zeroline": False,
            },
            "shapes": [] if guess is None else [line(guess.mean, "x")],
        },
    }


def _pairs_figure(
    table: pd.DataFrame, paired: list[Comparison], label: str, settings: EvaluationSettings
) -> Figure:
    options, drawn, total = {}, 0, 0
    for comparison in paired:
        rows = table[(table["metric"] == comparison.measure.name) & table["value"].notna()]
        pooled = pooled_table(comparison.measure, rows, settings)
        for other in OTHERS:
            if other in comparison.gains:
                spec, shown, found = _pairs_panel(pooled, comparison, other, label)
                options[f"{comparison.measure.label}, against {IN_TEXT[other]}"] = spec
                drawn, total = max(drawn, shown), max(total, found)
    caption = Caption(
        title="Retrieval of each held-out perturbation",
        shows=f"kNN-mAP of each perturbation in the tokens of {label} (vertical) and in the other embedding.",
        read="Above the dotted line the trained encoder finds cells of the perturbation better. Near the "
        "lower left corner no embedding finds them: the effect is weak, or differs from cell to cell.",
        n=f"{format_count(drawn)} of {format_count(total)} perturbations drawn",
        thresholds="at most 100 cells of a perturbation; at least 2",
        misleads="A random order scores more for a perturbation with more cells. Perturbations that share a "
        "gene count as different from each other.",
    )
    return Figure("embedding-pairs", options, caption, height=400, selector="Compare")


def _pairs_panel(
    pooled: MetricTable, comparison: Comparison, other: str, label: str
) -> tuple[Spec, int, int]:
    """Return the panel, how many perturbations it draws, and of how many."""
    first, second = pooled.models.index(TRAINED), pooled.models.index(other)
    values = np.full((0, 2), np.nan) if pooled.values is None else pooled.values[:, [first, second]]
    both = np.flatnonzero(np.isfinite(values).all(axis=1))
    chosen = both[np.linspace(0, len(both) - 1, min(len(both), MAX_POINTS)).round().astype(int)]
    mine, theirs = values[chosen].T
    end = number(1.05 * float(values[chosen].max())) or 1.0
    names = [escape(pooled.scope.perturbations[at]) for at in chosen]
    points = {
        "type": "scatter",
        "mode": "markers",
        "x": numbers(theirs, 3),
        "y": numbers(mine, 3),
        "marker": {"color": "@main", "symbol": "circle", "size": 7, "opacity": 0.75},
        "customdata": names,
        "hovertemplate": "<b>%{customdata}</b><br>%{y:.3f} against %{x:.3f}<extra></extra>",
    }
    diagonal = {"type": "scatter", "mode": "lines", "x": [0, end], "y": [0, end], "hoverinfo": "skip",
                "line": {"color": "@ink", "dash": "dot", "width": 1.2}}  # fmt: skip
    gain = comparison.gains[other]
    note = {
        "x": 0.02, "y": 0.98, "xref": "paper", "yref": "paper", "xanchor": "left", "showarrow": False,
        "text": f"mean difference {signed(gain.mean)}"
        + ("" if math.isnan(gain.low) else f" ({signed(gain.low)} to {signed(gain.high)})"),
    }  # fmt: skip
    spec = {
        "data": [diagonal, points],
        "layout": {
            "showlegend": False,
            "xaxis": {"title": {"text": f"{comparison.measure.label}: {IN_TEXT[other]}"}, "range": [0, end]},
            "yaxis": {
                "title": {"text": f"{comparison.measure.label}: {escape(label)}"},
                "range": [0, end],
            },
            "annotations": [note],
        },
    }
    return spec, len(chosen), len(both)
