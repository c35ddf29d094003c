"""Compare embeddings under the same head and the same priors, to see whether the JEPA adds anything."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from biojepa.contracts import ALL_CATEGORIES, CATEGORY, PERTURBATION, WHOLE_MODEL
from biojepa.evaluation.metrics import METRICS
from biojepa.evaluation.resampling import WholeModelScores, interval, make_scopes
from biojepa.evaluation.settings import EvaluationSettings
from biojepa.evaluation.statistics import MetricTable, metric_tables, paired_difference
from biojepa.evaluation.verdict import BETTER, DECIDING, SAME, WORSE
from biojepa.models import ABLATION_MODELS, AblationModel
from biojepa.report.figures import Caption, Figure, Spec, error_bars, line, numbers
from biojepa.report.glossary import EMBEDDING_LABELS, HEAD_LABELS, PRIOR_LABELS, metric_text
from biojepa.report.inputs import ReportInputs
from biojepa.report.tables import MISSING, format_count, format_level, format_number

UNDER_TEST = "biojepa"
OTHERS = ("pca", "untrained")
EMBEDDINGS = (UNDER_TEST, *OTHERS)
_IN_TEXT = {"pca": "PCA", "untrained": "the untrained encoder"}
STYLES: dict[str, dict[str, Any]] = {
    UNDER_TEST: {"color": "@main", "symbol": "diamond", "size": 10},
    "pca": {"color": "@baseline", "symbol": "circle", "size": 8},
    "untrained": {"color": "@negative", "symbol": "square-open", "size": 8},
}


@dataclass(frozen=True)
class Estimate:
    """A mean over held-out perturbations with its bootstrap interval; NaN bounds below two of them."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def outcome(self) -> str:
        """Say of a difference what its interval alone supports."""
        if self.low > 0:
            return BETTER
        return WORSE if self.high < 0 else SAME


@dataclass(frozen=True)
class EmbeddingRow:
    """One head with one kind of priors on every embedding.

    Attributes
    ----------
    head, priors
        As in :class:`biojepa.models.AblationModel`.
    scores
        Embedding to its score; embeddings that were not run are absent.
    gains
        Other embedding to the paired gain of BioJEPA's over it.
    """

    head: str
    priors: str
    scores: Mapping[str, Estimate]
    gains: Mapping[str, Estimate]

    @property
    def label(self) -> str:
        """Name the row in words."""
        return f"{HEAD_LABELS[self.head]}, {PRIOR_LABELS[self.priors]}"


@dataclass(frozen=True)
class EmbeddingTable:
    """All rows of one metric, in the order head, then priors."""

    metric: str
    rows: tuple[EmbeddingRow, ...]

    @property
    def complete(self) -> bool:
        """Whether some head was run with the same priors on all three embeddings."""
        return any(set(row.scores) == set(EMBEDDINGS) for row in self.rows)


def compare_embeddings(
    metrics: pd.DataFrame, metric: str, settings: EvaluationSettings | None = None
) -> EmbeddingTable:
    """Put the ablation into a table: scores by embedding, and paired gains of BioJEPA's.

    The unit of the bootstrap is the perturbation; the draws are those of the evaluation, the same for
    every model, so that differences are paired.

    Parameters
    ----------
    metrics
        ``metrics.tsv`` of all models.
    metric
        A registered metric that is scored per perturbation.
    settings
        Draws, seed and level of the intervals; defaults where not given.

    Returns
    -------
    Rows of BioJEPA's embedding and at least one other; none without such models.
    """
    settings = settings or EvaluationSettings()
    scored = metrics[metrics[PERTURBATION] != WHOLE_MODEL]
    wanted = scored[scored["model"].isin(list(ABLATION_MODELS)) & (scored["metric"] == metric)]
    scopes = make_scopes(scored[[PERTURBATION, CATEGORY]], settings.draws, settings.seed)
    if wanted.empty or ALL_CATEGORIES not in scopes:
        return EmbeddingTable(metric, ())
    scope = {ALL_CATEGORIES: scopes[ALL_CATEGORIES]}
    found = metric_tables(wanted, WholeModelScores(scope), {metric: METRICS[metric]}, scope)
    if not found:
        return EmbeddingTable(metric, ())
    kinds = dict.fromkeys((model.head, model.priors) for model in ABLATION_MODELS.values())
    rows = (_row(found[0], head, priors, settings.confidence) for head, priors in kinds)
    return EmbeddingTable(metric, tuple(row for row in rows if row.gains))


def _row(table: MetricTable, head: str, priors: str, confidence: float) -> EmbeddingRow:
    low, high = interval(table.draws, confidence)
    scores, gains = {}, {}
    names = {embedding: AblationModel(embedding, head, priors).name for embedding in EMBEDDINGS}
    for embedding, name in names.items():
        column = table.column(name)
        if column is not None:
            bounds = float(low[column]), float(high[column])
            scores[embedding] = estimate(float(table.mean[column]), *bounds, int(table.n[column]))
    for other in OTHERS:
        both = len(table.difference(names[UNDER_TEST], names[other]))
        if both:
            difference = paired_difference(table, names[UNDER_TEST], names[other], confidence)
            gains[other] = estimate(*difference, both)
    return EmbeddingRow(head, priors, scores, gains)


def estimate(mean: float, low: float, high: float, n: int) -> Estimate:
    """Return an estimate; without bounds where a single perturbation is behind it."""
    # One perturbation resamples to itself: an interval of width 0 would claim certainty.
    return Estimate(mean, low, high, n) if n > 1 else Estimate(mean, math.nan, math.nan, n)


def ablation_sentence(table: EmbeddingTable) -> str:
    """Say what the paired gains of a table show, in one sentence with its numbers."""
    parts, undecided = [], 0
    for other in OTHERS:
        gains = [row.gains[other] for row in table.rows if other in row.gains]
        if not gains:
            continue
        outcomes = [gain.outcome for gain in gains]
        undecided += outcomes.count(SAME)
        extremes = (function(gain.mean for gain in gains) for function in (min, max))
        parts.append(
            f"better than {_IN_TEXT[other]} in {outcomes.count(BETTER)} of {len(gains)} comparisons and "
            f"worse in {outcomes.count(WORSE)} (mean paired differences {' to '.join(map(signed, extremes))})"
        )
    text = (
        f"Under the same head and priors, by {metric_text(table.metric).label}, the embedding of "
        f"{EMBEDDING_LABELS[UNDER_TEST]} is {', and '.join(parts)}"
    )
    return f"{text}; the other intervals do not exclude 0." if undecided else f"{text}."


def signed(value: float, digits: int = 3) -> str:
    """Return a difference with its sign, or a dash when it is missing."""
    text = format_number(value, digits)
    return f"+{text}" if text != MISSING and value > 0 and any(c in "123456789∞" for c in text) else text


def ablation_view(inputs: ReportInputs) -> dict[str, Any] | None:
    """Return what the page shows of the ablation, or None where no comparison is complete.

    Returns
    -------
    dict
        ``sentence``; ``embeddings`` and ``others``, the heads of the columns; ``tables`` with ``metric``,
        ``usable`` and ``rows`` of text; ``figure``.
    """
    settings = EvaluationSettings.from_mapping(inputs.settings.get("evaluate"))
    present = set(inputs.metrics["metric"])
    tables = [compare_embeddings(inputs.metrics, name, settings) for name in DECIDING if name in present]
    tables = [table for table in tables if table.complete]
    if not tables:
        return None
    telling = [table for table in tables if inputs.usable(table.metric)]
    return {
        "sentence": ablation_sentence(telling[0])
        if telling
        else "No metric of this table can tell a replicate from the training mean on this dataset, so it "
        "cannot tell embeddings apart either.",
        "embeddings": [EMBEDDING_LABELS[name] for name in EMBEDDINGS],
        "others": [EMBEDDING_LABELS[name] for name in OTHERS],
        "tables": [_shown(table, inputs.usable(table.metric)) for table in tables],
        "figure": ablation_figure(tables, settings.confidence),
    }


def _shown(table: EmbeddingTable, usable: bool) -> dict[str, Any]:
    rows = [
        {
            "label": row.label,
            "scores": [estimate_cell(row.scores.get(name), format_number) for name in EMBEDDINGS],
            "gains": [estimate_cell(row.gains.get(name), signed) for name in OTHERS],
            "n": format_count(max(score.n for score in row.scores.values())),
        }
        for row in table.rows
    ]
    return {"metric": metric_text(table.metric), "usable": usable, "rows": rows}


def estimate_cell(found: Estimate | None, text: Callable[[float], str]) -> dict[str, str]:
    """Return an estimate as text: ``value``, ``interval`` and ``outcome``, a dash where there is none."""
    if found is None:
        return {"value": MISSING, "interval": "", "outcome": ""}
    known = not math.isnan(found.low)
    bounds = f"{text(found.low)} to {text(found.high)}" if known else ""
    return {"value": text(found.mean), "interval": bounds, "outcome": found.outcome}


def ablation_figure(tables: list[EmbeddingTable], confidence: float) -> Figure:
    """Draw every row of the tables with one dot per embedding, one metric at a time."""
    options = {
        f"{metric_text(table.metric).label} {metric_text(table.metric).arrow}": _panel(table)
        for table in tables
    }
    most = max(len(table.rows) for table in tables)
    n = max(score.n for table in tables for row in table.rows for score in row.scores.values())
    caption = Caption(
        title="Embeddings under the same head and priors",
        shows=f"Mean and {format_level(confidence)} interval of three embeddings for each head and kind of "
        "priors.",
        read="Within a row the embedding alone differs. Shuffled priors should lose what priors gain.",
        n=f"{format_count(n)} held-out perturbations",
        thresholds="none",
        misleads="Intervals of two dots may overlap although the paired difference (table) is clear. Rows "
        "share their perturbations, and nothing is corrected for the number of rows.",
    )
    return Figure("ablation", options, caption, height=110 + 52 * most, selector="Metric")


def _panel(table: EmbeddingTable) -> Spec:
    heights = {row.label: len(table.rows) - 1 - place for place, row in enumerate(table.rows)}
    traces: list[Spec] = []
    for place, embedding in enumerate(EMBEDDINGS):
        rows = [row for row in table.rows if embedding in row.scores]
        scores = [row.scores[embedding] for row in rows]
        style = STYLES[embedding]
        means = np.array([score.mean for score in scores])
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": EMBEDDING_LABELS[embedding],
                "x": numbers(means),
                "y": [round(heights[row.label] + 0.25 - 0.25 * place, 2) for row in rows],
                "error_x": error_bars(
                    means,
                    [score.low for score in scores],
                    [score.high for score in scores],
                    {"thickness": 1.4, "width": 0, "color": style["color"]},
                ),
                "marker": style | {"line": {"width": 1.5, "color": style["color"]}},
                "customdata": [[row.label, score.n] for row, score in zip(rows, scores, strict=True)],
                "hovertemplate": "%{customdata[0]}<br>%{x:.3f}, n = %{customdata[1]}",
            }
        )
    text = metric_text(table.metric)
    shapes = [line(height + 0.5, "y", dash="solid", color="@grid") for height in range(len(table.rows) - 1)]
    return {
        "data": traces,
        "layout": {
            "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "xanchor": "left"},
            "margin": {"t": 8, "r": 12, "b": 40, "l": 8},
            "xaxis": {"title": {"text": f"{text.label} ({text.direction})"}},
            "yaxis": {
                "tickmode": "array",
                "tickvals": list(heights.values()),
                "ticktext": list(heights),
                "range": [-0.6, len(table.rows) - 0.4],
                "automargin": True,
                "showgrid": False,
                "zeroline": False,
            },
            "shapes": shapes if text.null is None else [*shapes, line(text.null, "x")],
        },
    }
