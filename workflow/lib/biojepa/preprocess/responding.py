"""Which cells respond to their perturbation: a posterior in the manner of mixscape.

Papalexi et al. (2021, Nat Genet 53:322) place the cells of a perturbation on a line from control to
perturbation, fit two normal distributions of which one is that of the controls, and call cells that more
likely belong to the controls non-perturbed. Here:

- The line is that of Fisher's linear discriminant in principal components: the mean difference, weighed by
  the covariance of the controls. Components in which the difference is no larger than its error count less
  (positive-part shrinkage).
- No cell is placed on a line that it helped to draw: lines are drawn from four fifths of the sampled cells
  and controls for the last fifth, and from all of them for cells that were not sampled. Otherwise cells of a
  perturbation without any effect lie away from the controls.
- The mixture is fitted to the sampled cells, and all cells of the perturbation are judged by it.
- The second normal distribution lies above that of the controls. Where it is narrower or wider than that one,
  a cell farther out is not called less responding again.
- Where the perturbation has no clear effect, or changes fewer than five genes, so that one or two of them
  would hold up the share, the mixture is no better than the controls alone, or its two
  parts overlap too much to tell a cell by, there is no posterior.

Whatever is found here describes, and flags cells. The labels of the cells are looked at, so that it may be
applied to training cells only.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.special import expit

from biojepa.preprocess.batch_effects import BatchCentred
from biojepa.raw.matrix import RowBlocks

FOLDS = 5
# Controls that set the covariance, and what is normal, at most.
CONTROL_CELLS = 2_000
# Fewer cells of a perturbation, or controls, draw no line.
MIN_CELLS = 20
# Changed genes (``n_deg``) of a perturbation at least. A share that one or two genes hold up is theirs, and
# not that of a response.
MIN_CHANGED_GENES = 5
# Distance of the responding cells from the controls, in standard deviations of the controls. Two equal normal
# distributions that are nearer to each other have one peak, and one shifted group can look like two.
MIN_SEPARATION = 2.0
# A narrower component would be a clump of cells, a wider one their outliers.
NARROWEST, WIDEST = 0.5, 3.0
EM_STEPS, EM_TOLERANCE = 200, 1e-3
NON_RESPONDING = 0.5


@dataclass(frozen=True)
class Mixture:
    """Cells on a line where controls have mean 0 and standard deviation 1.

    Parameters
    ----------
    share
        Of cells that respond, within 0 and 1.
    mean, sd
        Of the responding cells.
    gain
        Log-likelihood of the mixture less that of the controls alone, per fit.
    """

    share: float
    mean: float
    sd: float
    gain: float

    def is_clear(self, n: int) -> bool:
        """Tell whether the mixture of ``n`` cells beats the controls alone, and its parts lie apart.

        By the Bayesian information criterion, for three numbers fitted.
        """
        return 2 * self.gain > 3 * np.log(n) and self.mean >= MIN_SEPARATION

    def posterior(self, place: np.ndarray) -> np.ndarray:
        """Return the probability to respond at places on the line ``(cells,)``; it never falls outwards."""
        # The log ratio of the two densities is a parabola; beyond its vertex it would turn back.
        curve = 1 - self.sd**-2
        if abs(curve) > 1e-9:
            vertex = -self.mean / (self.sd**2 - 1)
            place = np.maximum(place, vertex) if curve > 0 else np.minimum(place, vertex)
        return expit(log_ratio(place, self.mean, self.sd, self.share))


def fit_mixture(place: np.ndarray) -> Mixture:
    """Fit the share, mean and standard deviation of responding cells by expectation and maximization.

    Parameters
    ----------
    place
        ``(cells,)`` where controls are standard normal. The responding cells are looked for above 0.
    """
    best: Mixture | None = None
    for quantile in (0.5, 0.9):
        mean, sd, share = max(float(np.quantile(place, quantile)), 0.5), 1.0, 0.5
        for _ in range(EM_STEPS):
            before = np.array([mean, sd, share])
            weight = expit(log_ratio(place, *before))
            total = max(float(weight.sum()), 1e-12)
            # A share of exactly 0 or 1 has no logarithm.
            share = min(max(total / len(place), 1e-6), 1 - 1e-6)
            mean = max(float(weight @ place) / total, 0.0)
            sd = float(np.sqrt(weight @ (place - mean) ** 2 / total))
            sd = min(max(sd, NARROWEST), WIDEST)
            if np.abs(before - (mean, sd, share)).max() < EM_TOLERANCE:
                break
        ratio = log_ratio(place, mean, sd, share)
        found = Mixture(share, mean, sd, float((np.logaddexp(0, ratio) + np.log1p(-share)).sum()))
        best = found if best is None or found.gain > best.gain else best
    assert best is not None
    return best


def log_ratio(place: np.ndarray, mean: float, sd: float, share: float) -> np.ndarray:
    """Return the logarithm of the odds to respond ``(cells,)``, where controls are standard normal."""
    return 0.5 * (place**2 - ((place - mean) / sd) ** 2) + np.log(share / (sd * (1 - share)))


class Controls:
    """Controls in principal components, and what makes their distribution round, for each fold left out.

    Parameters
    ----------
    points
        ``(cells, d)``.
    rng
        Deals them into folds.
    """

    def __init__(self, points: np.ndarray, rng: np.random.Generator) -> None:
        from sklearn.covariance import ledoit_wolf

        self.points = points
        self.fold = deal(len(points), rng)
        self.frames: list[tuple[np.ndarray, np.ndarray, int]] = []
        for fold in range(FOLDS + 1):
            part = points[self.fold != fold]
            values, vectors = np.linalg.eigh(ledoit_wolf(part)[0])
            # Symmetric, so that what concerns one component stays in it as far as can be.
            whiten = (vectors / np.sqrt(np.maximum(values, 1e-12 * values[-1]))) @ vectors.T
            self.frames.append((part.mean(axis=0), whiten, len(part)))

    def line(self, points: np.ndarray, fold: int) -> tuple[np.ndarray, float] | None:
        """Return the line from the controls to some cells: direction ``(d,)`` and place of the mean control.

        The controls of ``fold`` have no part in it; their scatter along it is about 1. None where no
        component differs by more than its error.
        """
        mean, whiten, n = self.frames[fold]
        difference = whiten @ (points.mean(axis=0) - mean)
        noise = 1 / len(points) + 1 / n
        shrunk = difference * np.maximum(0, 1 - noise / np.maximum(difference**2, 1e-300))
        length = float(np.linalg.norm(shrunk))
        if length == 0:
            return None
        direction = whiten @ shrunk / length
        return direction, float(mean @ direction)


def deal(n: int, rng: np.random.Generator) -> np.ndarray:
    """Return folds ``(n,)`` of equal size, at random."""
    return rng.permutation(np.arange(n) % FOLDS)


@dataclass
class Line:
    """The line of a perturbation, and its cells on it as far as they were sampled.

    Parameters
    ----------
    sampled
        ``(sampled cells,)``, each on a line drawn without it.
    direction, start
        Line drawn from all of them: ``(d,)``, and the place of the mean control.
    middle, sd
        Of controls on lines drawn without them.
    """

    sampled: np.ndarray
    direction: np.ndarray
    start: float
    middle: float
    sd: float


def draw_line(points: np.ndarray, controls: Controls, rng: np.random.Generator) -> Line | None:
    """Place sampled cells of a perturbation ``(cells, d)``; None where there is nothing to draw a line by."""
    fold_of = deal(len(points), rng)
    sampled, reference = np.empty(len(points)), np.empty(len(controls.points))
    for fold in range(FOLDS):
        line = controls.line(points[fold_of != fold], fold)
        if line is None:
            return None
        direction, start = line
        sampled[fold_of == fold] = points[fold_of == fold] @ direction - start
        here = controls.fold == fold
        reference[here] = controls.points[here] @ direction - start
    whole = controls.line(points, FOLDS)
    if whole is None:
        return None
    middle, sd = float(reference.mean()), float(reference.std(ddof=1))
    return Line((sampled - middle) / sd, *whole, middle, sd)


class Responding:
    """Find the cells that respond to their perturbation.

    Parameters
    ----------
    rows_of
        Perturbation to its cells; those with a clear effect on ``MIN_CHANGED_GENES`` genes or more.
    sample
        Perturbation to those of its cells whose scores are known, sorted.
    control
        Control cells whose scores are known, sorted.
    scores
        In principal components, less the mean of the batch.
    n_cells
        All cells of the screen.
    seed
        Of the folds.
    """

    def __init__(
        self,
        rows_of: Mapping[str, np.ndarray],
        sample: Mapping[str, np.ndarray],
        control: np.ndarray,
        scores: BatchCentred,
        n_cells: int,
        seed: int,
    ) -> None:
        self._rows_of = dict(rows_of)
        self._scores = scores
        self._place = np.full(n_cells, np.nan)
        self._lines: dict[str, Line] = {}
        self._mixtures: dict[str, Mixture] = {}
        if len(control) < MIN_CELLS:
            return
        controls = Controls(scores.of(control), np.random.default_rng([seed, 3]))
        for label in self._rows_of:
            rng = np.random.default_rng([seed, zlib.crc32(label.encode()), 3])
            if len(sample[label]) >= MIN_CELLS:
                line = draw_line(scores.of(sample[label]), controls, rng)
                mixture = None if line is None else fit_mixture(line.sampled)
                if line is not None and mixture is not None and mixture.is_clear(len(line.sampled)):
                    self._lines[label], self._mixtures[label] = line, mixture
                    self._place[sample[label]] = line.sampled

    def place_others(self, expression: RowBlocks) -> None:
        """Place the cells that were not sampled, by one more pass over the blocks that hold some.

        Parameters
        ----------
        expression
            All cells.
        """
        owner = np.full(len(self._place), -1, dtype=np.int32)
        for number, label in enumerate(self._lines):
            rows = self._rows_of[label]
            owner[rows[np.isnan(self._place[rows])]] = number
        if not (owner >= 0).any():
            return
        lines = list(self._lines.values())
        directions = np.stack([line.direction for line in lines])
        weights, column, shift = self._scores.weights_of(directions)
        shift = shift + np.array([line.start + line.middle for line in lines])
        sd = np.array([line.sd for line in lines])
        for first, block in expression.blocks(owner >= 0):
            wanted = np.flatnonzero(owner[first : first + block.shape[0]] >= 0)
            if len(wanted):
                code = owner[first + wanted]
                product = row_products(block[wanted], weights, column, code)
                of_batch = (self._scores.shift_of(first + wanted) * directions[code]).sum(axis=1)
                self._place[first + wanted] = (product - shift[code] - of_batch) / sd[code]

    def posteriors(self) -> tuple[np.ndarray, dict[str, float]]:
        """Return the probability to respond ``(cells,)``, missing where none can be told, and shares.

        The share of a perturbation is the mean over its cells.
        """
        posterior = np.full(len(self._place), np.nan)
        shares = {}
        for label in self._lines:
            rows = self._rows_of[label]
            posterior[rows] = self._mixtures[label].posterior(self._place[rows])
            shares[label] = float(posterior[rows].mean())
        return posterior, shares


def row_products(
    rows: sparse.csr_matrix, weights: np.ndarray, column: np.ndarray, code: np.ndarray
) -> np.ndarray:
    """Return the product of each row with one of several vectors ``(n,)``.

    Parameters
    ----------
    rows
        ``(n, genes)``.
    weights
        ``(vectors, genes used + 1)``, the last column 0.
    column
        ``(genes,)`` column of each gene in them.
    code
        ``(n,)`` vector of each row.
    """
    data = rows.data * weights[np.repeat(code, np.diff(rows.indptr)), column[rows.indices]]
    products = sparse.csr_matrix((data, rows.indices, rows.indptr), shape=rows.shape)
    # The product with ones adds up in the order of the entries, whatever else is in the block.
    return products @ np.ones(rows.shape[1])
