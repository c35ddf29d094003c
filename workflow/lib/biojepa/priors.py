"""Turn side information on genes into codes, so that a gene nobody perturbed still has one.

A *source* is one table of gene codes ``(genes, dim)``: the diffusion embedding of a network, the
membership in gene sets, a table of gene features that the user gives. None of them sees expression or
a response of the screen, so computing codes of held-out genes leaks nothing. Two more sources come
from cells and have modules of their own: :mod:`biojepa.responses`, the responses in another screen,
and :mod:`biojepa.coexpression`, of training cells.

The directions that codes are expressed in are those of the genes that the screen perturbs. Other
genes are projected on them, a block at a time, so that the codes of the screen's genes do not depend
on what else is asked for, and no matrix is larger than (screen's genes, features). The code of a
projected gene keeps the length of its projection: the share of what the source knows of it that the
screen's genes can speak for.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse

from biojepa.errors import InputError
from biojepa.gene_naming import naming_mismatch
from biojepa.gene_sets import read_gene_sets
from biojepa.prior_names import GENE_SETS, GENE_TABLE, NETWORK, require_file_names, source_name

EDGE_COLUMNS = (("gene_a", "gene_b"), ("tf", "target"), ("source", "target"))
WEIGHT_COLUMNS = ("weight", "score")
# Genes that are projected at a time. Random walks are fastest in blocks that fit the processor's cache.
PROJECTED_AT_A_TIME = 64
# Share of a projected gene's features, by length, that must lie in the screen's directions for it to have a
# code. The share bounds its cosine with every gene of the screen. Below 0.1, 99 % of what the source knows of
# the gene, by squared length, is about nothing that the screen perturbed.
SMALLEST_SHARE = 0.1


@dataclass(frozen=True)
class GeneCodes:
    """Codes of genes from one source.

    Attributes
    ----------
    name
        Of the source, such as ``string``.
    genes
        Gene symbols: those that the directions were found on, sorted, then the projected ones, sorted.
    values
        ``(genes, dim)``, float32. Rows of the genes that the directions were found on have unit length,
        so that products are cosines. That of a projected gene is as long as its captured share, the part
        of its features (of length 1) that lies in the directions, so that its product with another gene
        is no larger than their cosine in the source.
    """

    name: str
    genes: tuple[str, ...]
    values: np.ndarray


@dataclass(frozen=True)
class PriorSource:
    """What one source knows of genes, before it is reduced to codes.

    Attributes
    ----------
    name
        Of the source.
    known
        Genes that it says something about.
    features
        Function from some of them to their features ``(genes, features)``, float.
    where, remedy
        File that it comes from, and how to do without it, for messages.
    centred
        Whether directions are those of the differences between genes (principal components), because
        what the features share says nothing; else products of features are kept as they are.
    standardized
        Whether every feature is divided by its standard deviation first, because units may differ.
    quick_features
        ``features`` to single precision, for genes that are projected; None where that gains nothing.
    kind
        What it was made from, one of :data:`~biojepa.prior_names.KINDS`.
    """

    name: str
    known: frozenset[str]
    features: Callable[[Sequence[str]], np.ndarray]
    where: str | Path
    centred: bool = False
    standardized: bool = False
    remedy: str = "take it out of the dataset's row"
    quick_features: Callable[[Sequence[str]], np.ndarray] | None = None
    kind: str = ""

    def codes(self, genes: Sequence[str], dim: int = 64, others: Sequence[str] = ()) -> GeneCodes:
        """Reduce the features to codes of at most ``dim`` dimensions.

        Parameters
        ----------
        genes
            Genes that the screen perturbs: centre, scale and directions are found on them.
        others
            Genes to be projected on the same directions; they change no code of ``genes``. Their codes
            keep the length of the projection, and one of captured share below ``SMALLEST_SHARE``, such as
            of a gene in another component of a network, gets no code: the source cannot relate it to the
            genes of the screen.
        """
        wanted = sorted(set(genes) & self.known)
        if not wanted:
            return GeneCodes(self.name, (), np.zeros((0, 1), dtype=np.float32))
        features = self.features(wanted)
        centre, scale = np.zeros(features.shape[1]), np.ones(features.shape[1])
        if self.centred:
            centre = features.mean(axis=0)
            features = features - centre
        if self.standardized:
            spread = features.std(axis=0)
            scale = np.where(spread > 1e-12 * np.abs(features).max(initial=1e-300), spread, np.inf)
            features = features / scale
        left, singular, right = np.linalg.svd(features, full_matrices=False)
        kept = max(1, min(dim, int((singular > 1e-6 * singular[0]).sum())))
        signs = _signs(left[:, :kept])
        blocks = [_unit_rows(left[:, :kept] * signs * singular[:kept])]
        names, candidates = list(wanted), sorted((set(others) & self.known) - set(wanted))
        for first in range(0, len(candidates), PROJECTED_AT_A_TIME):
            genes_of_block = candidates[first : first + PROJECTED_AT_A_TIME]
            block = ((self.quick_features or self.features)(genes_of_block) - centre) / scale
            projected = block @ right[:kept].T * signs
            whole = np.maximum(np.linalg.norm(block, axis=1, keepdims=True), 1e-12)
            captured = (projected / whole).astype(np.float32)
            related = np.flatnonzero(np.linalg.norm(captured, axis=1) >= SMALLEST_SHARE)
            names += [genes_of_block[row] for row in related]
            blocks.append(captured[related])
        return GeneCodes(self.name, tuple(names), np.concatenate(blocks))


def read_network(path: str | Path) -> pd.DataFrame:
    """Read an undirected edge table.

    Returns
    -------
    Columns ``gene_a``, ``gene_b``, ``weight`` (1 where the file gives none).

    Raises
    ------
    InputError
        When the file is no table, has no pair of columns that could be an edge, a weight that is no
        number, or no edge.
    """
    table = _read_table(path)
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


def _separator(path: str | Path) -> str:
    """Tabs, unless the name of the file says otherwise."""
    return "," if ".csv" in Path(path).suffixes else "\t"


def _read_table(path: str | Path, named: bool = False) -> pd.DataFrame:
    """Read a table as it is; the first column is text where it is ``named``.

    Only an empty field is missing: NA is a gene alias.
    """
    try:
        first = pd.read_csv(path, sep=_separator(path), nrows=0, encoding="utf-8-sig").columns[0]
        table = pd.read_csv(
            path,
            sep=_separator(path),
            keep_default_na=False,
            dtype={first: str} if named else None,
            encoding="utf-8-sig",
        )
    except (pd.errors.EmptyDataError, IndexError):
        raise InputError(
            path, "an empty file", "a header and at least one row", "write the table again"
        ) from None
    except (pd.errors.ParserError, UnicodeDecodeError) as error:
        raise InputError(
            path,
            f"no table: {error}",
            "UTF-8 text, as many fields in each row as in the header",
            "save it as text, separated by tabs, or by commas in a file called .csv",
        ) from None
    # What R writes by default: pandas takes the first column for row names and shifts all others.
    if not isinstance(table.index, pd.RangeIndex):
        raise InputError(
            path,
            f"rows with more fields than the {table.shape[1]} of the header",
            "a name for every column, that of the genes too",
            "put the missing name in front of the header (in R: write.table with col.names = NA)",
        )
    return table


def _line(path: str | Path, row: int) -> int:
    """Line of a file, from 1, that holds a row of its table, from 0; blank lines are no rows."""
    blanks = " \t\r\n".replace(_separator(path), "")
    opener = gzip.open if str(path).endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8-sig") as lines:
        filled = (number for number, line in enumerate(lines, start=1) if line.strip(blanks))
        return next(number for place, number in enumerate(filled) if place == row + 1)


def _numbers(weight: pd.Series, path: str | Path) -> np.ndarray:
    """Take the size of the weights ``(edges,)``; a missing one would spread through the whole network."""
    values = pd.to_numeric(weight, errors="coerce").abs().to_numpy(float)
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise InputError(
            f"{path} line {_line(path, bad[0])}, column {weight.name}",
            repr(weight.iloc[bad[0]]),
            "a number",
            "give every edge a weight, or drop the column to weigh all edges alike",
        )
    return values


def _signs(vectors: np.ndarray) -> np.ndarray:
    """Signs that make the largest entry of every column positive: singular vectors have none of their own."""
    largest = np.abs(vectors).argmax(axis=0)
    return np.sign(vectors[largest, np.arange(vectors.shape[1])])


def _unit_rows(values: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(values, axis=1, keepdims=True)
    return (values / np.maximum(norms, 1e-12)).astype(np.float32)


def network_source(
    name: str, edges: pd.DataFrame, restart: float = 0.2, where: str | Path = ""
) -> PriorSource:
    """Describe genes by where random walks from them arrive.

    The profile of a gene is the stationary distribution π of a random walk with restart on the
    network (Köhler et al. 2008). Two genes are compared by the Bhattacharyya affinity Σ √(π₁ π₂), whose
    feature map √π has unit length; the codes are its leading principal directions. Unlike the
    network's own eigenvectors, they spend no dimension on small components without a wanted gene.

    Parameters
    ----------
    edges
        Columns ``gene_a``, ``gene_b``, ``weight``.
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
    quick_walk = walk.astype(np.float32)
    steps = int(np.ceil(np.log(1e-4) / np.log(1 - restart)))  # until the remainder is below 1e-4

    def profiles(genes: Sequence[str], walk: sparse.csr_array = walk) -> np.ndarray:
        start = np.zeros((n, len(genes)), dtype=walk.dtype)
        start[np.searchsorted(nodes, np.array(genes, dtype=str)), np.arange(len(genes))] = 1
        profile = start
        for _ in range(steps):
            profile = restart * start + (1 - restart) * (walk @ profile)
        return np.sqrt(profile.T)

    quick = partial(profiles, walk=quick_walk)
    return PriorSource(name, frozenset(nodes.tolist()), profiles, where, quick_features=quick, kind=NETWORK)


def gene_set_source(name: str, sets: Mapping[str, Sequence[str]], where: str | Path = "") -> PriorSource:
    """Describe genes by their membership in gene sets, weighted by rarity: 1 + log(genes / set size)."""
    sets_of: dict[str, list[int]] = {}
    for column, members in enumerate(sets.values()):
        for gene in members:
            sets_of.setdefault(gene, []).append(column)
    weight = np.array([1 + np.log(len(sets_of) / len(members)) for members in sets.values()])

    def memberships(genes: Sequence[str]) -> np.ndarray:
        table = np.zeros((len(genes), len(weight)))
        for row, gene in enumerate(genes):
            table[row, sets_of[gene]] = weight[sets_of[gene]]
        return _unit_rows(table)

    return PriorSource(name, frozenset(sets_of), memberships, where, kind=GENE_SETS)


def read_gene_table(path: str | Path) -> pd.DataFrame:
    """Read a table of gene features: text or protein embeddings, or any numbers.

    Returns
    -------
    Rows named by gene (the first column of the file), one float column per feature.

    Raises
    ------
    InputError
        When the file is no table, there is no feature, a gene occurs twice or has no name, or a value is
        no finite number, naming the row and the column; or when no feature differs between genes.
    """
    table = _read_table(path, named=True)
    first = table.columns[0]
    genes = table[first].str.strip()
    if table.shape[1] < 2 or table.empty:
        raise InputError(
            path,
            f"{table.shape[1]} column(s) and {len(table)} row(s)",
            "gene symbols in the first column, features in the others",
            "separate columns by tabs, or by commas in a file called .csv",
        )
    unnamed = np.flatnonzero(genes == "")
    if len(unnamed):
        where = f"{path} line {_line(path, unnamed[0])}"
        raise InputError(where, "an empty gene", "a gene symbol", "fill it in")
    repeated = np.flatnonzero(genes.duplicated())
    if len(repeated):
        raise InputError(
            f"{path} line {_line(path, repeated[0])}, column {first}",
            f"gene {genes.iloc[repeated[0]]} a second time",
            "one row per gene",
            "average the rows of a gene, or keep one",
        )
    values = {}
    for column in table.columns[1:]:
        numbers = pd.to_numeric(table[column], errors="coerce").to_numpy(float)
        bad = np.flatnonzero(~np.isfinite(numbers))
        if len(bad):
            raise InputError(
                f"{path} line {_line(path, bad[0])} (gene {genes.iloc[bad[0]]}), column {column}",
                repr(table[column].iloc[bad[0]]),
                "a finite number",
                "leave out genes without features, and columns that are not numbers",
            )
        values[column] = numbers
    if all((numbers == numbers[0]).all() for numbers in values.values()):
        raise InputError(
            path,
            f"the same features for all {len(genes)} gene(s)",
            "at least one column that differs between genes",
            "check the columns, or take the file out of the dataset's row",
        )
    return pd.DataFrame(values, index=pd.Index(genes, name="gene"))


def gene_table_source(name: str, table: pd.DataFrame, where: str | Path = "") -> PriorSource:
    """Describe genes by a table ``(genes, features)``; codes are principal components of its columns.

    Columns are standardized over the genes that the screen perturbs, since their units may differ.
    """

    def rows(genes: Sequence[str]) -> np.ndarray:
        return table.loc[list(genes)].to_numpy(float)

    return PriorSource(
        name, frozenset(table.index), rows, where, centred=True, standardized=True, kind=GENE_TABLE
    )


def read_sources(
    networks: Sequence[str | Path] = (),
    gene_sets: Sequence[str | Path] = (),
    gene_tables: Sequence[str | Path] = (),
    restart: float = 0.2,
) -> list[PriorSource]:
    """Read every file of prior knowledge named in the table of datasets; a source is called after its file.

    Raises
    ------
    InputError
        When a file cannot be used, two sources would share a name, or a name is taken.
    """
    require_file_names([*networks, *gene_sets, *gene_tables])
    return [
        *(network_source(source_name(path), read_network(path), restart, path) for path in networks),
        *(gene_set_source(source_name(path), read_gene_sets(path), path) for path in gene_sets),
        *(gene_table_source(source_name(path), read_gene_table(path), path) for path in gene_tables),
    ]


def read_priors(
    networks: Sequence[str | Path],
    gene_sets: Sequence[str | Path],
    genes: Sequence[str],
    dim: int = 64,
    restart: float = 0.2,
) -> list[GeneCodes]:
    """Codes of ``genes`` from networks and gene sets; see :func:`read_sources`."""
    return [source.codes(genes, dim) for source in read_sources(networks, gene_sets, restart=restart)]


CODED = "coded by prior sources"
TRAINED_ONLY = "known from its own training cells alone"
AVERAGE = "predicted as an average unseen gene, never as control"


def coverage(codes: Mapping[str, np.ndarray], genes: Sequence[str], trained: Collection[str]) -> pd.DataFrame:
    """Say for every perturbed gene which sources cover it, and what follows for its prediction.

    Parameters
    ----------
    codes
        Source name to ``(genes, dim)``; a row of zeros is a gene that the source does not cover.
    genes
        Genes of the rows.
    trained
        Genes that a training perturbation carries.

    Returns
    -------
    Columns ``gene``, ``n_sources``, one 0/1 column per source, ``consequence``.
    """
    covered = {name: values.any(axis=1).astype(int) for name, values in codes.items()}
    n_sources = np.sum(list(covered.values()), axis=0) if covered else np.zeros(len(genes), dtype=int)
    consequence = [
        CODED if count else TRAINED_ONLY if gene in trained else AVERAGE
        for gene, count in zip(genes, n_sources, strict=True)
    ]
    return pd.DataFrame({"gene": list(genes), "n_sources": n_sources, **covered, "consequence": consequence})


def require_coverage(sources: Sequence[PriorSource], genes: Sequence[str]) -> None:
    """Stop when a source knows none of the perturbed genes: most often another species or identifier.

    Raises
    ------
    InputError
        Naming the file and examples of both sides.
    """
    for source in sources:
        if not source.known & set(genes):
            mismatch = naming_mismatch(genes, source.known)
            raise InputError(
                source.where,
                f"genes such as {', '.join(sorted(source.known)[:3])}, none of the {len(genes)} perturbed "
                "genes" + (f" ({mismatch})" if mismatch else ""),
                f"symbols such as {', '.join(list(genes)[:3])}",
                f"use a file with the same gene symbols and species, or {source.remedy}",
            )


def require_differences(
    sources: Sequence[PriorSource], codes: Mapping[str, np.ndarray], genes: Sequence[str]
) -> None:
    """Stop when a source cannot tell the perturbed genes apart: all their codes are zero.

    Raises
    ------
    InputError
        Naming the file and how many of the perturbed genes it knows.
    """
    for source in sources:
        if not codes[source.name][: len(genes)].any():
            raise InputError(
                source.where,
                f"the same for all perturbed genes that it knows, {len(source.known & set(genes))}",
                "differences between at least two of them",
                f"check the file, or {source.remedy}",
            )
