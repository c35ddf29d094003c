"""Where does it work? Scores by properties of the held-out perturbations.

Properties that are measured come from half A, and scores from half B, so that a perturbation is not
called strong for the very noise that is scored. Two properties cannot keep that apart: the score of the
duplicate, and the share of the gap that the best baseline closes, which say how much there was to gain.
Sorted by them, chance alone makes the duplicate or the baseline low in the lowest stratum (regression to
the mean), so that models look better than them there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from biojepa.contracts import CATEGORIES, CATEGORY, N_CELLS, PERTURBATION, STRATA_COLUMNS
from biojepa.evaluation.metrics import METRICS
from biojepa.evaluation.registry import Metric
from biojepa.evaluation.resampling import Scope, WholeModelScores, draw_counts
from biojepa.evaluation.settings import EvaluationSettings
from biojepa.evaluation.statistics import (
    CEILING,
    FLOOR,
    MetricTable,
    metric_tables,
    paired_difference,
    pooled_rows,
)
from biojepa.evaluation.truth import FoldTruth
from biojepa.evaluation.verdict import DECIDING
from biojepa.labels import genes_of
from biojepa.neighbours import (
    CodedGenes,
    PriorCodes,
    coverage_share,
    covered_genes,
    nearest_columns,
    nearest_training_genes,
)

MAX_STRATA = 3
NAMES = {2: ("low", "high"), 3: ("low", "middle", "high")}
MISSING = "missing"
MEASURED = ("n_genes_seen", "nearest_distance", "prior_coverage", N_CELLS, "n_significant", "effect_size")
FROM_SCORES = ("duplicate_score", "baseline_gap")
PROPERTIES = (CATEGORY, *MEASURED, *FROM_SCORES)
# Apart from the streams of the scopes of the summary.
_STREAM = 3000
_NAMES = (*CATEGORIES, *NAMES[3], MISSING)


@dataclass(frozen=True)
class Stratum:
    """Perturbations with a similar value of one property.

    Attributes
    ----------
    name
        ``low``, ``middle``, ``high``; ``missing`` where the property is not known; or a category.
    lower, upper
        Smallest and largest value inside; NaN for categories and missing values.
    members
        Perturbations, sorted.
    """

    name: str
    lower: float
    upper: float
    members: pd.Index


def perturbation_properties(
    truths: Sequence[FoldTruth], trained: Sequence[Sequence[str]], codes: Sequence[CodedGenes] | None = None
) -> pd.DataFrame:
    """Describe the test perturbations of every fold.

    Parameters
    ----------
    truths
        Truth of each fold.
    trained
        Training perturbations of each fold.
    codes
        Prior codes of each fold; None where nobody knows them, so that a gene that training never
        perturbed has no nearest one, and the coverage is missing.

    Returns
    -------
    pandas.DataFrame
        One row per fold and test perturbation: ``perturbation``, ``fold``, ``category``,
        ``n_genes_seen``, ``nearest_training_gene``, ``nearest_similarity`` and ``nearest_distance`` (of
        the least known gene; 1 and 0 where training perturbed it), ``prior_coverage`` (share of the
        sources that cover all its genes), ``n_cells``, ``n_significant`` (genes that differ from control
        in half A) and ``effect_size``: length of the change of half A against control (log1p units, over
        genes) after subtracting what sampling noise adds to its square, 0 where nothing is left.
    """
    per_fold: Sequence[CodedGenes] = codes or [PriorCodes((), {})] * len(truths)
    parts = []
    for truth, training, known in zip(truths, trained, per_fold, strict=True):
        seen = {gene for label in training for gene in genes_of(label)}
        wanted = {gene for label in truth.perturbations for gene in genes_of(label)}
        nearest, covered = nearest_training_genes(known, wanted, seen), covered_genes(known)
        parts.append(
            pd.DataFrame(
                {
                    PERTURBATION: truth.perturbations,
                    "fold": truth.fold,
                    CATEGORY: truth.categories,
                    "n_genes_seen": truth.n_genes_seen,
                    **pd.DataFrame([nearest_columns(label, nearest) for label in truth.perturbations]),
                    "prior_coverage": np.nan
                    if codes is None
                    else [coverage_share(label, covered) for label in truth.perturbations],
                    N_CELLS: truth.n_a + truth.n_b,
                    "n_significant": truth.n_significant_half_a,
                    "effect_size": _effect_size(truth),
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


def _effect_size(truth: FoldTruth) -> np.ndarray:
    """Length (perturbations,) of the change of half A against control, sampling noise subtracted."""
    squares = ((truth.half_a - truth.control_mean) ** 2).sum(axis=1)
    noise = (truth.var_a / truth.n_a[:, None] + truth.control_var / truth.n_control).sum(axis=1)
    return np.sqrt(np.maximum(squares - noise, 0.0))


def stratify(values: pd.Series, min_size: int, max_strata: int = MAX_STRATA) -> list[Stratum]:
    """Cut perturbations into strata of about equal size by one property.

    Equal values stay together: each cut lies at the border between two values that is nearest to the
    quantile, the lower one of two equally near. The number of strata is the largest up to
    ``max_strata`` of which all hold ``min_size`` perturbations.

    Parameters
    ----------
    values
        Property, indexed by perturbation; NaN where it is not known.

    Returns
    -------
    Strata by rising value, then one of the perturbations without a value, of whatever size. Empty where
    not even two strata are large enough.
    """
    known = values.dropna()
    order = known.iloc[np.lexsort((known.index.to_numpy(), known.to_numpy()))]
    ordered = order.to_numpy(dtype=float)
    borders = np.flatnonzero(np.diff(ordered) > 0) + 1
    for n_strata in range(max_strata, 1, -1):
        cuts = _cuts(borders, len(ordered), n_strata)
        if len(cuts) < n_strata - 1 or min(np.diff([0, *cuts, len(ordered)])) < min_size:
            continue
        strata = [
            Stratum(
                name, float(ordered[start]), float(ordered[stop - 1]), order.index[start:stop].sort_values()
            )
            for name, start, stop in zip(NAMES[n_strata], [0, *cuts], [*cuts, len(ordered)], strict=True)
        ]
        lost = values.index[values.isna()].sort_values()
        return [*strata, Stratum(MISSING, np.nan, np.nan, lost)] if len(lost) else strata
    return []


def _cuts(borders: np.ndarray, n: int, n_strata: int) -> list[int]:
    """Return the borders nearest to the quantiles, each once."""
    if not len(borders):
        return []
    targets = [n * part / n_strata for part in range(1, n_strata)]
    return sorted({int(borders[np.argmin(np.abs(borders - target))]) for target in targets})


def strata_table(
    scores: pd.DataFrame,
    overall: Mapping[str, MetricTable],
    properties: pd.DataFrame,
    settings: EvaluationSettings,
) -> pd.DataFrame:
    """Score every model in every stratum, by the metrics that decide the verdict.

    Models are compared with the simple model that is best over all test perturbations, the same in each
    stratum: choosing again within one would favour the baseline more, the smaller the stratum.

    Parameters
    ----------
    scores
        Scores per perturbation, columns of ``metrics.tsv``.
    overall
        Metric to its pooled scores over all test perturbations.
    properties
        From :func:`perturbation_properties`.
    settings
        Draws, seed, level, baselines; ``min_perturbations`` is the least size of a stratum.

    Returns
    -------
    pandas.DataFrame
        Columns ``contracts.STRATA_COLUMNS``. Categories are listed whatever their size.
    """
    rows: list[dict[str, object]] = []
    numeric = properties.groupby(PERTURBATION)[list(MEASURED)].mean()
    for name in DECIDING:
        if name not in overall:
            continue
        best = overall[name].best_baseline([name for name in settings.baselines if name != settings.model])
        found = scores[scores["metric"] == name]
        described = numeric.join(_score_properties(found, METRICS[name], best))
        scopes, strata = {}, {}
        for prop, stratum, categories in _all_strata(properties, described, settings.min_perturbations):
            key = f"{prop}: {stratum.name}"
            stream = _STREAM + PROPERTIES.index(prop)
            rng = np.random.default_rng([settings.seed, stream, _NAMES.index(stratum.name)])
            counts = draw_counts(stratum.members, settings.draws, rng)
            scopes[key] = Scope(key, categories, stratum.members, counts, settings.seed)
            strata[key] = prop, stratum
        for table in metric_tables(found, WholeModelScores(scopes), {name: METRICS[name]}, scopes):
            rows += _rows(table, *strata[table.scope.name], best, settings.confidence)
    return pd.DataFrame(rows, columns=list(STRATA_COLUMNS))


def _score_properties(scores: pd.DataFrame, metric: Metric, best: str | None) -> pd.DataFrame:
    """Return the properties that are scores themselves, indexed by perturbation.

    ``baseline_gap`` is (best baseline − mean baseline) / (duplicate − mean baseline), undefined where the
    duplicate is no better than the mean baseline.
    """
    table = scores.groupby([PERTURBATION, "model"], observed=True)["value"].mean().unstack("model")
    answer = pd.DataFrame(np.nan, index=table.index, columns=list(FROM_SCORES))
    if CEILING in table:
        answer["duplicate_score"] = table[CEILING]
    if {FLOOR, CEILING, best} <= set(table):
        floor, ceiling, reached = (
            metric.goodness(table[name].to_numpy(float)) for name in (FLOOR, CEILING, best)
        )
        span = ceiling - floor
        undefined = np.full(len(table), np.nan)
        answer["baseline_gap"] = np.divide(reached - floor, span, out=undefined, where=span > 0)
    return answer


def _all_strata(
    properties: pd.DataFrame, described: pd.DataFrame, min_size: int
) -> Iterator[tuple[str, Stratum, tuple[str, ...]]]:
    """Yield property, stratum and the categories whose scores count in it."""
    for category in CATEGORIES:
        members = properties.loc[properties[CATEGORY] == category, PERTURBATION]
        if len(members):
            inside = pd.Index(sorted(set(members)))
            yield CATEGORY, Stratum(category, np.nan, np.nan, inside), (category,)
    for name in (*MEASURED, *FROM_SCORES):
        for stratum in stratify(described[name], min_size):
            yield name, stratum, tuple(CATEGORIES)


def _rows(
    table: MetricTable, prop: str, stratum: Stratum, best: str | None, confidence: float
) -> list[dict[str, object]]:
    rows = []
    for model, pooled in pooled_rows(table, confidence).items():
        difference = (np.nan, np.nan, np.nan)
        if best is not None and model != best:
            difference = paired_difference(table, model, best, confidence)
            if len(table.unit_differences(model, best)) < 2:
                difference = (difference[0], np.nan, np.nan)
        rows.append(
            pooled
            | {
                "property": prop,
                "stratum": stratum.name,
                "lower": stratum.lower,
                "upper": stratum.upper,
                "best_baseline": best,
                "difference": difference[0],
                "difference_ci_low": difference[1],
                "difference_ci_high": difference[2],
            }
        )
    return rows
