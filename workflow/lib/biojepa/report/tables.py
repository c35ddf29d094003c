"""Turn the tables of an evaluation into what the page prints: cells, marks and orders, no HTML."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pandas as pd

from biojepa import contracts
from biojepa.report.glossary import (
    GROUP_TITLES,
    HEADLINE,
    LEGACY,
    METRIC_ORDER,
    NEGATIVE,
    POSITIVE,
    PRIMARY_METRIC,
    UNSEEN_CATEGORIES,
    MetricText,
    ModelText,
    category_label,
    metric_text,
    model_text,
)
from biojepa.report.inputs import ReportInputs

MISSING = "–"
# Metrics that rank a truth among those of its fold.
RANKS = ("rank_l2", "rank_cosine")


def format_number(value: Any, digits: int = 3) -> str:
    """Return a number with a true minus sign and fixed decimals, or a dash when it is missing."""
    if value is None or pd.isna(value):
        return MISSING
    value = float(value)
    if not math.isfinite(value):
        return "∞" if value > 0 else "−∞"
    text = f"{value:.{digits}f}" if abs(value) < 100 else f"{value:,.1f}"
    # What rounds to nothing has no sign.
    return text.lstrip("-") if float(text.replace(",", "")) == 0 else text.replace("-", "−")


def decimals(values: pd.Series) -> int:
    """Return the decimals that show three digits of the largest value of a column: 3, or more below 0.1."""
    largest = values.abs().max()
    if pd.isna(largest) or largest >= 0.1 or largest == 0:
        return 3
    return min(3 - math.floor(math.log10(largest)) - 1, 8)


def format_percent(share: Any) -> str:
    """Return a share as a percentage without decimals, or a dash when it is missing."""
    if share is None or pd.isna(share):
        return MISSING
    return f"{100 * float(share) + 0.0:.0f}\u202f%".replace("-0\u202f", "0\u202f").replace("-", "−")


def format_level(share: float) -> str:
    """Return the level of an interval as a percentage with the decimals that it needs."""
    return f"{100 * share:.6g}\u202f%"


def format_p(value: Any) -> str:
    """Return a p or q value: three decimals, and powers of ten below 0.001."""
    if value is None or pd.isna(value):
        return MISSING
    return f"{value:.3f}" if value >= 0.001 else f"{value:.0e}".replace("-", "−")


def format_count(value: Any) -> str:
    """Return a whole number with thin spaces between thousands, or a dash when it is missing."""
    if value is None or pd.isna(value):
        return MISSING
    return f"{int(value):,}".replace(",", "\u202f")


def ranked_among(inputs: ReportInputs, metric: str) -> str:
    """Say among how many truths of its fold a rank is sought; empty for a metric that is no rank."""
    if metric not in RANKS:
        return ""
    least, most = inputs.truths_of_a_fold
    to = "" if least == most else f" to {format_count(most)}"
    return f"among {format_count(least)}{to} of a fold"


@dataclass(frozen=True)
class ScoreCell:
    """One score of one model: formatted mean, interval and gap, and how it is marked.

    ``n`` is empty where it is that of the column. ``mark`` is ``better`` or ``worse`` where the paired
    test against the best baseline is significant, else empty. ``bar`` is the gap closed in
    percent, cut to 0–100, or None.
    """

    value: str
    interval: str
    gap: str
    n: str
    bar: float | None
    sort: float | None
    mark: str = ""
    is_best: bool = False
    is_best_baseline: bool = False
    title: str = ""


@dataclass(frozen=True)
class ModelRow:
    """One model and its scores, in the order of the metrics of the table."""

    model: ModelText
    cells: list[ScoreCell]
    n: str
    q: str = MISSING
    win: str = MISSING
    harm: str = MISSING


@dataclass(frozen=True)
class ScoreTable:
    """A table of models by metrics, its rows in groups; ``n`` is that of each metric."""

    metrics: list[MetricText]
    groups: list[tuple[str, str, list[ModelRow]]]
    n: list[str]

    @property
    def rows(self) -> list[ModelRow]:
        """Return the rows of all groups."""
        return [row for _, _, rows in self.groups for row in rows]


def ordered_models(inputs: ReportInputs, metric: str = PRIMARY_METRIC) -> list[ModelText]:
    """Return the models by group (positive controls first) and, within a group, best first."""
    rows = inputs.pooled[inputs.pooled["metric"] == metric].set_index("model")["mean"]
    text = metric_text(metric)
    groups = list(GROUP_TITLES)
    models = [model_text(name, inputs.lead_model) for name in inputs.models]
    return sorted(
        models,
        key=lambda m: (groups.index(m.group), text.loss(rows.get(m.name, math.nan)), m.name),
    )


@dataclass(frozen=True)
class MetricColumn:
    """One metric in one category: the summary row of every model, and what is marked in the column.

    The best model is sought among models and baselines that were scored on the most perturbations;
    the positive controls are left out, since they have seen the cells of the perturbation.
    """

    text: MetricText
    rows: dict[str, dict[str, Any]]
    best: str | None
    baseline: str | None
    digits: int
    n: int
    fdr: float

    @classmethod
    def of(cls, inputs: ReportInputs, metric: str, category: str) -> MetricColumn:
        """Collect the column of a metric from the summary."""
        summary = inputs.summary
        table = summary[(summary["category"] == category) & (summary["metric"] == metric)]
        rows: dict[str, dict[str, Any]] = {}
        for row in table.to_dict("records"):
            rows[str(row["model"])] = {str(key): value for key, value in row.items()}
        text = metric_text(metric)
        scored = [
            name
            for name, row in rows.items()
            if not pd.isna(row["mean"]) and name not in contracts.POSITIVE_CONTROLS
        ]
        n = max((rows[name]["n"] for name in scored), default=0)
        complete = [name for name in scored if rows[name]["n"] == n]
        best = min(complete, key=lambda name: text.loss(rows[name]["mean"]), default=None)
        baseline = inputs.best_baseline(metric, category)
        return cls(text, rows, best, baseline, decimals(table["mean"]), int(n), inputs.fdr)

    def mark(self, model: ModelText) -> str:
        """Return ``better`` or ``worse`` where the test against the best baseline is significant."""
        row = self.rows.get(model.name, {})
        q = row.get("q_vs_best_baseline", math.nan)
        against = self.rows.get(self.baseline or "", {}).get("mean", math.nan)
        if pd.isna(q) or q >= self.fdr or model.group in (POSITIVE, NEGATIVE) or pd.isna(against):
            return ""
        return "better" if self.text.loss(row["mean"]) < self.text.loss(against) else "worse"

    def cell(self, model: ModelText) -> ScoreCell:
        """Return the cell of a model, dashes where it has no score."""
        row = self.rows.get(model.name)
        if row is None or pd.isna(row["mean"]):
            return ScoreCell(MISSING, MISSING, MISSING, "", None, None)
        bounds = [format_number(row[name], self.digits) for name in ("ci_low", "ci_high")]
        title = f"{model.name}, {self.text.name}: {float(row['mean']):.6g}, n = {format_count(row['n'])}"
        gap = row["gap_closed"]
        if not pd.isna(gap):
            low, high = format_percent(row["gap_ci_low"]), format_percent(row["gap_ci_high"])
            title += f"; gap closed {format_percent(gap)} ({low} to {high})"
        return ScoreCell(
            value=format_number(row["mean"], self.digits),
            interval=MISSING if MISSING in bounds else " to ".join(bounds),
            gap=format_percent(gap),
            n="" if row["n"] == self.n else format_count(row["n"]),
            bar=None if pd.isna(gap) else round(min(max(100 * float(gap), 0.0), 100.0), 1),
            sort=float(row["mean"]),
            mark=self.mark(model),
            is_best=model.name == self.best,
            is_best_baseline=model.name == self.baseline,
            title=title,
        )


def score_table(
    inputs: ReportInputs, metrics: list[str], category: str = contracts.ALL_CATEGORIES
) -> ScoreTable:
    """Build the table of models by metrics for one category; tests are those of the first metric."""
    columns = [MetricColumn.of(inputs, name, category) for name in metrics]
    groups: dict[str, list[ModelRow]] = {}
    for model in ordered_models(inputs):
        if not any(model.name in column.rows for column in columns):
            continue
        first = columns[0].rows.get(model.name, {})
        groups.setdefault(model.group, []).append(
            ModelRow(
                model,
                [column.cell(model) for column in columns],
                n=format_count(first.get("n")),
                q=format_p(first.get("q_vs_best_baseline")),
                win=format_percent(first.get("win_rate")),
                harm=format_percent(first.get("harm_rate")),
            )
        )
    texts = [column.text for column in columns]
    titled = [(key, GROUP_TITLES[key], groups[key]) for key in GROUP_TITLES if key in groups]
    return ScoreTable(texts, titled, [format_count(column.n) for column in columns])


def metrics_of_role(inputs: ReportInputs, *roles: str) -> list[str]:
    """Return the computed metrics of these roles, in the order of the glossary, unknown ones last."""
    present = list(dict.fromkeys(inputs.summary["metric"]))
    known = [name for name in present if metric_text(name).role in roles]
    order = {name: position for position, name in enumerate(METRIC_ORDER)}
    return sorted(known, key=lambda name: (order.get(name, len(order)), name))


def categories_present(inputs: ReportInputs) -> list[str]:
    """Return the categories of the summary: those with seen genes first, then never-seen, then others."""
    present = set(inputs.summary["category"]) - {contracts.ALL_CATEGORIES}
    known = [name for name in contracts.CATEGORIES if name in present]
    return known + sorted(present - set(known))


@dataclass(frozen=True)
class CategoryTable:
    """Mean scores of one metric: models down, categories across."""

    metric: MetricText
    categories: list[dict[str, str]]
    groups: list[tuple[str, str, list[tuple[ModelText, list[ScoreCell]]]]]


def category_tables(inputs: ReportInputs) -> list[CategoryTable]:
    """Build one table per headline metric, with the number of perturbations of every category."""
    names = [contracts.ALL_CATEGORIES, *categories_present(inputs)]
    tables = []
    for metric in inputs.headline_metrics:
        by_category = {name: score_table(inputs, [metric], name) for name in names}
        found = {name: {row.model.name: row for row in table.rows} for name, table in by_category.items()}
        heads = []
        for name in names:
            rows = inputs.summary[(inputs.summary["category"] == name) & (inputs.summary["metric"] == metric)]
            heads.append(
                {
                    "name": name,
                    "label": category_label(name),
                    "n": format_count(rows["n"].max() if len(rows) else None),
                    "novel": "genes never seen" if name in UNSEEN_CATEGORIES else "",
                }
            )
        empty = ScoreCell(MISSING, MISSING, MISSING, "", None, None)
        groups = [
            (key, title, [(r.model, [found[n][r.model.name].cells[0] if r.model.name in found[n] else empty
                                     for n in names]) for r in rows])
            for key, title, rows in by_category[contracts.ALL_CATEGORIES].groups
        ]  # fmt: skip
        tables.append(CategoryTable(metric_text(metric), heads, groups))
    return tables


def per_perturbation_scores(inputs: ReportInputs) -> pd.DataFrame:
    """Average the scores of each perturbation over folds and seeds.

    Returns
    -------
    pandas.DataFrame
        ``perturbation, category, metric, model, value``, without whole-model metrics.
    """
    rows = inputs.metrics[inputs.metrics["perturbation"] != contracts.WHOLE_MODEL]
    keys = ["perturbation", "metric", "model"]
    scores = rows.groupby(keys, sort=True, observed=True)["value"].mean().reset_index()
    category = rows.drop_duplicates("perturbation").set_index("perturbation")["category"]
    return scores.assign(category=scores["perturbation"].map(category))


def headline_frame(inputs: ReportInputs) -> pd.DataFrame:
    """Return the headline table as plain numbers, one row per model and metric."""
    rows = inputs.pooled[inputs.pooled["metric"].isin(inputs.headline_metrics)].copy()
    order = {model.name: position for position, model in enumerate(ordered_models(inputs))}
    metric_order = {name: position for position, name in enumerate(inputs.headline_metrics)}
    rows = rows.assign(_m=rows["metric"].map(metric_order), _o=rows["model"].map(order))
    rows = rows.sort_values(["_m", "_o"], kind="stable").drop(columns=["_m", "_o", "category"])
    return rows.reset_index(drop=True)


def coverage_of_sources(coverage: pd.DataFrame | None) -> tuple[list[tuple[str, str]], list[str]]:
    """Say how many perturbed genes each prior source covers, in all folds, and which no source does.

    Returns
    -------
    sources
        Name and ``covered of all``.
    uncovered
        Genes that no source covers in some fold, sorted.
    """
    if coverage is None or coverage.empty:
        return [], []
    names = [name for name in coverage.columns if name not in ("gene", "n_sources", "consequence")]
    genes = coverage.groupby("gene")[["n_sources", *names]].min()
    sources = [(name, f"{format_count(genes[name].sum())} of {format_count(len(genes))}") for name in names]
    return sources, sorted(genes.index[genes["n_sources"] == 0].astype(str))


def legacy_metrics(inputs: ReportInputs) -> list[str]:
    """Return the legacy metrics that were computed."""
    return metrics_of_role(inputs, LEGACY)


def other_metrics(inputs: ReportInputs) -> list[str]:
    """Return the computed metrics that are neither headline nor legacy."""
    present = set(inputs.summary["metric"])
    roles = {metric_text(name).role for name in present} - {HEADLINE, LEGACY}
    return metrics_of_role(inputs, *sorted(roles))
