"""Compare datasets, splits and models on one page, with links to their reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from biojepa import contracts
from biojepa.errors import InputError
from biojepa.evaluation.settings import EvaluationSettings
from biojepa.evaluation.verdict import BETTER, CANNOT_TELL, NOT_EVALUATED, SAME, SUSPECTED, WORSE
from biojepa.report.decision import OUTCOMES
from biojepa.report.glossary import (
    GROUP_TITLES,
    HEADLINE,
    METRIC_ORDER,
    MetricText,
    ModelText,
    metric_text,
    model_text,
)
from biojepa.report.inputs import require_columns
from biojepa.report.page import environment
from biojepa.report.tables import format_count, format_level, format_number, format_percent

_SHORT = {
    BETTER: "better",
    SAME: "indistinguishable",
    WORSE: "worse",
    CANNOT_TELL: "cannot tell",
    NOT_EVALUATED: "not evaluated",
    SUSPECTED: "leak suspected",
}


@dataclass(frozen=True)
class IndexEntry:
    """One evaluated dataset and split: its summary table, its verdict and where its report lies.

    ``href`` and ``qc_href``, where its quality control lies, are relative to the index; ``confidence`` is the
    level of the intervals.
    """

    dataset: str
    split: str
    summary: pd.DataFrame
    verdict: dict[str, Any]
    href: str
    confidence: float = EvaluationSettings.confidence
    qc_href: str = ""

    def __post_init__(self) -> None:
        require_columns(
            self.summary, contracts.SUMMARY_COLUMNS, f"index, summary of {self.dataset}, split {self.split}"
        )

    def row(self, model: str, metric: str) -> dict[str, Any]:
        """Return the pooled summary row of a model and metric, empty where it was not computed."""
        rows = self.summary[
            (self.summary["category"] == contracts.ALL_CATEGORIES)
            & (self.summary["model"] == model)
            & (self.summary["metric"] == metric)
        ]
        return {str(key): value for key, value in rows.iloc[0].items()} if len(rows) else {}


@dataclass(frozen=True)
class UnevaluatedEntry:
    """One dataset whose models were trained on everything; addresses are relative to the index."""

    dataset: str
    split: str
    href: str
    qc_href: str = ""


def build_index(
    reports: list[IndexEntry], main_model: str = "biojepa", unevaluated: Sequence[UnevaluatedEntry] = ()
) -> str:
    """Return the index of all reports as HTML: verdicts first, then models by dataset for each metric.

    Raises
    ------
    InputError
        When there is no report to list.
    """
    if not reports and not unevaluated:
        raise InputError("index", "no report", "at least one dataset", "add a row to the table of datasets")
    metrics = [
        metric_text(name)
        for name in METRIC_ORDER
        if metric_text(name).role == HEADLINE and any((r.summary["metric"] == name).any() for r in reports)
    ]
    names = sorted({name for report in reports for name in report.summary["model"]})
    groups = list(GROUP_TITLES)
    models = sorted(
        (model_text(name, main_model) for name in names), key=lambda m: (groups.index(m.group), m.name)
    )
    return environment().get_template("index.html.j2").render(
        cards=[_card(report, metrics, main_model) for report in reports],
        matrices=[_matrix(text, models, reports) for text in metrics],
        reports=reports,
        unevaluated=unevaluated,
        level=" or ".join(format_level(level) for level in sorted({r.confidence for r in reports})),
        lead=model_text(main_model, main_model),
    )  # fmt: skip


def _card(report: IndexEntry, metrics: list[MetricText], main_model: str) -> dict[str, Any]:
    """Return what the overview says about one report; scores of the first usable metric come first."""
    outcome = str(report.verdict.get("outcome"))
    tone, _ = OUTCOMES.get(outcome, ("open", ""))
    present = set(report.summary["model"])
    tested = report.verdict.get("model") or main_model
    lead = str(tested) if tested in present else str(report.summary["model"].iloc[0])
    scores = []
    for text in metrics:
        own = report.row(lead, text.name)
        best = own.get("best_baseline")
        best = None if best is None or pd.isna(best) or best == "" else str(best)
        scores.append(
            {
                "metric": text,
                "usable": report.verdict.get("usable", {}).get(text.name) is not False,
                "model": format_number(own.get("mean")),
                "gap": format_percent(own.get("gap_closed")),
                "baseline": format_number(report.row(best, text.name).get("mean") if best else None),
                "baseline_name": model_text(best).label if best else "",
                "duplicate": format_number(report.row("duplicate", text.name).get("mean")),
                "mean": None if pd.isna(own.get("mean")) else float(own["mean"]),
                "share": None if pd.isna(own.get("gap_closed")) else float(own["gap_closed"]),
            }
        )
    n = report.summary.loc[report.summary["category"] == contracts.ALL_CATEGORIES, "n"].max()
    return {
        "report": report,
        "tone": tone,
        "label": _SHORT.get(outcome, "no verdict"),
        "models": format_count(len(present)),
        "deciding": next((item for item in scores if item["usable"]), scores[0] if scores else None),
        "lead": model_text(lead, lead),
        "sentence": report.verdict.get("sentence") or "No verdict was recorded.",
        "n": format_count(n),
        "count": None if pd.isna(n) else int(n),
        "scores": scores,
    }


def _matrix(text: MetricText, models: list[ModelText], reports: list[IndexEntry]) -> dict[str, Any]:
    """Return one metric as models down, in groups, and reports across, with the gap closed as a bar."""
    groups: dict[str, list[tuple[ModelText, list[dict[str, Any]]]]] = {}
    for model in models:
        cells = []
        for report in reports:
            row = report.row(model.name, text.name)
            gap = row.get("gap_closed")
            bar = None if gap is None or pd.isna(gap) else round(min(max(100 * float(gap), 0), 100), 1)
            interval = ""
            if row and not pd.isna(row["ci_low"]):
                interval = f"{format_number(row['ci_low'])} to {format_number(row['ci_high'])}"
            cells.append({"value": format_number(row.get("mean")), "interval": interval, "bar": bar})
        if any(cell["value"] != "–" for cell in cells):
            groups.setdefault(model.group, []).append((model, cells))
    return {"metric": text, "groups": [(key, GROUP_TITLES[key], rows) for key, rows in groups.items()]}
