"""What every scheme gives and asks: a fold, its validation, and enough perturbations in each set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from biojepa.errors import InputError
from biojepa.labels import is_combination

MIN_PERTURBATIONS = 6
MIN_TRAINING = 2


@dataclass(frozen=True)
class HeldOut:
    """One fold of a scheme.

    Attributes
    ----------
    table
        Columns of ``contracts.SPLIT_COLUMNS``, sorted by label.
    facts
        What defines the fold beside its labels, for ``split.json``.
    """

    table: pd.DataFrame
    facts: dict[str, Any] = field(default_factory=dict)


def draw_validation(
    free: Sequence[str], wanted: int, rng: np.random.Generator, left: int = MIN_TRAINING
) -> set[str]:
    """Draw about ``wanted`` perturbations of ``free``, singles and combinations in proportion.

    Parameters
    ----------
    free
        Perturbations to draw from.
    wanted
        How many; at least one is drawn where ``left`` allows it.
    rng
        What to draw with.
    left
        How many of ``free`` to leave for training, at least.

    Returns
    -------
    The perturbations drawn; none where ``free`` holds no more than ``left``.
    """
    n_validation = max(0, min(max(1, wanted), len(free) - left))
    singles = rng.permutation([name for name in free if not is_combination(name)])
    combinations = rng.permutation([name for name in free if is_combination(name)])
    n_combinations = round(n_validation * len(combinations) / max(1, len(free)))
    return {str(name) for name in combinations[:n_combinations]} | {
        str(name) for name in singles[: n_validation - n_combinations]
    }


def require_sets(where: str | Path, n_training: int, n_validation: int, n_test: int, fix: str) -> None:
    """Raise an InputError when a set of a fold would be too small to train, select or test anything."""
    if n_training < MIN_TRAINING or n_validation < 1 or n_test < 1:
        raise InputError(
            where,
            f"{n_training} training, {n_validation} validation and {n_test} test perturbation(s)",
            f"at least {MIN_TRAINING}, 1 and 1",
            fix,
        )
