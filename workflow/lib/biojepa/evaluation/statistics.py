"""From scores per perturbation to intervals, shares of the gap, and comparisons with a baseline.

A perturbation scored in several folds or seeds is averaged first; folds are pooled. Intervals resample
perturbations and, for models trained from several seeds, the seeds (see ``resampling``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from biojepa.contracts import CATEGORY, PERTURBATION, POSITIVE_CONTROLS, SUMMARY_COLUMNS
from biojepa.evaluation.registry import Metric
from biojepa.evaluation.resampling import (
    Scope,
    SeededScores,
    WholeModelScores,
    bootstrap_means,
    interval,
    nan_mean,
    resampled_means,
    units_of,
)

# Predictions are float32: the same prediction summed in another order is a tie, not a win.
TIE = 1e-6
DIFFERENCE_DIGITS = 12
FLOOR, CEILING = "mean", "duplicate"


@dataclass(frozen=True)
class MetricTable:
    """One metric in one scope for all models.

    Attributes
    ----------
    values
        (perturbations, models), averaged over folds and seeds; None for whole-model metrics.
    n, mean
        (models,): defined perturbations and the pooled score.
    draws
        (draws, models): the pooled score of every bootstrap sample.
    seeded
        Scores by training of the models, given by column, that have several seeds.
    """

    metric: Metric
    scope: Scope
    models: list[str]
    values: np.ndarray | None
    n: np.ndarray
    mean: np.ndarray
    draws: np.ndarray
    seeded: dict[int, SeededScores] = field(default_factory=dict)

    def column(self, model: str) -> int | None:
        """Return the column of a model, None where it has no score."""
        if model not in self.models:
            return None
        column = self.models.index(model)
        return column if np.isfinite(self.mean[column]) else None

    def dynamic_range(self, confidence: float) -> tuple[float, float, float]:
        """Return how much better the duplicate is than the mean baseline, with its interval."""
        floor, ceiling = self.column(FLOOR), self.column(CEILING)
        if floor is None or ceiling is None:
            return (np.nan, np.nan, np.nan)
        span = self.metric.goodness(self.draws[:, ceiling]) - self.metric.goodness(self.draws[:, floor])
        low, high = interval(span[:, None], confidence)
        best = self.metric.goodness(self.mean[ceiling]) - self.metric.goodness(self.mean[floor])
        return float(best), float(low[0]), float(high[0])

    def gap_closed(self, confidence: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (score − mean baseline) / (duplicate − mean baseline) and its interval, per model.

        A ratio of pooled means over the perturbations where all three are defined. NaN where the
        dynamic range may be 0 or less, since a share of nothing has no meaning.
        """
        undefined = np.full(len(self.models), np.nan)
        floor, ceiling = self.column(FLOOR), self.column(CEILING)
        if floor is None or ceiling is None or not self.dynamic_range(confidence)[1] > 0:
            return undefined, undefined.copy(), undefined.copy()
        if self.metric.best not in ("max", "min"):
            # What lies beyond the best value is no better than what falls short of it.
            pooled, drawn = self.metric.goodness(self.mean), self.metric.goodness(self.draws)
            point = _ratio(pooled - pooled[floor], pooled[ceiling] - pooled[floor])
            ratio = _ratio(drawn - drawn[:, [floor]], drawn[:, [ceiling]] - drawn[:, [floor]])
            return (point, *interval(ratio, confidence))
        if self.values is None:
            point = (self.mean - self.mean[floor]) / (self.mean[ceiling] - self.mean[floor])
            ratio = _ratio(
                self.draws - self.draws[:, [floor]], self.draws[:, [ceiling]] - self.draws[:, [floor]]
            )
            return (point, *interval(ratio, confidence))
        above = self.values - self.values[:, [floor]]
        span = np.repeat(above[:, [ceiling]], len(self.models), axis=1)
        common = np.isfinite(above) & np.isfinite(span)
        above, span = np.where(common, above, 0.0), np.where(common, span, 0.0)
        point = _ratio(above.sum(axis=0, keepdims=True), span.sum(axis=0, keepdims=True))[0]
        ratio = _ratio(self.scope.counts @ above, self.scope.counts @ span)
        for column in range(len(self.models)):
            if self.seeded.keys() & {column, floor, ceiling}:
                chosen = common[:, column]
                ratio[:, column] = _ratio(
                    self._summed_difference(column, floor, chosen),
                    self._summed_difference(ceiling, floor, chosen),
                )
        return (point, *interval(ratio, confidence))

    def _summed_difference(self, first: int, second: int, chosen: np.ndarray) -> np.ndarray:
        """Return the sum over chosen perturbations of one model's score minus another's, (draws,).

        Each sample takes the seeds that it drew. A perturbation that none of these scored is left out.
        """
        found = [self.seeded[column] for column in (first, second) if column in self.seeded]
        if all(scores.even for scores in found):
            return self._totals(first, chosen) - self._totals(second, chosen)
        difference = self.drawn(first) - self.drawn(second)
        return (self.scope.counts * np.where(chosen & np.isfinite(difference), difference, 0.0)).sum(axis=1)

    def _totals(self, column: int, chosen: np.ndarray) -> np.ndarray:
        """Return the sum of a model's scores over chosen perturbations in every sample, (draws,)."""
        assert self.values is not None
        if column in self.seeded:
            return self.seeded[column].totals(self.scope.counts, chosen)
        return self.scope.counts @ np.where(chosen, self.values[:, column], 0.0)

    def drawn(self, column: int) -> np.ndarray:
        """Return the scores of a model per perturbation in every sample.

        Returns
        -------
        numpy.ndarray
            (draws, perturbations) where seeds are drawn, else (1, perturbations).
        """
        assert self.values is not None
        found = self.seeded.get(column)
        return self.values[:, column][None] if found is None else found.drawn()

    def best_baseline(self, baselines: Iterable[str]) -> str | None:
        """Return the simple model with the best pooled score among those scored on the most perturbations.

        Chosen on the very perturbations it is then compared on: that favours the baseline, so a win
        against it is understated.
        """
        columns = [column for name in baselines if (column := self.column(name)) is not None]
        if not columns:
            return None
        most = max(self.n[column] for column in columns)
        goodness = self.metric.goodness(self.mean)
        complete = [column for column in columns if self.n[column] == most]
        return self.models[max(complete, key=lambda column: goodness[column])]

    def difference(self, model: str, other: str) -> np.ndarray:
        """Return by how much a model is better than another, per perturbation scored by both."""
        gain = self.gains(model, other)
        return np.array([]) if gain is None else gain[np.isfinite(gain)]

    def unit_differences(self, model: str, other: str) -> np.ndarray:
        """Return the same, averaged over the contexts of a perturbation: what a test may count as one."""
        gain = self.gains(model, other)
        if gain is None:
            return np.array([])
        defined = np.isfinite(gain)
        _, owner = units_of(self.scope.perturbations[defined])
        return np.bincount(owner, weights=gain[defined]) / np.bincount(owner)

    def gains(self, model: str, other: str) -> np.ndarray | None:
        """Return by how much a model is better than another, (perturbations,), NaN where one has no score.

        A tie is exactly 0. None for whole-model metrics and where a model is missing.
        """
        first, second = self.column(model), self.column(other)
        if self.values is None or first is None or second is None:
            return None
        gain = self.metric.goodness(self.values[:, first]) - self.metric.goodness(self.values[:, second])
        return np.where(np.abs(gain) <= TIE, 0.0, gain)

    def gain_draws(self, model: str, other: str) -> np.ndarray | None:
        """Return the mean gain of a model over another in every bootstrap sample, (draws,), ties as 0.

        None where ``gains`` is.
        """
        gain = self.gains(model, other)
        first, second = self.column(model), self.column(other)
        if gain is None or first is None or second is None:
            return None
        found = [self.seeded[column] for column in (first, second) if column in self.seeded]
        if not found:
            return bootstrap_means(gain[:, None], self.scope.counts)[:, 0]
        if self.metric.best in ("max", "min") and all(scores.even for scores in found):
            chosen = np.isfinite(gain)
            total = self._summed_difference(first, second, chosen)
            mean = _ratio(self.metric.goodness(total), self.scope.counts @ chosen.astype(float))
            # Where all perturbations are tied, so is their mean.
            return np.where(np.abs(mean) <= TIE, 0.0, mean)
        drawn = self.metric.goodness(self.drawn(first)) - self.metric.goodness(self.drawn(second))
        return resampled_means(np.where(np.abs(drawn) <= TIE, 0.0, drawn), self.scope.counts)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Divide, NaN where the denominator is 0 or undefined."""
    numerator, denominator = np.broadcast_arrays(numerator, denominator)
    defined = np.isfinite(denominator) & (denominator != 0)
    return np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=defined)


def metric_tables(
    scores: pd.DataFrame,
    whole: WholeModelScores,
    metrics: dict[str, Metric],
    scopes: dict[str, Scope],
) -> list[MetricTable]:
    """Pool the scores of every metric in every scope.

    Parameters
    ----------
    scores
        Long table of scores per perturbation (columns of ``metrics.tsv``).
    whole
        Scores of the whole-model metrics.
    metrics, scopes
        What to pool; metrics without any score are left out.
    """
    models = list(dict.fromkeys(scores["model"]))
    by_metric = dict(tuple(scores.groupby("metric", sort=False)))
    tables = []
    for scope in scopes.values():
        for metric in metrics.values():
            if metric.unit == "model":
                table = _whole_model_table(metric, scope, models, whole)
            elif metric.name in by_metric:
                table = _perturbation_table(metric, scope, models, by_metric[metric.name])
            else:
                continue
            if np.isfinite(table.mean).any():
                tables.append(table)
    return tables


def _whole_model_table(
    metric: Metric, scope: Scope, models: list[str], whole: WholeModelScores
) -> MetricTable:
    pooled = np.column_stack([whole.pooled(model, metric.name, scope) for model in models])
    n = np.where(np.isfinite(pooled[0]), whole.n(metric.name, scope), 0)
    return MetricTable(metric, scope, models, None, n, pooled[0], pooled[1:])


def _perturbation_table(metric: Metric, scope: Scope, models: list[str], scores: pd.DataFrame) -> MetricTable:
    inside = scores[scores[CATEGORY].isin(scope.categories)]
    averaged = inside.groupby([PERTURBATION, "model"], observed=True)["value"].mean().unstack("model")
    values = averaged.reindex(index=scope.perturbations, columns=models).to_numpy(dtype=float)
    draws = bootstrap_means(values, scope.counts)
    seeded = _seeded_scores(inside, scope, models)
    for column, scored in seeded.items():
        defined = np.isfinite(values[:, column])
        if scored.even:
            number = scope.counts @ defined.astype(float)
            draws[:, column] = _ratio(scored.totals(scope.counts, defined), number)
        else:
            draws[:, column] = resampled_means(scored.drawn(), scope.counts)
    return MetricTable(
        metric, scope, models, values, np.isfinite(values).sum(axis=0), nan_mean(values), draws, seeded
    )


def _seeded_scores(scores: pd.DataFrame, scope: Scope, models: list[str]) -> dict[int, SeededScores]:
    """Return the scores by training of every model that has several seeds in some fold, by its column."""
    if scores["seed"].nunique() < 2:
        return {}
    columns = pd.Index(models).get_indexer(pd.Index(scores["model"]))
    folds, fold = np.unique(scores["fold"].to_numpy(), return_inverse=True)
    seeds, seed = np.unique(scores["seed"].to_numpy(), return_inverse=True)
    number = (columns * len(folds) + fold) * len(seeds) + seed
    trainings, training = np.unique(number, return_inverse=True)
    values = np.full((len(scope.perturbations), len(trainings)), np.nan)
    rows = scope.perturbations.get_indexer(pd.Index(scores[PERTURBATION]))
    values[rows, training] = scores["value"].to_numpy(float)
    of_fold, of_seed = trainings // len(seeds), trainings % len(seeds)
    of_model, of_fold = of_fold // len(folds), of_fold % len(folds)
    found = {}
    for column in np.unique(of_model):
        own = np.flatnonzero(of_model == column)
        if len(np.unique(of_fold[own])) < len(own):
            runs = [(int(folds[of_fold[place]]), int(seeds[of_seed[place]])) for place in own]
            found[int(column)] = SeededScores(values[:, own], of_fold[own], scope.training_counts(runs))
    return found


def wilcoxon_p(difference: np.ndarray) -> float:
    """Return the two-sided p-value of Wilcoxon's signed-rank test; 1 when nothing differs.

    Zero differences are left out (Wilcoxon's own rule); NaN below two perturbations. Exact up to 50
    differences without ties, otherwise the normal approximation with continuity correction. Differences
    that are equal but for rounding are ties, so that the order of a sum does not decide.
    """
    if len(difference) < 2:
        return float("nan")
    difference = np.round(difference, DIFFERENCE_DIGITS)
    difference = difference[difference != 0]
    if not len(difference):
        return 1.0
    # scipy's own choice for few tied differences enumerates permutations, which takes 0.6 s each.
    tied = len(np.unique(np.abs(difference))) < len(difference)
    method = "asymptotic" if tied or len(difference) > 50 else "exact"
    return float(stats.wilcoxon(difference, method=method, correction=method == "asymptotic").pvalue)


def summarize(tables: Sequence[MetricTable], baselines: Sequence[str], confidence: float) -> pd.DataFrame:
    """Return ``summary.tsv``: pooled score, interval, gap closed and comparison with the best baseline.

    ``q_vs_best_baseline`` is Benjamini–Hochberg over all models × metrics within a category: whoever reads
    a table looks at all of its stars. Legacy metrics, by which nobody should decide, are a family of their
    own, so that their easy wins do not make others look surer. Positive controls, which nobody claims to
    beat, get no q and do not enter. The test is on means over seeds and does not know how much trainings
    differ; the interval of the difference, which decides the verdict, does.
    """
    blocks = []
    for table in tables:
        block = _summary_block(table, baselines, confidence)
        blocks.append(block.assign(role=table.metric.role))
    summary = pd.concat(blocks, ignore_index=True)
    summary["q_vs_best_baseline"] = np.nan
    tested = summary["p_vs_best_baseline"].notna() & ~summary["model"].isin(POSITIVE_CONTROLS)
    for _, family in summary[tested].groupby([summary[CATEGORY], summary["role"] == "legacy"]):
        q_values = stats.false_discovery_control(family["p_vs_best_baseline"])
        summary.loc[family.index, "q_vs_best_baseline"] = q_values
    return summary[list(SUMMARY_COLUMNS)]


def pooled_rows(table: MetricTable, confidence: float) -> dict[str, dict[str, Any]]:
    """Return what tables say of each model with a score: pooled score, share of the gap and intervals.

    Intervals are missing below two perturbations: one resamples to itself, and an interval of width 0 would
    claim certainty.

    Returns
    -------
    dict
        Model to its columns ``model``, ``metric``, ``n``, ``mean``, ``gap_closed`` and the ends of both
        intervals.
    """
    low, high = interval(table.draws, confidence)
    gap, gap_low, gap_high = table.gap_closed(confidence)
    several = (table.n > 1) & (table.scope.n_units > 1)
    low, high, gap_low, gap_high = (
        np.where(several, ends, np.nan) for ends in (low, high, gap_low, gap_high)
    )
    return {
        model: {
            "model": model,
            "metric": table.metric.name,
            "n": int(table.n[column]),
            "mean": table.mean[column],
            "ci_low": low[column],
            "ci_high": high[column],
            "gap_closed": gap[column],
            "gap_ci_low": gap_low[column],
            "gap_ci_high": gap_high[column],
        }
        for column, model in enumerate(table.models)
        if np.isfinite(table.mean[column])
    }


def _summary_block(table: MetricTable, baselines: Sequence[str], confidence: float) -> pd.DataFrame:
    """Return the rows of one metric and category, one per model with a score."""
    best = table.best_baseline(baselines)
    rows = []
    for model, pooled in pooled_rows(table, confidence).items():
        row = pooled | {
            "category": table.scope.name,
            "best_baseline": best,
            "p_vs_best_baseline": np.nan,
            "win_rate": np.nan,
            "harm_rate": np.nan,
        }
        difference = table.difference(model, best) if best not in (None, model) else np.array([])
        if len(difference):
            row["p_vs_best_baseline"] = wilcoxon_p(table.unit_differences(model, str(best)))
            row["win_rate"], row["harm_rate"] = (difference > 0).mean(), (difference < 0).mean()
        rows.append(row)
    return pd.DataFrame(rows)


def paired_difference(
    table: MetricTable, model: str, other: str, confidence: float
) -> tuple[float, float, float]:
    """Return the mean gain of a model over another and its bootstrap interval; positive is better."""
    gain, draws = table.gains(model, other), table.gain_draws(model, other)
    if gain is None or draws is None or not np.isfinite(gain).any():
        return (np.nan, np.nan, np.nan)
    low, high = interval(draws[:, None], confidence)
    return float(np.nanmean(gain)), float(low[0]), float(high[0])
