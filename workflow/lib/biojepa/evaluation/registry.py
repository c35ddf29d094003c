"""The registry of metrics, and the row-wise correlations they share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

Role = Literal["headline", "combination", "secondary", "distribution", "uncertainty", "legacy"]


def scored_elsewhere(*_: object) -> np.ndarray:
    """Stand for ``score`` where values come from cells, gene sets or a table, not from two arrays of means.

    Raises
    ------
    NotImplementedError
        Always.
    """
    raise NotImplementedError("no function of predicted means; the values are computed elsewhere")


@dataclass(frozen=True)
class Metric:
    """A registered metric.

    Attributes
    ----------
    best
        ``"max"``, ``"min"``, or the number that is best.
    unit
        ``"perturbation"``: ``score(predicted, truth)`` gives (perturbations,), NaN where undefined.
        ``"model"``: ``score(predicted, truth, weights)`` with weights (draws, perturbations) gives
        (draws,), one value per weighting of the perturbations.
    score
        Left out where the values come from elsewhere: such a metric is pooled and shown, never called.
    needs_sd
        ``score`` takes the standard deviation of the predicted mean as a third argument.
    """

    name: str
    role: Role
    best: Literal["max", "min"] | float
    description: str
    formula: str
    unit: Literal["perturbation", "model"]
    score: Callable[..., np.ndarray] = scored_elsewhere
    needs_sd: bool = False

    def goodness(self, value: np.ndarray) -> np.ndarray:
        """Return the value on a scale where higher is better: x, −x, or −abs(x − best)."""
        if self.best == "max":
            return np.asarray(value)
        if self.best == "min":
            return -np.asarray(value)
        return -np.abs(np.asarray(value) - float(self.best))


REGISTERED: dict[str, Metric] = {}


def register(
    name: str,
    role: Role,
    best: Literal["max", "min"] | float,
    description: str,
    formula: str,
    unit: Literal["perturbation", "model"] = "perturbation",
    needs_sd: bool = False,
) -> Callable[[Callable[..., np.ndarray]], Callable[..., np.ndarray]]:
    """Add the decorated function to the registry under ``name``."""

    def add(score: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
        if name in REGISTERED:
            raise ValueError(f"metric {name!r} is registered twice")
        REGISTERED[name] = Metric(name, role, best, description, formula, unit, score, needs_sd)
        return score

    return add


def cosine_rows(first: np.ndarray, second: np.ndarray, zero_norm: float) -> np.ndarray:
    """Return the cosine of matching rows, 0 where either is shorter than ``zero_norm``."""
    norms = row_norms(first), row_norms(second)
    defined = (norms[0] >= zero_norm) & (norms[1] >= zero_norm)
    product = np.einsum("pg,pg->p", first, second)
    return np.divide(product, norms[0] * norms[1], out=np.zeros(len(first)), where=defined)


def pearson_rows(first: np.ndarray, second: np.ndarray, zero_norm: float) -> np.ndarray:
    """Return the Pearson correlation of matching rows, 0 where either row is or varies next to nothing."""
    too_short = (row_norms(first) < zero_norm) | (row_norms(second) < zero_norm)
    first, second = (rows - rows.mean(axis=1, keepdims=True) for rows in (first, second))
    return np.where(too_short, 0.0, cosine_rows(first, second, zero_norm))


def row_norms(rows: np.ndarray) -> np.ndarray:
    """Return the Euclidean norm of each row, (rows,), without a copy of the squares."""
    return np.sqrt(np.einsum("pg,pg->p", rows, rows))
