"""Tell cells that carry a guide from cells that caught some of its ambient RNA, one guide at a time.

The counts of a guide, over the cells that have any, are a mixture of two components, as in Replogle et
al. (2020, Nature Biotechnology 38:954) and in crispat (Braunger and Velten 2024, Bioinformatics
40:btae535): few UMIs of background, and a wide Gaussian of log2 counts in the cells that carry the
guide. Two things differ from theirs, so that both components are probabilities of the same thing, a
count of 1 or more:

- The background is a zero-truncated negative binomial of the counts, and not a Poisson distribution of
  their logarithms. A cell's share of the ambient RNA varies, and a Poisson has too thin a tail for
  that. This variation belongs to the cells, so its dispersion is one number for all guides, chosen
  from ``DISPERSIONS`` by likelihood; 0 is the Poisson distribution.
- The count of a carried guide is a rounded log-normal: a count k has the probability that the Gaussian
  gives to log2(k − ½) … log2(k + ½), and cells that carry the guide without a UMI of it are allowed for.

A negative binomial was not taken for the carried guides: the spread of their counts is that of a
log-normal, for which it would need its mode at zero, on top of the background.

Without cell covariates, the histogram of a guide holds all that its likelihood depends on. So the
fits see distinct counts and not cells: their time and memory hardly depend on the number of cells.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.special import expit, gammaln, log_ndtr, ndtr
from scipy.stats import nbinom, norm, poisson

from biojepa.errors import InputError

# Dispersions of the background that are tried: variance = mean + dispersion · mean².
DISPERSIONS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
# At most so many guides choose among them, evenly spaced.
GUIDES_FOR_DISPERSION = 200
# A carried guide has 2 UMIs or more in the middle, and a spread of half a doubling or more: a Gaussian
# inside the interval of one or two counts would describe those counts and no cells.
LOWEST_LOG2_MEAN, LOWEST_LOG2_SD = 1.0, 0.5
# log2 of the count below which no UMI is left after rounding.
LOG2_OF_NONE = -1.0
# From this count on, the Gaussian is taken to be even over the interval of a count.
EVEN_FROM = 32
# Counts from which a cell carries the guide at the start of a fit; the most likely end is kept.
STARTS = (3, 10, 30)
# Cycles of iterations by which starts are compared, by which dispersions are, and at most.
CYCLES_OF_A_START, CYCLES_OF_A_DISPERSION, MOST_CYCLES = 5, 25, 500
# A fit has converged when a cycle adds less than this to its log-likelihood.
TOLERANCE = 1e-6
# Fewer cells that carry a guide do not say what the counts of such cells look like.
MIN_CELLS = 10
# Entries of a matrix that are looked at together.
BLOCK = 1 << 22
SMALLEST_MEAN, SMALLEST_WEIGHT = 1e-6, 1e-9
# Below, the difference of two probabilities has lost its digits.
SMALLEST_MASS = 1e-250
LOG_ROOT_TWO_PI = 0.5 * float(np.log(2 * np.pi))

# Where a guide has no carried cells to learn from, its background alone may reach the threshold in at
# most this share of the cells that have any of it.
BACKGROUND_TAIL = 1e-3

FITTED = ""
NO_CELLS, FEW_CELLS, NOT_CONVERGED = "no_cells", "few_positive_cells", "not_converged"
NO_BACKGROUND, NO_SEPARATION = "no_background", "no_separation"


@dataclass(frozen=True)
class CountHistograms:
    """How many cells have how many UMIs of each guide; zeros are left out.

    Parameters
    ----------
    start
        Entries of guide g are ``start[g]:start[g + 1]``, shape ``(guides + 1,)``.
    value
        Distinct counts of 1 or more, ascending within a guide, shape ``(entries,)``.
    cells
        Number of cells with that count, shape ``(entries,)``.
    """

    start: np.ndarray
    value: np.ndarray
    cells: np.ndarray

    @property
    def n_guides(self) -> int:
        """Number of guides, those without a count included."""
        return len(self.start) - 1

    @property
    def sizes(self) -> np.ndarray:
        """Number of distinct counts of each guide ``(guides,)``."""
        return np.diff(self.start)

    def take(self, guides: np.ndarray) -> CountHistograms:
        """Return the histograms of some guides, in the order given."""
        sizes = self.sizes[guides]
        start = np.concatenate([[0], np.cumsum(sizes)])
        entries = np.repeat(self.start[guides] - start[:-1], sizes) + np.arange(start[-1])
        return CountHistograms(start, self.value[entries], self.cells[entries])

    @property
    def guide(self) -> np.ndarray:
        """Guide of each entry ``(entries,)``."""
        return np.repeat(np.arange(self.n_guides), self.sizes)

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Sum values of entries ``(entries,)`` over each guide ``(guides,)``."""
        return np.bincount(self.guide, weights=values, minlength=self.n_guides)


def count_histograms(counts: sparse.csr_matrix) -> CountHistograms:
    """Count the cells with each number of UMIs of each guide.

    Parameters
    ----------
    counts
        Guide UMI counts ``(cells, guides)``, whole numbers.

    Raises
    ------
    InputError
        When a count is negative or not a whole number.
    """
    n_guides = counts.shape[1]
    blocks = [slice(first, first + BLOCK) for first in range(0, counts.nnz, BLOCK)]
    for block in blocks:
        _require_whole_numbers(counts.data[block])
    largest = int(counts.data.max()) if counts.nnz else 0
    keys, numbers = [], []
    for block in blocks:
        value = counts.data[block]
        seen = value > 0
        key = counts.indices[block][seen].astype(np.int64) * (largest + 1)
        found, number = np.unique(key + value[seen].astype(np.int64), return_counts=True)
        keys.append(found)
        numbers.append(number)
    if not keys:
        return CountHistograms(np.zeros(n_guides + 1, dtype=np.int64), np.zeros(0), np.zeros(0))
    key, group = np.unique(np.concatenate(keys), return_inverse=True)
    cells = np.bincount(group, weights=np.concatenate(numbers), minlength=len(key))
    start = np.searchsorted(key, np.arange(n_guides + 1) * (largest + 1))
    return CountHistograms(start, (key % (largest + 1)).astype(np.float64), cells)


def _require_whole_numbers(values: np.ndarray) -> None:
    # Written so that NaN fails as well.
    wrong = np.flatnonzero(~((values >= 0) & (values == np.rint(values))))
    if len(wrong):
        raise InputError(
            "guide counts",
            f"{values[wrong[0]]} ({len(wrong)} such values)",
            "UMI counts, whole numbers of 0 or more",
            "give raw counts of the guides; the mixture cannot be fitted to normalized ones",
        )


@dataclass(frozen=True)
class Mixture:
    """Parameters of the mixture of each guide, all of shape ``(guides,)`` but for ``dispersion``.

    Parameters
    ----------
    weight
        Share of the cells with a count that carry the guide.
    log2_mean, log2_sd
        Mean and standard deviation of log2 UMIs in cells that carry it.
    background
        Mean UMIs of background over all cells, those without a count included.
    dispersion
        Of the background: variance = mean + dispersion · mean².
    log_likelihood
        Sum over the cells with a count, natural logarithm.
    converged
        Whether the last iteration changed next to nothing.
    """

    weight: np.ndarray
    log2_mean: np.ndarray
    log2_sd: np.ndarray
    background: np.ndarray
    dispersion: float
    log_likelihood: np.ndarray
    converged: np.ndarray


def log_probability_of_zero(mean: np.ndarray, dispersion: float) -> np.ndarray:
    """Return the log probability that the background leaves no UMI, any shape."""
    return -mean if dispersion == 0 else -np.log1p(mean * dispersion) / dispersion


def log_background(value: np.ndarray, mean: np.ndarray, dispersion: float) -> np.ndarray:
    """Return the log probability of counts of 1 or more under the background, any shape."""
    log_zero = log_probability_of_zero(mean, dispersion)
    seen = log_zero - np.log(-np.expm1(log_zero))
    if dispersion == 0:
        return value * np.log(mean) - gammaln(value + 1) + seen
    size = 1 / dispersion
    shape = gammaln(value + size) - gammaln(size) - gammaln(value + 1)
    return shape + value * np.log(mean / (size + mean)) + seen


def log_signal(value: np.ndarray, log2_mean: np.ndarray, log2_sd: np.ndarray) -> np.ndarray:
    """Return the log probability of counts of 1 or more in cells that carry the guide, any shape."""
    low, high = np.log2(value - 0.5), np.log2(value + 0.5)
    score = (np.log2(value) - log2_mean) / log2_sd
    even = np.log(high - low) - np.log(log2_sd) - 0.5 * score**2 - LOG_ROOT_TWO_PI
    mass = normal_interval((low - log2_mean) / log2_sd, (high - log2_mean) / log2_sd)
    exact = (value < EVEN_FROM) & (mass > SMALLEST_MASS)
    log_mass = np.where(exact, np.log(np.maximum(mass, SMALLEST_MASS)), even)
    return log_mass - log_ndtr((log2_mean - LOG2_OF_NONE) / log2_sd)


def normal_interval(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Return the probability of ``low`` to ``high`` under the standard normal distribution, any shape."""
    # In the lower tail, where the difference of two small numbers keeps its digits.
    flipped = low > 0
    return ndtr(np.where(flipped, -low, high)) - ndtr(np.where(flipped, -high, low))


def normal_density(score: np.ndarray) -> np.ndarray:
    """Return the density of the standard normal distribution, any shape."""
    return np.exp(-0.5 * score * score - LOG_ROOT_TWO_PI)


def background_mean(mean_of_positive: np.ndarray, dispersion: float) -> np.ndarray:
    """Return the mean of a negative binomial whose counts of 1 or more have the given mean.

    This is the maximum of the zero-truncated likelihood, since the mean of the counts is its sufficient
    statistic. Newton's method; the mean of the positive counts is a convex function of the mean for
    dispersions below 1 and a concave one above, so from the tangent at zero it never overshoots.
    """
    slope = (1 + dispersion) / 2
    mean = np.maximum((mean_of_positive - 1) / slope, SMALLEST_MEAN)
    for _ in range(20):
        log_zero = log_probability_of_zero(mean, dispersion)
        seen = -np.expm1(log_zero)
        slope = (seen - mean * np.exp(log_zero) / (1 + mean * dispersion)) / seen**2
        mean = np.maximum(mean - (mean / seen - mean_of_positive) / slope, SMALLEST_MEAN)
    return mean


class _Likelihood:
    """The two steps of an EM iteration for the guides of a set of histograms, each with an entry or more.

    Parameters
    ----------
    histograms
        Counts of the guides.
    dispersion
        Of the background.
    """

    def __init__(self, histograms: CountHistograms, dispersion: float) -> None:
        value = histograms.value
        self.histograms, self.dispersion = histograms, dispersion
        self.value, self.cells, self.log2 = value, histograms.cells, np.log2(value)
        self.guide = histograms.guide
        self.n_cells = self.sum(self.cells)
        # The part of the background's log probability that depends on nothing but the count: what it is
        # at a mean of 1, less the other parts at that mean.
        one = np.ones(())
        self._background = log_background(value, one, dispersion) - self._level(one)
        self._background -= value * self._slope(one)
        low, high = np.log2(value - 0.5), np.log2(value + 0.5)
        self._width = np.log(high - low) - LOG_ROOT_TWO_PI
        self._small = np.flatnonzero(value < EVEN_FROM)
        self._low, self._high = low[self._small], high[self._small]

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Sum values of entries ``(entries,)`` over each guide ``(guides,)``."""
        return np.bincount(self.guide, weights=values, minlength=self.histograms.n_guides)

    def _slope(self, mean: np.ndarray) -> np.ndarray:
        """Return what one UMI more adds to the log probability of the background."""
        return np.log(mean) - np.log1p(mean * self.dispersion)

    def _level(self, mean: np.ndarray) -> np.ndarray:
        log_zero = log_probability_of_zero(mean, self.dispersion)
        return log_zero - np.log(-np.expm1(log_zero))

    def expect(self, parameters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return posteriors ``(entries,)`` and the log-likelihood of each guide ``(guides,)``.

        ``parameters`` are weight, log2 mean, log2 sd and background mean, shape ``(4, guides)``.
        """
        weight, log2_mean, log2_sd, mean = parameters
        level = np.log1p(-weight) + self._level(mean)
        background = self._background + self.value * self._slope(mean)[self.guide] + level[self.guide]
        score = (self.log2 - log2_mean[self.guide]) / log2_sd[self.guide]
        signal = self._width - 0.5 * score * score - np.log(log2_sd)[self.guide]
        mass = normal_interval(*self._edges(log2_mean, log2_sd))
        exact = mass > SMALLEST_MASS
        signal[self._small[exact]] = np.log(mass[exact])
        seen = log_ndtr((log2_mean - LOG2_OF_NONE) / log2_sd)
        signal += (np.log(weight) - seen)[self.guide]
        # log(e^s + e^b) and the posterior from one exponential.
        gap = signal - background
        small = np.exp(-np.abs(gap))
        log_sum = np.maximum(signal, background) + np.log1p(small)
        posterior = np.where(gap >= 0, 1.0, small) / (1 + small)
        return posterior, self.sum(self.cells * log_sum)

    def _edges(self, log2_mean: np.ndarray, log2_sd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the standardized ends of the intervals of small counts."""
        guide = self.guide[self._small]
        return (self._low - log2_mean[guide]) / log2_sd[guide], (self._high - log2_mean[guide]) / log2_sd[
            guide
        ]

    def maximize(self, posterior: np.ndarray, parameters: np.ndarray | None = None) -> np.ndarray:
        """Return the parameters ``(4, guides)`` that are most likely under a posterior ``(entries,)``.

        ``parameters`` are those of the posterior. They say where in the interval of a count its cells
        are, and how many cells carry the guide without a UMI; without them, counts are taken as exact.
        """
        carried = self.cells * posterior
        n_carried = np.maximum(self.sum(carried), 1e-9)
        n_others = np.maximum(self.n_cells - n_carried, 1e-9)
        if parameters is None:
            n_all, middle = n_carried, self.sum(carried * self.log2) / n_carried
            off = self.log2 - middle[self.guide]
            moment, square = np.zeros_like(middle), self.sum(carried * off * off) / n_carried
        else:
            _, middle, sd, _ = parameters
            off = self.log2 - middle[self.guide]
            squared = off * off
            off[self._small], squared[self._small] = self._moments_of_small(middle, sd)
            # Cells without a UMI: the Gaussian below LOG2_OF_NONE.
            edge = (LOG2_OF_NONE - middle) / sd
            hidden = n_carried * np.exp(log_ndtr(edge) - log_ndtr(-edge))
            hazard = np.exp(-0.5 * edge * edge - LOG_ROOT_TWO_PI - log_ndtr(edge))
            n_all = n_carried + hidden
            moment = (self.sum(carried * off) - hidden * sd * hazard) / n_all
            square = (self.sum(carried * squared) + hidden * sd**2 * (1 - edge * hazard)) / n_all
        log2_mean = np.maximum(middle + moment, LOWEST_LOG2_MEAN)
        step = log2_mean - middle
        variance = np.maximum(square - 2 * step * moment + step**2, LOWEST_LOG2_SD**2)
        positive = self.sum((self.cells - carried) * self.value) / n_others
        mean = background_mean(np.maximum(positive, 1 + SMALLEST_MEAN), self.dispersion)
        weight = np.clip(n_carried / self.n_cells, SMALLEST_WEIGHT, 1 - SMALLEST_WEIGHT)
        return np.stack([weight, log2_mean, np.sqrt(variance), mean])

    def _moments_of_small(self, log2_mean: np.ndarray, log2_sd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the mean distance from ``log2_mean``, and its square, within intervals of small counts."""
        low, high = self._edges(log2_mean, log2_sd)
        sd = log2_sd[self.guide[self._small]]
        mass = normal_interval(low, high)
        exact = mass > SMALLEST_MASS
        mass = np.where(exact, mass, 1.0)
        at_low, at_high = normal_density(low), normal_density(high)
        middle = self.log2[self._small] - log2_mean[self.guide[self._small]]
        first = np.where(exact, sd * (at_low - at_high) / mass, middle)
        second = np.where(exact, sd**2 * (1 + (low * at_low - high * at_high) / mass), middle**2)
        return first, second


def _iterate(
    histograms: CountHistograms, parameters: np.ndarray, dispersion: float, most_cycles: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Run EM from ``parameters`` ``(4, guides)``; return them, log-likelihoods, convergence.

    A cycle is two EM iterations and a longer step along them (SQUAREM, Varadhan and Roland 2008,
    Scandinavian Journal of Statistics 35:335), which is taken where it is more likely: where components
    overlap, EM alone needs thousands of iterations.
    """
    n_guides = histograms.n_guides
    parameters, found = parameters.copy(), np.full(n_guides, -np.inf)
    converged = np.zeros(n_guides, dtype=bool)
    open_guides, cycle = np.arange(n_guides), 0
    while len(open_guides) and cycle < most_cycles:
        # Guides that are done are left out of what follows, every few cycles.
        likelihood = _Likelihood(histograms.take(open_guides), dispersion)
        now, last = parameters[:, open_guides], found[open_guides]
        for _ in range(min(8, most_cycles - cycle)):
            cycle += 1
            posterior, reached = likelihood.expect(now)
            done = reached - last < TOLERANCE
            last = reached
            if done.all():
                break
            first = likelihood.maximize(posterior, now)
            second = likelihood.maximize(likelihood.expect(first)[0], first)
            longer = _extrapolate(now, first, second)
            better = likelihood.expect(longer)[1] > likelihood.expect(second)[1]
            now = np.where(done, now, np.where(better, longer, second))
        parameters[:, open_guides], found[open_guides], converged[open_guides] = now, last, done
        open_guides = open_guides[~done]
    return parameters, found, converged


def _extrapolate(start: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return parameters ``(4, guides)`` farther along the way of two EM iterations, within their bounds."""

    def to_line(values: np.ndarray) -> np.ndarray:
        weight, log2_mean, log2_sd, mean = values
        return np.stack([np.log(weight) - np.log1p(-weight), log2_mean, np.log(log2_sd), np.log(mean)])

    at_start, at_first, at_second = map(to_line, (start, first, second))
    way = at_first - at_start
    turn = at_second - at_first - way
    norms = np.sqrt((way**2).sum(axis=0)), np.sqrt((turn**2).sum(axis=0))
    length = np.divide(norms[0], norms[1], out=np.ones_like(norms[0]), where=norms[1] > 0)
    length = np.clip(length, 1, 100)
    logit, log2_mean, log_sd, log_mean = at_start + 2 * length * way + length**2 * turn
    return np.stack(
        [
            np.clip(expit(logit), SMALLEST_WEIGHT, 1 - SMALLEST_WEIGHT),
            np.clip(log2_mean, LOWEST_LOG2_MEAN, 30),
            np.exp(np.clip(log_sd, np.log(LOWEST_LOG2_SD), 3)),
            np.exp(np.clip(log_mean, np.log(SMALLEST_MEAN), 20)),
        ]
    )


def fit_mixture(histograms: CountHistograms, dispersion: float, most_cycles: int | None = None) -> Mixture:
    """Fit the mixture of each guide by expectation maximization, from several starts.

    Parameters
    ----------
    histograms
        Counts of the guides.
    dispersion
        Of the background.
    most_cycles
        Cycles of iterations at most; ``MOST_CYCLES`` where None.

    Returns
    -------
    Mixture
        NaN and a log-likelihood of −∞ for a guide without a start, which has no cell with fewer than
        ``max(STARTS)`` UMIs, or none with ``min(STARTS)`` or more.
    """
    n_guides = histograms.n_guides
    best = np.full((4, n_guides), np.nan)
    found = np.full(n_guides, -np.inf)
    for start in STARTS:
        above = histograms.sum(histograms.cells * (histograms.value >= start))
        guides = np.flatnonzero((above > 0) & (above < histograms.sum(histograms.cells)))
        if not len(guides):
            continue
        part = histograms.take(guides)
        first = _Likelihood(part, dispersion).maximize((part.value >= start).astype(np.float64))
        parameters, reached, _ = _iterate(part, first, dispersion, CYCLES_OF_A_START)
        better = reached > found[guides]
        best[:, guides[better]], found[guides[better]] = parameters[:, better], reached[better]
    converged = np.zeros(n_guides, dtype=bool)
    guides = np.flatnonzero(np.isfinite(found))
    if len(guides):
        best[:, guides], found[guides], converged[guides] = _iterate(
            histograms.take(guides), best[:, guides], dispersion, most_cycles or MOST_CYCLES
        )
    weight, log2_mean, log2_sd, background = best
    return Mixture(weight, log2_mean, log2_sd, background, dispersion, found, converged)


def choose_dispersion(histograms: CountHistograms) -> float:
    """Return the dispersion of ``DISPERSIONS`` under which the guides together are most likely."""
    counted = np.flatnonzero(histograms.sizes > 1)
    if not len(counted):
        return 0.0
    every = -(-len(counted) // GUIDES_FOR_DISPERSION)
    part = histograms.take(counted[::every])
    fits = [
        fit_mixture(part, dispersion, CYCLES_OF_A_DISPERSION).log_likelihood for dispersion in DISPERSIONS
    ]
    return DISPERSIONS[int(np.argmax([fit[np.isfinite(fit)].sum() for fit in fits]))]


@dataclass(frozen=True)
class GuideFits:
    """Fit and threshold of each guide, all of shape ``(guides,)`` but for ``mixture``.

    Parameters
    ----------
    mixture
        The fits, NaN where there is none.
    threshold
        Fewest UMIs from which a cell carries the guide.
    fallback
        Why the threshold is not that of the fit, empty where it is: ``no_cells``,
        ``few_positive_cells`` (fewer than ``MIN_CELLS`` carry the guide), ``no_background`` (one
        Gaussian describes the counts as well), ``no_separation`` (background alone does, or half of
        the cells that carry the guide lie below the threshold) or ``not_converged``.
    positive_cells
        Expected number of cells that carry the guide, among those with a count.
    expected_false
        Expected share of background among the cells at or above the threshold.
    expected_missed
        Expected share below the threshold among the cells that carry the guide, those without a count
        included.
    """

    mixture: Mixture
    threshold: np.ndarray
    fallback: np.ndarray
    positive_cells: np.ndarray
    expected_false: np.ndarray
    expected_missed: np.ndarray

    def table(self) -> pd.DataFrame:
        """Return one row per guide: parameters, convergence, expected errors and fall-back reason."""
        fit = self.mixture
        n_guides = len(self.threshold)
        fitted = np.isfinite(fit.log_likelihood)
        converged = pd.Series(fit.converged, dtype="boolean").where(pd.Series(fitted))
        return pd.DataFrame(
            {
                "signal_weight": fit.weight,
                "signal_log2_mean": fit.log2_mean,
                "signal_log2_sd": fit.log2_sd,
                "background_mean": fit.background,
                "background_dispersion": np.where(fitted, fit.dispersion, np.nan),
                "positive_cells": self.positive_cells,
                "expected_false": self.expected_false,
                "expected_missed": self.expected_missed,
                "converged": converged,
                "fallback": self.fallback,
            },
            index=range(n_guides),
        )

    @classmethod
    def empty_table(cls, n_guides: int) -> pd.DataFrame:
        """Return the same columns for a rule that fits nothing."""
        nan = np.full(n_guides, np.nan)
        nothing = Mixture(nan, nan, nan, nan, np.nan, nan, np.zeros(n_guides, dtype=bool))
        return cls(nothing, nan, np.full(n_guides, FITTED, dtype=object), nan, nan, nan).table()


def fit_guides(histograms: CountHistograms, min_posterior: float, min_umis: int) -> GuideFits:
    """Find the threshold of each guide.

    It is the smallest count from which on, up to the middle of the cells that carry the guide, the
    posterior is ``min_posterior`` or more. A guide without a usable fit gets the median threshold of
    the others or, where no guide has one, ``min_umis``; and more where its background reaches that.
    Where no background is seen, ``min_umis`` is enough.

    Parameters
    ----------
    histograms
        Counts of the guides.
    min_posterior
        Smallest probability to carry the guide.
    min_umis
        Lowest threshold.
    """
    fit = fit_mixture(histograms, choose_dispersion(histograms))
    counted = histograms.sum(histograms.cells)
    fitted = np.isfinite(fit.log_likelihood)
    positive = np.where(fitted, fit.weight * counted, np.nan)
    own = np.array(
        [_threshold(fit, guide, min_posterior) if fitted[guide] else np.nan for guide in range(len(fitted))]
    )
    only_background, only_signal, mean_alone = _single_components(histograms, fit.dispersion)
    # Bayesian information criterion: 4 parameters against 1 and 2.
    with np.errstate(divide="ignore"):
        penalty = 0.5 * np.log(counted)
    with np.errstate(invalid="ignore"):
        below_background = fitted & (fit.log_likelihood - 3 * penalty <= only_background)
        below_signal = fitted & (fit.log_likelihood - 2 * penalty <= only_signal)
        hidden = fitted & (own > np.exp2(fit.log2_mean))
    high = histograms.sum(histograms.cells * (histograms.value >= min(STARTS)))

    fallback = np.full(len(fitted), FITTED, dtype=object)
    # From the weakest reason to the strongest.
    fallback[fitted & ~fit.converged] = NOT_CONVERGED
    fallback[hidden | below_background] = NO_SEPARATION
    fallback[below_signal & (only_signal > only_background)] = NO_BACKGROUND
    fallback[fitted & (positive < MIN_CELLS)] = FEW_CELLS
    fallback[~fitted] = np.where(high[~fitted] >= MIN_CELLS, NO_BACKGROUND, FEW_CELLS)
    fallback[counted == 0] = NO_CELLS

    usable = fallback == FITTED
    common = float(np.ceil(np.median(own[usable]))) if usable.any() else float(min_umis)
    threshold = np.where(usable, own, common)
    threshold[fallback == NO_BACKGROUND] = min_umis
    for reason, mean in (
        (FEW_CELLS, np.where(fitted, fit.background, mean_alone)),
        (NO_SEPARATION, mean_alone),
    ):
        guides = np.flatnonzero(fallback == reason)
        tail = _background_quantile(mean[guides], fit.dispersion)
        threshold[guides] = np.maximum(threshold[guides], tail)
    threshold = np.maximum(threshold, min_umis)
    expected_false, expected_missed = _expected_errors(histograms, fit, threshold)
    return GuideFits(fit, threshold, fallback, positive, expected_false, expected_missed)


def _threshold(fit: Mixture, guide: int, min_posterior: float) -> float:
    """Return the smallest count from which on the posterior is high enough, up to the Gaussian's middle.

    One more than the middle where it is too low there.
    """
    value = np.arange(1.0, np.ceil(np.exp2(fit.log2_mean[guide])) + 1)
    log_odds = np.log(fit.weight[guide]) - np.log1p(-fit.weight[guide])
    log_odds = log_odds + log_signal(value, fit.log2_mean[guide], fit.log2_sd[guide])
    log_odds -= log_background(value, fit.background[guide], fit.dispersion)
    low = np.flatnonzero(log_odds < np.log(min_posterior) - np.log1p(-min_posterior))
    return float(value[low[-1]] + 1) if len(low) else 1.0


def _single_components(
    histograms: CountHistograms, dispersion: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the log-likelihoods of background alone and of signal alone, and the background's mean."""
    counted = np.maximum(histograms.sum(histograms.cells), 1)
    guide, value, cells = histograms.guide, histograms.value, histograms.cells
    positive = np.maximum(histograms.sum(cells * value) / counted, 1 + SMALLEST_MEAN)
    mean = background_mean(positive, dispersion)
    background = histograms.sum(cells * log_background(value, mean[guide], dispersion))
    log2 = np.log2(value)
    log2_mean = np.maximum(histograms.sum(cells * log2) / counted, LOWEST_LOG2_MEAN)
    log2_sd = np.sqrt(histograms.sum(cells * (log2 - log2_mean[guide]) ** 2) / counted)
    log2_sd = np.maximum(log2_sd, LOWEST_LOG2_SD)
    signal = histograms.sum(cells * log_signal(value, log2_mean[guide], log2_sd[guide]))
    return background, signal, mean


def _background_quantile(mean: np.ndarray, dispersion: float) -> np.ndarray:
    """Return the smallest count that background reaches in ``BACKGROUND_TAIL`` of its cells or fewer."""
    seen = -np.expm1(log_probability_of_zero(mean, dispersion))
    upper = BACKGROUND_TAIL * seen
    if dispersion == 0:
        return poisson.isf(upper, mean) + 1
    size = 1 / dispersion
    return nbinom.isf(upper, size, size / (size + mean)) + 1


def _expected_errors(
    histograms: CountHistograms, fit: Mixture, threshold: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the expected shares of background above, and of carried guides below, each threshold."""
    false = np.full(len(threshold), np.nan)
    guides = np.flatnonzero(np.isfinite(fit.log_likelihood))
    if len(guides):
        part = histograms.take(guides)
        parameters = np.stack([fit.weight, fit.log2_mean, fit.log2_sd, fit.background])[:, guides]
        posterior, _ = _Likelihood(part, fit.dispersion).expect(parameters)
        above = part.cells * (part.value >= threshold[guides][part.guide])
        n_above = part.sum(above)
        wrong = part.sum(above * (1 - posterior))
        false[guides] = np.divide(wrong, n_above, out=np.full(len(guides), np.nan), where=n_above > 0)
    return false, norm.cdf((np.log2(threshold - 0.5) - fit.log2_mean) / fit.log2_sd)
