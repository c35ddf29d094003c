"""What prior knowledge says of a perturbation before anybody measures it: its nearest training genes.

Nothing here looks at a response: codes come from side information, and training genes from the split.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import h5py
import numpy as np

from biojepa.labels import genes_of

GENES_COMPARED_AT_A_TIME = 1024


class CodedGenes(Protocol):
    """What is asked of prior codes: :class:`PriorCodes` and :class:`~biojepa.pairs.Pairs` have it."""

    @property
    def perturbed_genes(self) -> tuple[str, ...]:
        """Genes that have a row of codes."""

    @property
    def codes(self) -> Mapping[str, np.ndarray]:
        """Source to (perturbed genes, dim), zero rows where the source does not cover the gene."""


@dataclass(frozen=True)
class PriorCodes:
    """Prior codes of a fold without its cells; see :class:`CodedGenes`."""

    perturbed_genes: tuple[str, ...]
    codes: Mapping[str, np.ndarray]


def read_prior_codes(path: str | Path) -> PriorCodes:
    """Read the codes of ``pairs.h5`` and the genes that they belong to, and no cell."""
    with h5py.File(path, "r") as file:
        genes = tuple(file["names/perturbed_genes"].asstr()[:])
        codes = {key: values[:] for key, values in file["codes"].items()} if "codes" in file else {}
    return PriorCodes(genes, codes)


def nearest_training_genes(
    known: CodedGenes, wanted: set[str], trained: set[str]
) -> dict[str, tuple[str, float]]:
    """Find the training gene whose prior codes are most like those of each gene.

    Similarity is the product of codes, averaged over the sources that cover both genes: their cosine,
    times the captured share for a gene outside the screen. A gene that training perturbed is its own
    nearest, with similarity 1.

    Returns
    -------
    Gene to its nearest and the similarity. A gene without a common source with any is left out.
    """
    position = {gene: row for row, gene in enumerate(known.perturbed_genes)}
    nearest = {gene: (gene, 1.0) for gene in wanted & trained}
    others = sorted(gene for gene in wanted - trained if gene in position)
    candidates = sorted(gene for gene in trained if gene in position)
    if not others or not candidates or not known.codes:
        return nearest
    columns = [position[gene] for gene in candidates]
    for block in blocks(len(others), GENES_COMPARED_AT_A_TIME):
        rows = [position[gene] for gene in others[block]]
        total, count = np.zeros((2, len(rows), len(columns)))
        for values in known.codes.values():
            total += values[rows] @ values[columns].T
            count += np.outer(values[rows].any(axis=1), values[columns].any(axis=1))
        mean = np.divide(total, count, out=np.full(total.shape, -np.inf), where=count > 0)
        for gene, similarity in zip(others[block], mean, strict=True):
            best = int(similarity.argmax())
            if np.isfinite(similarity[best]):
                nearest[gene] = (candidates[best], float(similarity[best]))
    return nearest


def blocks(n: int, size: int) -> Iterator[slice]:
    """Yield slices of at most ``size`` that cover ``n`` rows."""
    return (slice(first, min(first + size, n)) for first in range(0, n, size))


def nearest_columns(label: str, nearest: Mapping[str, tuple[str, float]]) -> dict[str, Any]:
    """Nearest training gene of each gene of a label; similarity is that of its least known gene."""
    found = [nearest.get(gene, ("", math.nan)) for gene in genes_of(label)]
    similarity = min((value for _, value in found), default=math.nan)
    if any(math.isnan(value) for _, value in found):
        similarity = math.nan
    return {
        "nearest_training_gene": ";".join(name for name, _ in found),
        "nearest_similarity": similarity,
        "nearest_distance": 1 - similarity,
    }


def covered_genes(known: CodedGenes) -> dict[str, set[str]]:
    """Name the genes that each source has a code for."""
    return {
        name: {known.perturbed_genes[row] for row in np.flatnonzero(values.any(axis=1))}
        for name, values in known.codes.items()
    }


def covering_sources(label: str, covered: Mapping[str, set[str]]) -> list[str]:
    """Name the sources that cover every gene of a label."""
    return [name for name, genes in covered.items() if set(genes_of(label)) <= genes]


def coverage_share(label: str, covered: Mapping[str, set[str]]) -> float:
    """Share of the sources that cover every gene of a label; 0 without any source."""
    return len(covering_sources(label, covered)) / len(covered) if covered else 0.0
