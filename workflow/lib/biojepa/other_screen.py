"""Predict changes by those of the same genes in other screens: the baseline ``other_screen``."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OtherScreen:
    """What perturbing single genes changed in another screen.

    Attributes
    ----------
    perturbed
        ``(n,)`` genes perturbed on their own there.
    measured
        ``(m,)`` genes measured there.
    changes
        ``(n, m)`` their mean log-expression minus that of control.
    """

    perturbed: Sequence[str]
    measured: Sequence[str]
    changes: np.ndarray


def predict_from_screens(
    screens: Mapping[str, OtherScreen],
    membership: np.ndarray,
    perturbed_genes: Sequence[str],
    genes: Sequence[str],
    train: np.ndarray,
    delta: np.ndarray,
) -> np.ndarray:
    """Predict Δ as s times the sum of the changes that a label's genes made in another screen.

    A gene not perturbed there adds nothing; a label none of whose genes was, and a gene not measured in
    any screen, get the mean of the training labels. The scale s ≥ 0 of a screen is that of least
    squares on the training labels it knows, over the genes measured in both. Several screens are averaged,
    each weighed by the share of the training labels' squared change that it explains so; one that
    explains none is left out.

    Parameters
    ----------
    screens
        Name to screen.
    membership, perturbed_genes
        ``(labels, perturbed genes)`` multi-hot code, and the genes of its columns.
    genes
        ``(outputs,)`` genes measured here.
    train, delta
        ``(n,)`` positions of the training labels and ``(n, outputs)`` their Δ.

    Returns
    -------
    Δ ``(labels, outputs)`` of all labels.
    """
    total, weight = np.zeros((len(membership), len(genes))), np.zeros((len(membership), len(genes)))
    for name, screen in screens.items():
        rows, there_rows = _shared(perturbed_genes, screen.perturbed)
        columns, there_columns = _shared(genes, screen.measured)
        known = membership[:, rows].sum(axis=1) > 0
        changes = membership[:, rows] @ screen.changes[np.ix_(there_rows, there_columns)]
        fitted = known[train]
        expected, found = changes[train][fitted], delta[fitted][:, columns]
        product, own, observed = (expected * found).sum(), (expected**2).sum(), (found**2).sum()
        scale = max(product / own, 0.0) if own > 0 else 0.0
        explained = scale * product / observed if observed > 0 else 0.0
        log.info(
            "other_screen: %s knows %d of %d perturbations (%d of them trained), %d of %d genes; scale %.3g",
            *(name, known.sum(), len(known), fitted.sum(), len(columns), len(genes), scale),
        )
        place = np.ix_(known, columns)
        total[place] += explained * scale * changes[known]
        weight[place] += explained
    mean = np.broadcast_to(delta.mean(axis=0), total.shape)
    return np.divide(total, weight, out=mean.copy(), where=weight > 0)


def _shared(here: Sequence[str], there: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Positions, here and there, of the genes that both list, in the order of ``here``."""
    position = {gene: place for place, gene in enumerate(there)}
    both = [(place, position[gene]) for place, gene in enumerate(here) if gene in position]
    own, other = zip(*both, strict=True) if both else ((), ())
    return np.array(own, dtype=int), np.array(other, dtype=int)
