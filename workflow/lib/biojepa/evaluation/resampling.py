"""Bootstrap samples of perturbations, and means over them.

The unit is the perturbation. The same draws serve every model and metric, so that differences and
ratios of models are paired.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from biojepa.contracts import ALL_CATEGORIES, CATEGORIES, CATEGORY, PERTURBATION

MIN_WHOLE_MODEL = 5
SEEN, UNSEEN = "seen genes", "unseen genes"
SCOPES = {
    ALL_CATEGORIES: CATEGORIES,
    **{category: (category,) for category in CATEGORIES},
    SEEN: ("combo_seen2", "combo_seen1", "combo_seen0", "single_in_combo"),
    UNSEEN: ("single",),
}


@dataclass(frozen=True)
class Scope:
    """A group of test perturbations and its bootstrap draws.

    Attributes
    ----------
    name, categories
        ``all``, a category, or a group of categories, and what it holds.
    perturbations
        Unique perturbations, sorted, (n,).
    counts
        (draws, n): how often each perturbation occurs in each bootstrap sample.
    """

    name: str
    categories: tuple[str, ...]
    perturbations: pd.Index
    counts: np.ndarray


def make_scopes(tested: pd.DataFrame, draws: int, seed: int) -> dict[str, Scope]:
    """Draw bootstrap samples within every non-empty group of categories.

    Parameters
    ----------
    tested
        Columns ``perturbation`` and ``category``: the test perturbations of all folds.
    draws, seed
        Number of samples; a group's draws depend on the seed and the group alone.
    """
    scopes = {}
    for position, (name, categories) in enumerate(SCOPES.items()):
        members = pd.Index(sorted(set(tested.loc[tested[CATEGORY].isin(categories), PERTURBATION])))
        if len(members):
            rng = np.random.default_rng([seed, position])
            counts = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), size=draws)
            scopes[name] = Scope(name, tuple(categories), members, counts.astype(float))
    return scopes


@dataclass
class WholeModelScores:
    """Scores of metrics that need all perturbations at once, with their bootstrap draws.

    ``values[model, metric, scope]`` lists one array (1 + draws,) per fold and seed: the value itself,
    then the value of every bootstrap sample of the scope.
    """

    scopes: dict[str, Scope]
    values: dict[tuple[str, str, str], list[np.ndarray]] = field(default_factory=dict)

    def weights(self, perturbations: Sequence[str], categories: np.ndarray) -> dict[str, np.ndarray]:
        """Return the weightings (1 + draws, perturbations) of a fold's rows for each scope it serves.

        A scope with fewer than 5 of the fold's perturbations has no slope worth the name.
        """
        weightings = {}
        for name, scope in self.scopes.items():
            inside = np.isin(categories.astype(str), scope.categories)
            if inside.sum() < MIN_WHOLE_MODEL:
                continue
            rows = scope.perturbations.get_indexer(pd.Index(perturbations))
            drawn = np.where(inside, scope.counts[:, np.maximum(rows, 0)], 0.0)
            weightings[name] = np.vstack([inside.astype(float), drawn])
        return weightings

    def add(self, model: str, metric: str, scope: str, values: np.ndarray) -> None:
        """Keep the scores of one fold and seed."""
        self.values.setdefault((model, metric, scope), []).append(values)

    def pooled(self, model: str, metric: str, scope: Scope) -> np.ndarray:
        """Return the mean over folds and seeds, (1 + draws,); NaN where nothing was scored."""
        found = self.values.get((model, metric, scope.name))
        if not found:
            return np.full(1 + len(scope.counts), np.nan)
        return nan_mean(np.vstack(found))


def nan_mean(rows: np.ndarray) -> np.ndarray:
    """Return the column means over what is defined, NaN where nothing is."""
    defined = np.isfinite(rows)
    total = np.where(defined, rows, 0.0).sum(axis=0)
    count = defined.sum(axis=0)
    return np.divide(total, count, out=np.full(rows.shape[1], np.nan), where=count > 0)


def bootstrap_means(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the mean of every column in every bootstrap sample, over what is defined.

    Parameters
    ----------
    values
        (n, columns), NaN where undefined.
    counts
        (draws, n).

    Returns
    -------
    numpy.ndarray
        (draws, columns), NaN for a sample in which nothing is defined.
    """
    defined = np.isfinite(values)
    total = counts @ np.where(defined, values, 0.0)
    number = counts @ defined.astype(float)
    return np.divide(total, number, out=np.full(total.shape, np.nan), where=number > 0)


def interval(draws: np.ndarray, confidence: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the percentile interval of every column, NaN where a column has no defined draw."""
    tails = [50 * (1 - confidence), 50 * (1 + confidence)]
    bounds = np.full((2, draws.shape[1]), np.nan)
    usable = np.isfinite(draws).any(axis=0)
    if usable.any():
        bounds[:, usable] = np.nanpercentile(draws[:, usable], tails, axis=0)
    return bounds[0], bounds[1]
