"""Labels of many cells at once, in the spelling of this pipeline."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from biojepa.contracts import CONTROL, GENE_SEPARATOR
from biojepa.errors import InputError
from biojepa.labels import CONTROL_SYNONYMS, genes_of, is_control_name, normalize_label

# Labels that a message or a row of qc.tsv names.
MOST_SHOWN = 20
# What joins the genes of a combination in published files. A hyphen is left out: it is part of gene names.
JOINS = "_+,|;&/"


def normalize_labels(
    raw: Iterable[object],
    separator: str = GENE_SEPARATOR,
    controls: Sequence[str] = (),
    pattern: str = "",
) -> np.ndarray:
    """Return the labels of many cells, shape ``(cells,)``, dtype object; see `normalize_label`.

    Every distinct label is looked at once, so a million cells cost as much as their labels.

    Raises
    ------
    InputError
        When labels cannot be read; lists all of them with the number of their cells.
    """
    codes, distinct = pd.factorize(np.asarray(list(raw), dtype=object), use_na_sentinel=True)
    labels = np.full(len(distinct) + 1, None, dtype=object)
    errors: dict[int, InputError] = {}
    for place, label in enumerate(distinct):
        try:
            labels[place] = normalize_label(label, separator, controls, pattern)
        except InputError as error:
            errors[place] = error
    if errors:
        first = next(iter(errors.values()))
        cells = {str(distinct[place]): int((codes == place).sum()) for place in errors}
        raise InputError(
            "perturbation labels",
            f"{len(errors)} that cannot be read: {listed(cells)}. Of the first: {first.found}",
            first.expected,
            first.fix,
        )
    return labels[codes]


def unread_labels(raw: Iterable[object], labels: np.ndarray, others: Iterable[str] = ()) -> dict[str, int]:
    """Count the cells of each label that says nothing of the perturbation, most frequent first.

    Parameters
    ----------
    raw
        Labels as the file spells them.
    labels
        What :func:`normalize_labels` made of them, ``(cells,)``.
    others
        Labels that are accounted for elsewhere.
    """
    unknown = pd.Series(list(raw), dtype=object)[pd.isna(labels)]
    counts = unknown.map(lambda label: "no label" if pd.isna(label) else repr(str(label))).value_counts()
    others = {repr(label) for label in others}
    return {str(label): int(n) for label, n in counts.items() if label not in others}


def unsplit_labels(labels: np.ndarray) -> tuple[str, dict[str, int]]:
    """Find labels that look like combinations which the separator did not split.

    These are single labels whose parts, cut at another usual separator, are all perturbed alone in the
    screen, or are controls.

    Parameters
    ----------
    labels
        Normalized, ``(cells,)``; None where unknown.

    Returns
    -------
    The separator that splits most of them, and the number of cells of each; empty where there are none.
    """
    counts = Counter(label for label in labels if label is not None and label != CONTROL)
    alone = {label for label in counts if len(genes_of(label)) == 1}
    found: dict[str, dict[str, int]] = {}
    for join in JOINS:
        for label in sorted(alone):
            parts = [part.strip() for part in label.split(join)]
            if len(parts) > 1 and all(part in alone or is_control_name(part) for part in parts):
                found.setdefault(join, {})[label] = counts[label]
    if not found:
        return "", {}
    best = max(found, key=lambda join: len(found[join]))
    return best, dict(sorted(found[best].items(), key=lambda item: (-item[1], item[0])))


def listed(cells: dict[str, int]) -> str:
    """Return labels with the number of their cells, the most frequent ``MOST_SHOWN`` of them."""
    ordered = sorted(cells.items(), key=lambda item: (-item[1], item[0]))
    shown = ", ".join(f"{label} ({n} cells)" for label, n in ordered[:MOST_SHOWN])
    return f"{shown}, … ({len(cells)} in all)" if len(cells) > MOST_SHOWN else shown


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
