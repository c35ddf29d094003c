"""Say how good the prediction of a perturbation will be that nobody has measured.

The expected accuracy of the model under test is fitted on held-out perturbations, from what is known
before a perturbation is measured: its kind (category, and how many of its genes training had seen), the
similarity to its nearest training gene, the share of prior sources that cover it, and what the model
itself says, the length of the predicted change and its relative uncertainty. The fit is a ridge with an
intercept, kinds as indicators, so that the mean of a kind is drawn to that of all the more, the fewer
perturbations it has. The penalty is the one with the least leave-one-out error, no relation at all
(an infinite penalty) among the choices.

The expected accuracy of a held-out perturbation comes from a fit to others: perturbations are dealt into
groups, each group is left out in turn, and all that is chosen or standardized in a fit is so without it.
The interval is the quantile of the leave-one-out errors of those others (jackknife). So both may be
compared with the score of the perturbation, which they never saw.

Nothing but numpy and pandas is imported, since the predict stage uses the same fit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from biojepa.contracts import CATEGORY, PERTURBATION, TRUST_COLUMNS
from biojepa.evaluation.resampling import bootstrap_means, draw_counts, interval, units_of
from biojepa.evaluation.settings import EvaluationSettings
from biojepa.labels import perturbation_of

METRIC = "pearson_delta_perturbed_mean"
BOUNDS = (-1.0, 1.0)
NOMINAL = 0.8
"""Share of perturbations that an interval should hold."""
PENALTIES = (*np.logspace(-1, 4, 11).tolist(), math.inf)
MAX_GROUPS = 50
FEATURES = ("nearest_similarity", "prior_coverage", "predicted_effect", "relative_sd")
FROM_FEATURES, FROM_KIND = "features", "kind"
# Apart from the streams of the scopes of the summary and of the strata.
_STREAM = 2000

Kind = tuple[str, int]
"""Category of a perturbation, and how many of its genes training had seen."""


def effect_sizes(change: np.ndarray) -> np.ndarray:
    """Length over genes of changes (perturbations, genes) against control, log1p units."""
    return np.linalg.norm(change, axis=1)


def effect_size_sds(change: np.ndarray, sd: np.ndarray) -> np.ndarray:
    """Propagate the uncertainty of genes, taken as independent, to the length of changes, to first order.

    Returns
    -------
    (perturbations,), NaN where nothing changes.
    """
    length = effect_sizes(change)
    spread = np.linalg.norm(change * sd, axis=1)
    return np.divide(spread, length, out=np.full(len(length), np.nan), where=length > 0)


@dataclass(frozen=True)
class TrustModel:
    """A fitted relation of accuracy to what is known before a perturbation is measured.

    Attributes
    ----------
    kinds
        Kinds among the perturbations that it was fitted to.
    centre, scale, lowest, highest
        (features,): mean, standard deviation and range in the fit. Values outside of the range are moved
        to its end, since nothing was fitted there.
    shares
        (kinds,): share of the perturbations of each kind.
    intercept, weights
        Mean accuracy, and (kinds + features,) what each adds.
    penalty
        Of the ridge; infinite where nothing but the mean is used.
    half_width
        Half of the interval's width.
    """

    kinds: tuple[Kind, ...]
    centre: np.ndarray
    scale: np.ndarray
    lowest: np.ndarray
    highest: np.ndarray
    shares: np.ndarray
    intercept: float
    weights: np.ndarray
    penalty: float
    half_width: float

    @classmethod
    def fit(cls, table: pd.DataFrame) -> TrustModel:
        """Fit the accuracies ``observed`` of a table with the columns of ``trust.tsv``, at least two rows."""
        kinds = tuple(sorted(set(_kinds_of(table))))
        values = _features_of(table)
        known = np.isfinite(values).any(axis=0)
        centre, scale = np.zeros(len(FEATURES)), np.zeros(len(FEATURES))
        lowest, highest = np.zeros(len(FEATURES)), np.zeros(len(FEATURES))
        centre[known], scale[known] = (
            np.nanmean(values[:, known], axis=0),
            np.nanstd(values[:, known], axis=0),
        )
        lowest[known], highest[known] = (
            np.nanmin(values[:, known], axis=0),
            np.nanmax(values[:, known], axis=0),
        )
        # What is the same for all but rounding tells nothing.
        scale[scale <= 1e-9 * np.maximum(np.abs(centre), 1.0)] = 0.0
        blank = cls(kinds, centre, scale, lowest, highest, np.zeros(len(kinds)), 0.0, np.zeros(0), 0.0, 0.0)
        raw = blank._design(table)
        shares = raw[:, : len(kinds)].mean(axis=0)
        raw[:, : len(kinds)] -= shares
        observed = table["observed"].to_numpy(float)
        intercept = float(observed.mean())
        weights, penalty, left_out = _ridge(raw, observed - intercept)
        width = _quantile(np.abs(left_out), NOMINAL)
        return cls(kinds, centre, scale, lowest, highest, shares, intercept, weights, penalty, width)

    def _design(self, table: pd.DataFrame) -> np.ndarray:
        """Return indicators of kinds and standardized features; unknown values are average ones."""
        position = {kind: column for column, kind in enumerate(self.kinds)}
        indicators = np.zeros((len(table), len(self.kinds)))
        for row, kind in enumerate(_kinds_of(table)):
            if kind in position:
                indicators[row, position[kind]] = 1.0
        values = np.clip(_features_of(table), self.lowest, self.highest)
        scale = np.where(self.scale > 0, self.scale, 1.0)
        standardized = np.where(np.isfinite(values) & (self.scale > 0), (values - self.centre) / scale, 0.0)
        return np.hstack([indicators, standardized])

    def expected(self, table: pd.DataFrame) -> np.ndarray:
        """Return the expected accuracy of each row; a kind that was not fitted counts as an average one."""
        design = self._design(table)
        fitted = design[:, : len(self.kinds)].any(axis=1)
        design[fitted, : len(self.kinds)] -= self.shares
        return np.clip(self.intercept + design @ self.weights, *BOUNDS)

    def bounds(self, expected: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the ends of the interval around expected accuracies."""
        return _bounds(expected, self.half_width)


def _bounds(expected: np.ndarray, half_width: float) -> tuple[np.ndarray, np.ndarray]:
    return np.clip(expected - half_width, *BOUNDS), np.clip(expected + half_width, *BOUNDS)


def _kinds_of(table: pd.DataFrame) -> list[Kind]:
    return list(zip(table[CATEGORY].astype(str), table["n_genes_seen"].astype(int), strict=True))


def _features_of(table: pd.DataFrame) -> np.ndarray:
    """Return the features (rows, features), NaN where unknown. Effects enter as log1p: they are skewed."""
    effect = table["predicted_effect"].to_numpy(float)
    sd = table["predicted_effect_sd"].to_numpy(float)
    relative = np.divide(sd, effect, out=np.full(len(effect), np.nan), where=effect > 0)
    similarity, coverage = table["nearest_similarity"], table["prior_coverage"]
    return np.column_stack([similarity.to_numpy(float), coverage.to_numpy(float), np.log1p(effect), relative])


def _ridge(design: np.ndarray, centred: np.ndarray) -> tuple[np.ndarray, float, np.ndarray]:
    """Fit centred values, with the penalty of least leave-one-out error, the largest of equally good ones.

    Returns
    -------
    weights, penalty, left_out
        ``left_out`` (rows,) are the leave-one-out errors in closed form, the intercept left out too.
    """
    values, vectors = np.linalg.eigh(design.T @ design)
    rotated = design @ vectors
    target = rotated.T @ centred
    best: tuple[float, np.ndarray, float, np.ndarray] | None = None
    for penalty in sorted(PENALTIES, reverse=True):
        shrunk = np.zeros(len(values)) if math.isinf(penalty) else 1.0 / (np.maximum(values, 0.0) + penalty)
        influence = 1.0 / len(centred) + (rotated**2) @ shrunk
        left_out = (centred - rotated @ (shrunk * target)) / np.maximum(1.0 - influence, 1e-9)
        error = float((left_out**2).mean())
        if best is None or error < best[0] * (1 - 1e-9):
            best = error, vectors @ (shrunk * target), penalty, left_out
    assert best is not None
    return best[1:]


def _quantile(errors: np.ndarray, level: float) -> float:
    """Return the conformal quantile: the ceil((n + 1) · level)-th smallest, infinite where there is none."""
    rank = math.ceil((len(errors) + 1) * level)
    return float(np.sort(errors)[rank - 1]) if 0 < rank <= len(errors) else math.inf


def trust_table(
    properties: pd.DataFrame, effects: pd.DataFrame, scores: pd.DataFrame, settings: EvaluationSettings
) -> pd.DataFrame:
    """Compare expected and observed accuracy of the model under test on held-out perturbations.

    Parameters
    ----------
    properties
        From :func:`~biojepa.evaluation.strata.perturbation_properties`. Only what is known beforehand is
        used: kind, nearest training gene and its similarity, prior coverage.
    effects
        ``perturbation``, ``fold``, ``predicted_effect``, ``predicted_effect_sd`` of the model under test,
        a row for each fold and seed.
    scores
        Scores per perturbation, columns of ``metrics.tsv``.
    settings
        Model under test; ``min_perturbations`` below which nothing is fitted.

    Returns
    -------
    pandas.DataFrame
        Columns ``contracts.TRUST_COLUMNS``, one row per perturbation and kind, folds and seeds averaged;
        no row when the model under test has no score. Expected accuracy is missing below
        ``min_perturbations`` perturbations.
    """
    own = scores[(scores["model"] == settings.model) & (scores["metric"] == METRIC)]
    keys = [PERTURBATION, "fold"]
    observed = own.groupby(keys, observed=True)["value"].mean().rename("observed").reset_index()
    predicted = effects.groupby(keys)[["predicted_effect", "predicted_effect_sd"]].mean().reset_index()
    joined = properties.merge(predicted, on=keys).merge(observed, on=keys)
    joined = joined[joined["observed"].notna()].sort_values(keys, kind="stable")
    numbers = ["nearest_similarity", "prior_coverage", "predicted_effect", "predicted_effect_sd", "observed"]
    grouped = joined.groupby([PERTURBATION, CATEGORY, "n_genes_seen"], sort=True, observed=True)
    table = grouped.agg({"nearest_training_gene": "first", **dict.fromkeys(numbers, "mean")}).reset_index()
    blank = dict.fromkeys(("expected", "low", "high", "guess"), np.nan)
    table = table.assign(**blank)[list(TRUST_COLUMNS)]
    if units_of(table[PERTURBATION])[0] < settings.min_perturbations:
        return table
    return cross_fit(table)


def cross_fit(table: pd.DataFrame) -> pd.DataFrame:
    """Fill in ``expected``, ``low``, ``high`` and ``guess`` of each row from fits to the other perturbations.

    ``guess`` is the mean accuracy of those others: the same for all kinds, and all that could be said
    without any feature. Perturbations are dealt into at most 50 groups; the same perturbation in several
    contexts or kinds is left out together.
    """
    names = sorted(set(map(perturbation_of, table[PERTURBATION])))
    place = {name: index % MAX_GROUPS for index, name in enumerate(names)}
    group = np.array([place[perturbation_of(label)] for label in table[PERTURBATION]])
    filled = table.copy()
    for left_out in range(min(len(names), MAX_GROUPS)):
        inside = group == left_out
        model = TrustModel.fit(table[~inside])
        expected = model.expected(table[inside])
        low, high = model.bounds(expected)
        filled.loc[inside, ["expected", "low", "high"]] = np.column_stack([expected, low, high])
        filled.loc[inside, "guess"] = table.loc[~inside, "observed"].mean()
    return filled


def judge_trust(table: pd.DataFrame, settings: EvaluationSettings) -> dict[str, Any]:
    """Say whether expected accuracy tells good from bad predictions, by a fixed rule.

    It does (``skill``) where the interval of the gain, by how much less the expected accuracy errs than
    the one guess for all, lies above 0. Intervals resample perturbations.

    Returns
    -------
    dict
        ``metric``, ``n``, ``mae`` and ``mae_guess`` (mean absolute errors), ``gain`` with ``gain_ci_low``
        and ``gain_ci_high``, ``correlation`` of the observed accuracy with what the features add to the
        guess (the guess itself falls where the observed is high, since it leaves that one out),
        ``coverage`` of the intervals with its own interval, their ``nominal`` level, ``skill`` and
        ``sentence``. Numbers are NaN where nothing was fitted.
    """
    n, _ = units_of(table[PERTURBATION])
    answer: dict[str, Any] = {"metric": METRIC, "model": settings.model, "n": n}
    names = ("mae", "mae_guess", "gain", "gain_ci_low", "gain_ci_high", "correlation")
    more = ("coverage", "coverage_ci_low", "coverage_ci_high")
    answer |= dict.fromkeys((*names, *more), math.nan) | {"nominal": NOMINAL, "skill": False}
    fitted = table[table["expected"].notna()]
    if len(fitted):
        observed, expected, guess = (
            fitted[name].to_numpy(float) for name in ("observed", "expected", "guess")
        )
        error, plain = np.abs(observed - expected), np.abs(observed - guess)
        held = (observed >= fitted["low"]) & (observed <= fitted["high"])
        columns = np.column_stack([plain - error, held])
        rng = np.random.default_rng([settings.seed, _STREAM])
        counts = draw_counts(pd.Index(fitted[PERTURBATION]), settings.draws, rng)
        drawn = bootstrap_means(columns, counts)
        low, high = interval(drawn, settings.confidence)
        answer |= {
            "mae": float(error.mean()),
            "mae_guess": float(plain.mean()),
            "gain": float((plain - error).mean()),
            "gain_ci_low": float(low[0]),
            "gain_ci_high": float(high[0]),
            "correlation": _correlation(expected - guess, observed),
            "coverage": float(held.mean()),
            "coverage_ci_low": float(low[1]),
            "coverage_ci_high": float(high[1]),
            "skill": bool(low[0] > 0),
        }
    return {**answer, "sentence": trust_sentence(answer, settings)}


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Return Pearson's correlation, NaN where one does not vary."""
    if min(first.std(), second.std()) < 1e-9:
        return math.nan
    return float(np.corrcoef(first, second)[0, 1])


def trust_sentence(judged: Mapping[str, Any], settings: EvaluationSettings) -> str:
    """Put the outcome of :func:`judge_trust` into words."""
    model, n = judged["model"], judged["n"]
    if not n:
        return f"No held-out perturbation of {model} was scored: nothing is known of what to expect."
    if math.isnan(judged["mae"]):
        return (
            f"{n} held-out perturbations are too few to learn what to expect of {model}: at least "
            f"{settings.min_perturbations} are asked for."
        )
    numbers = (
        f"expected accuracy misses the observed one by {judged['mae']:.2f} on average, one guess for all by "
        f"{judged['mae_guess']:.2f} (gain {judged['gain']:+.2f}, {settings.confidence:.0%} CI "
        f"{judged['gain_ci_low']:+.2f} to {judged['gain_ci_high']:+.2f}, n = {n}). Intervals of "
        f"{judged['nominal']:.0%} held {judged['coverage']:.0%} of the held-out scores."
    )
    if judged["skill"]:
        return f"What is known beforehand tells good from bad predictions of {model} here: {numbers}"
    if judged["gain_ci_high"] < 0:
        return (
            f"What is known beforehand misleads about the predictions of {model} here: {numbers} Expect of "
            "a new perturbation the mean of its kind."
        )
    return (
        f"What is known beforehand does not tell good from bad predictions of {model} here: {numbers} Expect "
        "of a new perturbation the mean of its kind."
    )


@dataclass(frozen=True)
class Expectation:
    """What to expect of perturbations that nobody has measured.

    Attributes
    ----------
    source
        ``features`` where the fit tells good from bad predictions, otherwise ``kind``.
    model
        The fit to all held-out perturbations.
    means
        Kind to the mean accuracy of its held-out perturbations.
    half_width
        Of the interval around the mean of a kind.
    """

    source: str
    model: TrustModel
    means: Mapping[Kind, float]
    half_width: float

    @classmethod
    def of(cls, table: pd.DataFrame, settings: EvaluationSettings) -> Expectation | None:
        """Learn from ``trust.tsv``; None where it holds too few perturbations."""
        fitted = table[table["expected"].notna()]
        if fitted.empty:
            return None
        source = FROM_FEATURES if judge_trust(table, settings)["skill"] else FROM_KIND
        kinds = pd.Series(_kinds_of(fitted), index=fitted.index)
        by_kind = fitted["observed"].groupby(kinds)
        mean, n = by_kind.transform("mean"), by_kind.transform("size")
        # Error of the mean of the others of the kind.
        errors = ((fitted["observed"] - mean) * n / (n - 1).where(n > 1)).abs().dropna().to_numpy(float)
        means = {kind: float(mean[kinds == kind].iloc[0]) for kind in sorted(set(kinds))}
        return cls(source, TrustModel.fit(fitted), means, _quantile(errors, NOMINAL))

    def columns(self, table: pd.DataFrame) -> pd.DataFrame:
        """Return ``expected``, ``low`` and ``high`` of perturbations described as in ``trust.tsv``.

        They are missing for a kind of which no perturbation was held out.
        """
        kinds = _kinds_of(table)
        tested = np.array([kind in self.means for kind in kinds], dtype=bool)
        if self.source == FROM_FEATURES:
            expected, width = self.model.expected(table), self.model.half_width
        else:
            expected, width = (
                np.array([self.means.get(kind, np.nan) for kind in kinds], float),
                self.half_width,
            )
        low, high = _bounds(expected, width)
        values = {"expected": expected, "low": low, "high": high}
        return pd.DataFrame(
            {name: np.where(tested, numbers, np.nan) for name, numbers in values.items()}, index=table.index
        )
