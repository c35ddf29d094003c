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


def draw_validation(rest: Sequence[str], wanted: int, rng: np.random.Generator) -> set[str]:
    """Draw about ``wanted`` perturbations of ``rest``, singles and combinations in proportion.

    At least one, and so many that two are left for training.
    """
    n_validation = min(max(1, wanted), len(rest) - MIN_TRAINING)
    singles = rng.permutation([name for name in rest if not is_combination(name)])
    combinations = rng.permutation([name for name in rest if is_combination(name)])
    n_combinations = round(n_validation * len(combinations) / len(rest))
    return {str(name) for name in combinations[:n_combinations]} | {
        str(name) for name in singles[: n_validation - n_combinations]
    }


def require_sets(where: str | Path, n_training: int, n_validation: int, n_test: int, fix: str) -> None:
    """Raise an InputError when a set of a fold would be too small to train, select or test anything."""
    if n_training < MIN_TRAINING or n_validation < 1 or n_test < 1:
        raise InputError(
            where,
            f"{max(n_training, 0)} training, {max(n_validation, 0)} validation and {n_test} test "
            "perturbation(s)",
            f"at least {MIN_TRAINING}, 1 and 1",
            fix,
        )
