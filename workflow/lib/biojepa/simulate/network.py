"""A gene network with modules and hubs, and the smoothing of programmes over it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse

# Where the strengths of ties come from: Pareto weights give the few hubs of a protein network.
_PARETO_EXPONENT = 2.5
_SHARE_WITHIN_MODULE = 0.85
_SHARE_HUBS = 0.03


@dataclass(frozen=True)
class GeneNetwork:
    """An undirected network.

    Parameters
    ----------
    module
        Module of each gene, shape ``(genes,)``.
    is_hub
        Whether a gene is among the 3 % with the most neighbours, shape ``(genes,)``.
    edges
        Pairs of gene indices, smaller first, sorted, shape ``(edges, 2)``.
    """

    module: np.ndarray
    is_hub: np.ndarray
    edges: np.ndarray

    @property
    def n_genes(self) -> int:
        """Number of genes."""
        return len(self.module)

    def adjacency(self) -> sparse.csr_matrix:
        """Return the symmetric adjacency matrix, shape ``(genes, genes)``."""
        left, right = self.edges.T
        ones = np.ones(len(left))
        half = sparse.coo_matrix((ones, (left, right)), shape=(self.n_genes, self.n_genes))
        return (half + half.T).tocsr()


def draw_network(n_genes: int, n_modules: int, mean_degree: float, rng: np.random.Generator) -> GeneNetwork:
    """Draw a degree-corrected stochastic block model (Karrer and Newman 2011, Phys Rev E 83:016107).

    Each gene gets a Pareto weight; each edge takes its first end by weight over all genes and its
    second by weight in the same module (85 %) or anywhere. Self-loops and repeats are dropped, so
    that the mean degree is a little below ``mean_degree``.
    """
    module = rng.permutation(np.arange(n_genes) % n_modules)
    weight = np.minimum(1 + rng.pareto(_PARETO_EXPONENT, n_genes), 12.0)
    n_edges = round(n_genes * mean_degree / 2)
    left = rng.choice(n_genes, n_edges, p=weight / weight.sum())
    right = rng.choice(n_genes, n_edges, p=weight / weight.sum())
    within = rng.random(n_edges) < _SHARE_WITHIN_MODULE
    for index in range(n_modules):
        members = np.flatnonzero(module == index)
        ends = np.flatnonzero(within & (module[left] == index))
        right[ends] = rng.choice(members, len(ends), p=weight[members] / weight[members].sum())
    edges = _distinct_edges(left, right)
    degree = np.bincount(edges.ravel(), minlength=n_genes)
    hubs = np.argsort(-degree, kind="stable")[: max(1, round(_SHARE_HUBS * n_genes))]
    return GeneNetwork(module, np.isin(np.arange(n_genes), hubs), edges)


def observe_edges(network: GeneNetwork, noise: float, rng: np.random.Generator) -> np.ndarray:
    """Return the edges that a database would list: a share left out, as many spurious ones added."""
    kept = network.edges[rng.random(len(network.edges)) >= noise]
    n_spurious = round(noise * len(network.edges))
    ends = rng.integers(network.n_genes, size=(2, n_spurious))
    return _distinct_edges(np.concatenate([kept[:, 0], ends[0]]), np.concatenate([kept[:, 1], ends[1]]))


def smooth_over_network(
    network: GeneNetwork, values: np.ndarray, restart: float = 0.3, steps: int = 40
) -> np.ndarray:
    """Return the personalised PageRank average of values over the network.

    Solves ``S = restart * values + (1 - restart) * P @ S`` by iteration, ``P`` being the adjacency
    with rows that sum to 1; the error falls as ``(1 - restart)**steps``. A gene without neighbours
    keeps its value.

    Parameters
    ----------
    values
        Shape ``(genes, dimensions)``.
    """
    adjacency = network.adjacency()
    degree = np.asarray(adjacency.sum(1)).ravel()
    alone = sparse.diags((degree == 0).astype(float))
    step = sparse.diags(1 / np.maximum(degree, 1)) @ adjacency + alone
    smooth = values
    for _ in range(steps):
        smooth = restart * values + (1 - restart) * (step @ smooth)
    return smooth


def _distinct_edges(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    pairs = np.sort(np.stack([left, right], axis=1), axis=1)
    return np.unique(pairs[pairs[:, 0] != pairs[:, 1]], axis=0)
