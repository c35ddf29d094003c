"""What a report is made of, checked when it is put together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from biojepa import contracts
from biojepa.errors import InputError
from biojepa.evaluation.settings import EvaluationSettings
from biojepa.report.glossary import HEADLINE, METRIC_ORDER, PRIMARY_METRIC, metric_text

NORM_COLUMNS = ("model", "perturbation", "observed", "predicted")
UMAP_COLUMNS = ("cell", "umap_1", "umap_2", contracts.PERTURBATION, contracts.SET, contracts.BATCH)


@dataclass(frozen=True)
class Profile:
    """Observed and predicted change of one held-out perturbation over its most telling genes.

    Attributes
    ----------
    fold
        Fold in which the perturbation was held out.
    genes
        Gene symbols, largest change first.
    observed
        Change of half B against the training perturbed mean, log1p units, one value per gene.
    predicted
        The same for each model.
    """

    fold: int
    genes: list[str]
    observed: list[float]
    predicted: dict[str, list[float]]


@dataclass(frozen=True)
class ReportInputs:
    """Everything that one report shows, for one dataset and split scheme.

    Attributes
    ----------
    metrics, summary, enrichment
        Tables of ``evaluate``; ``enrichment`` may be empty.
    verdict
        ``sentence``, ``details`` (``scope``, ``text``), ``usable`` and ``dynamic_range`` per metric.
    splits
        One ``split.json`` per fold.
    qc, perturbations
        Tables of ``preprocess``.
    strata, trust
        Tables of ``evaluate``: scores by properties of the perturbations, and expected against observed
        accuracy; None in a folder that was evaluated before they existed.
    umap
        ``cell, umap_1, umap_2, perturbation, set, batch`` and, where there are several, ``run``.
    representation
        Tables ``representation.tsv`` of all folds and seeds of the model under test.
    coverage
        Which prior source covers which perturbed gene: ``coverage.tsv`` of all folds.
    histories, train_metrics
        Training curves and numbers by run, such as ``biojepa fold0 seed0``.
    profiles
        Predicted and observed change by perturbation, for the main models.
    norms
        Size of the change against the training perturbed mean, ``model, perturbation, observed,
        predicted``, in log1p units.
    machines
        Where the predictions of each model were made, by the record in their files.
    linear_targets
        How many held-out perturbations have a measured target gene, which ``linear`` needs, and of how many.
    provenance, settings
        What made the numbers, shown as they are.
    sentinels
        Checks for leakage: ``check``, ``passed``, ``detail``, ``kind``.
    downloads
        Tables beside the report: ``label``, ``href`` (relative).
    qc_page
        Address of the page of quality control, relative; empty where there is none.

    Raises
    ------
    InputError
        When a table lacks a column, or the summary holds no pooled score.
    """

    dataset: str
    split: str
    metrics: pd.DataFrame
    summary: pd.DataFrame
    enrichment: pd.DataFrame
    verdict: dict[str, Any]
    splits: list[dict[str, Any]]
    qc: pd.DataFrame
    perturbations: pd.DataFrame
    strata: pd.DataFrame | None = None
    trust: pd.DataFrame | None = None
    umap: pd.DataFrame | None = None
    representation: pd.DataFrame | None = None
    coverage: pd.DataFrame | None = None
    histories: dict[str, pd.DataFrame] = field(default_factory=dict)
    train_metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    profiles: dict[str, Profile] = field(default_factory=dict)
    norms: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=list(NORM_COLUMNS)))
    machines: dict[str, list[str]] = field(default_factory=dict)
    linear_targets: tuple[int, int] | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    sentinels: list[dict[str, Any]] = field(default_factory=list)
    downloads: list[dict[str, str]] = field(default_factory=list)
    main_model: str = "biojepa"
    qc_page: str = ""

    def __post_init__(self) -> None:
        required = {
            "metrics": contracts.METRICS_COLUMNS,
            "summary": contracts.SUMMARY_COLUMNS,
            "enrichment": contracts.ENRICHMENT_COLUMNS,
            "qc": contracts.QC_COLUMNS,
            "perturbations": contracts.PERTURBATION_TABLE_COLUMNS,
            "norms": NORM_COLUMNS,
        }
        if self.strata is not None:
            required["strata"] = contracts.STRATA_COLUMNS
        if self.trust is not None:
            required["trust"] = contracts.TRUST_COLUMNS
        if self.umap is not None:
            required["umap"] = UMAP_COLUMNS
        if self.representation is not None:
            required["representation"] = contracts.REPRESENTATION_COLUMNS
        if self.coverage is not None:
            required["coverage"] = ("gene", "n_sources", "consequence")
        for name, columns in required.items():
            require_columns(getattr(self, name), columns, f"report of {self.dataset}, table {name}")
        if not (self.summary["category"] == contracts.ALL_CATEGORIES).any():
            raise InputError(
                f"report of {self.dataset}, table summary",
                f"categories {sorted(self.summary['category'].unique())}",
                f"rows of the pooled category '{contracts.ALL_CATEGORIES}'",
                "rerun the rule evaluate",
            )

    @property
    def pooled(self) -> pd.DataFrame:
        """Return the summary rows over all held-out perturbations."""
        return self.summary[self.summary["category"] == contracts.ALL_CATEGORIES]

    @property
    def models(self) -> list[str]:
        """Return the models in the order of the summary."""
        return list(dict.fromkeys(self.summary["model"]))

    @property
    def lead_model(self) -> str:
        """Return the model that the report is about: the main model, or the first when it was not run."""
        return self.main_model if self.main_model in self.models else self.models[0]

    @property
    def headline_metrics(self) -> list[str]:
        """Return the headline metrics that were computed, in reading order."""
        present = list(dict.fromkeys(self.summary["metric"]))
        found = [name for name in present if metric_text(name).role == HEADLINE]
        return sorted(found, key=lambda name: METRIC_ORDER.index(name) if name in METRIC_ORDER else 99)

    def best_baseline(
        self, metric: str = PRIMARY_METRIC, category: str = contracts.ALL_CATEGORIES
    ) -> str | None:
        """Return the best simple baseline of a metric and category, or None where there is none."""
        rows = self.summary[(self.summary["metric"] == metric) & (self.summary["category"] == category)]
        names = rows["best_baseline"].dropna()
        names = names[names.astype(str) != ""]
        return str(names.mode().iloc[0]) if len(names) else None

    @property
    def confidence(self) -> float:
        """Return the level of the intervals, ``evaluate.confidence``."""
        return float(self.settings.get("evaluate", {}).get("confidence", EvaluationSettings.confidence))

    @property
    def fdr(self) -> float:
        """Return the q below which a comparison is significant, ``evaluate.fdr``."""
        return float(self.settings.get("evaluate", {}).get("fdr", EvaluationSettings.fdr))

    @property
    def truths_of_a_fold(self) -> tuple[int, int]:
        """Return the least and the largest number of perturbations that a fold scores, which ranks need."""
        single = self.metrics[self.metrics["perturbation"] != contracts.WHOLE_MODEL]
        counts = single.groupby("fold")["perturbation"].nunique()
        return (int(counts.min()), int(counts.max())) if len(counts) else (0, 0)

    def usable(self, metric: str) -> bool:
        """Tell whether the metric can tell a replicate from the training mean; True where nobody knows."""
        return self.verdict.get("usable", {}).get(metric) is not False


def require_columns(table: pd.DataFrame, columns: tuple[str, ...], where: str) -> None:
    """Raise ``InputError`` when a table lacks columns.

    Raises
    ------
    InputError
        Naming the table, the missing columns and those present.
    """
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise InputError(
            where,
            f"columns {', '.join(map(str, table.columns)) or 'none'}",
            f"also {', '.join(missing)}",
            "rerun the rule that writes this table, or add the columns to a table made elsewhere",
        )
