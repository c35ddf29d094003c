"""Turn side information on genes into codes, so that a gene nobody perturbed still has one.

A *source* is one table of gene codes ``(genes, dim)``: the diffusion embedding of a network, or the
membership in gene sets. Codes see no expression and no response, so computing them for held-out
genes leaks nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse

from biojepa.errors import InputError
from biojepa.gene_sets import read_gene_sets

EDGE_COLUMNS = (("gene_a", "gene_b"), ("tf", "target"), ("source", "target"))
WEIGHT_COLUMNS = ("weight", "score")


@dataclass(frozen=True)
class GeneCodes:
    """Codes of genes from one source.

    Attributes
    ----------
    name
        Of the source, such as ``string``.
    genes
        Gene symbols, sorted.
    values
        ``(genes, dim)``, float32, rows of unit length, so that products are cosines.
    """

    name: str
    genes: tuple[str, ...]
    values: np.ndarray

    def covered(self, genes: Sequence[str]) -> list[str]:
        """Return those of ``genes`` that have a code."""
        known = set(self.genes)
        return [gene for gene in genes if gene in known]


def read_network(path: str | Path) -> pd.DataFrame:
    """Read an undirected edge table.

    Returns
    -------
    Columns ``gene_a``, ``gene_b``, ``weight`` (1 where the file gives none).

    Raises
    ------
    InputError
        When the file has no pair of columns that could be an edge, a weight that is no number, or no
        edge.
    """
    # Only an empty field is missing: NA is a gene alias. Tabs unless the name says otherwise.
    separator = "," if ".csv" in Path(path).suffixes else "\t"
    table = pd.read_csv(path, sep=separator, keep_default_na=False)
    for first, second in EDGE_COLUMNS:
        if first in table and second in table:
            break
    else:
        raise InputError(
            path,
            f"columns {list(table.columns)}",
            "a pair of columns among " + ", ".join("/".join(pair) for pair in EDGE_COLUMNS),
            "name the two gene columns gene_a and gene_b",
        )
    weight = next((table[name] for name in WEIGHT_COLUMNS if name in table), None)
    edges = pd.DataFrame(
        {
            "gene_a": table[first].astype(str),
            "gene_b": table[second].astype(str),
            "weight": 1.0 if weight is None else _numbers(weight, path),
        }
    )
    edges = edges[(edges.gene_a != edges.gene_b) & (edges.gene_a != "") & (edges.gene_b != "")]
    if edges.empty:
        raise InputError(
            path, "no edge between two different genes", "at least one", "check the two gene columns"
        )
    return edges


def _numbers(weight: pd.Series, path: str | Path) -> np.ndarray:
    """Take the size of the weights ``(edges,)``; a missing one would spread through the whole network."""
    values = pd.to_numeric(weight, errors="coerce").abs().to_numpy(float)
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise InputError(
            f"{path} line {bad[0] + 2}, column {weight.name}",
            repr(weight.iloc[bad[0]]),
            "a number",
            "give every edge a weight, or drop the column to weigh all edges alike",
        )
    return values


def _fix_signs(vectors: np.ndarray) -> np.ndarray:
    """Make the largest entry of every column positive: eigenvectors have no sign of their own."""
    largest = np.abs(vectors).argmax(axis=0)
    return vectors * np.sign(vectors[largest, np.arange(vectors.shape[1])])


def _unit_rows(values: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(values, axis=1, keepdims=True)
    return (values / np.maximum(norms, 1e-12)).astype(np.float32)


def network_codes(
    name: str, edges: pd.DataFrame, genes: Sequence[str], dim: int = 64, restart: float = 0.2
) -> GeneCodes:
    """Embed genes so that products of their codes compare where random walks from them arrive.

    The profile of a gene is the stationary distribution π of a random walk with restart on the
    network (Köhler et al. 2008). Two genes are compared by the Bhattacharyya affinity Σ √(π₁ π₂), whose
    feature map √π has unit length; the codes are its leading principal directions. Unlike the
    network's own eigenvectors, they spend no dimension on small components without a wanted gene.

    Parameters
    ----------
    edges
        Columns ``gene_a``, ``gene_b``, ``weight``.
    genes
        Genes to embed; those outside the network get no code.
    dim
        Dimensions at most.
    restart
        Probability to return to the start; small values reach far.
    """
    nodes, ends = np.unique(edges[["gene_a", "gene_b"]].to_numpy(str).ravel(), return_inverse=True)
    ends = ends.reshape(-1, 2)
    n = len(nodes)
    # Files give an edge once, once per direction or once per line of evidence: its largest weight counts.
    listed = pd.DataFrame(
        {"a": ends.min(axis=1), "b": ends.max(axis=1), "weight": edges.weight.to_numpy(float)}
    )
    once = listed.groupby(["a", "b"], as_index=False).max()
    half = sparse.coo_array((once.weight, (once.a, once.b)), shape=(n, n)).tocsr()
    adjacency = half + half.T
    degree = np.asarray(adjacency.sum(axis=1)).ravel()
    walk = (adjacency @ sparse.diags_array(1 / np.maximum(degree, 1e-12))).tocsr()
    wanted = np.intersect1d(np.array(sorted(set(genes)), dtype=str), nodes)
    if not len(wanted):
        return GeneCodes(name, (), np.zeros((0, 1), dtype=np.float32))
    start = np.zeros((n, len(wanted)))
    start[np.searchsorted(nodes, wanted), np.arange(len(wanted))] = 1
    profile = start
    for _ in range(int(np.ceil(np.log(1e-4) / np.log(1 - restart)))):  # until the remainder is below 1e-4
        profile = restart * start + (1 - restart) * (walk @ profile)
    root = np.sqrt(profile.T)
    return GeneCodes(name, tuple(wanted), _unit_rows(_leading_directions(root, dim)))


def gene_set_codes(
    name: str, sets: Mapping[str, Sequence[str]], genes: Sequence[str], dim: int = 64
) -> GeneCodes:
    """Embed genes by their membership in gene sets, weighted by rarity: 1 + log(genes / set size).

    Parameters are those of :func:`network_codes`; genes in no set get no code.
    """
    universe = {gene for members in sets.values() for gene in members}
    wanted = sorted(set(genes) & universe)
    if not wanted:
        return GeneCodes(name, (), np.zeros((0, 1), dtype=np.float32))
    position = {gene: index for index, gene in enumerate(wanted)}
    membership = np.zeros((len(wanted), len(sets)))
    for column, members in enumerate(sets.values()):
        rows = [position[gene] for gene in members if gene in position]
        membership[rows, column] = 1 + np.log(len(universe) / len(members))
    return GeneCodes(name, tuple(wanted), _unit_rows(_leading_directions(_unit_rows(membership), dim)))


def _leading_directions(features: np.ndarray, dim: int) -> np.ndarray:
    """Rotate rows onto their leading right singular vectors, at most ``dim``; products are kept."""
    left, singular, _ = np.linalg.svd(features, full_matrices=False)
    kept = min(dim, int((singular > 1e-6 * singular[0]).sum()))
    return _fix_signs(left[:, :kept]) * singular[:kept]


def read_priors(
    networks: Sequence[str | Path],
    gene_sets: Sequence[str | Path],
    genes: Sequence[str],
    dim: int = 64,
    restart: float = 0.2,
) -> list[GeneCodes]:
    """Read every source named in the config for ``genes``; a source is called after its file.

    Raises
    ------
    InputError
        When a file cannot be used, or two files would share a name.
    """
    names: set[str] = set()
    for path in (*networks, *gene_sets):
        if (name := _source_name(path)) in names:
            raise InputError(
                path,
                f"a second source called {name!r}",
                "files whose names differ before the first dot",
                "rename the file",
            )
        names.add(name)
    sources = [
        network_codes(_source_name(path), read_network(path), genes, dim, restart) for path in networks
    ]
    sources += [gene_set_codes(_source_name(path), read_gene_sets(path), genes, dim) for path in gene_sets]
    return sources


def _source_name(path: str | Path) -> str:
    return Path(path).name.split(".")[0]


def coverage(sources: Sequence[GeneCodes], genes: Sequence[str]) -> pd.DataFrame:
    """Count which perturbed genes each source covers.

    Returns
    -------
    Columns ``source``, ``n_genes``, ``n_covered``, ``share``, ``uncovered`` (joined by ``;``).
    """
    rows = []
    for source in sources:
        known = set(source.covered(genes))
        missing = [gene for gene in genes if gene not in known]
        rows.append((source.name, len(genes), len(known), len(known) / max(len(genes), 1), ";".join(missing)))
    return pd.DataFrame(rows, columns=["source", "n_genes", "n_covered", "share", "uncovered"])


def require_coverage(sources: Sequence[GeneCodes], genes: Sequence[str], where: Sequence[str | Path]) -> None:
    """Stop when a source knows none of the perturbed genes: most often another species or identifier.

    Raises
    ------
    InputError
        Naming the file and examples of both sides.
    """
    for source, path in zip(sources, where, strict=True):
        if not source.covered(genes):
            raise InputError(
                path,
                f"genes such as {', '.join(source.genes[:3])}, none of the {len(genes)} perturbed genes",
                f"symbols such as {', '.join(list(genes)[:3])}",
                "use a file with the same gene symbols and species, or take it out of the dataset's row",
            )
