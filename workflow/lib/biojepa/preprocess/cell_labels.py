"""Labels of many cells at once, in the spelling of this pipeline."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from biojepa.contracts import GENE_SEPARATOR
from biojepa.labels import CONTROL_SYNONYMS, normalize_label


def normalize_labels(
    raw: Iterable[object],
    separator: str = GENE_SEPARATOR,
    controls: Sequence[str] = (),
    pattern: str = "",
) -> np.ndarray:
    """Return the labels of many cells, shape ``(cells,)``, dtype object; see `normalize_label`.

    Every distinct label is looked at once, so a million cells cost as much as their labels.
    """
    codes, distinct = pd.factorize(np.asarray(list(raw), dtype=object), use_na_sentinel=True)
    labels = np.array(
        [normalize_label(label, separator, controls, pattern) for label in distinct] + [None], dtype=object
    )
    return labels[codes]


def other_controls(raw: Iterable[object], controls: Sequence[str]) -> dict[str, int]:
    """Count the cells whose label is a control synonym that ``controls`` does not name."""
    if not controls:
        return {}
    counts = pd.Series(list(raw), dtype=object).dropna().astype(str).str.strip().value_counts()
    return {
        str(label): int(n)
        for label, n in counts.items()
        if str(label) not in controls and str(label).casefold() in CONTROL_SYNONYMS
    }
