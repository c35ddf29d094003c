"""Measure how much honest prior sources, and planted copies of the responses, look like the responses.

Question: from which likeness on is a prior source suspected to be made from the responses that are to be
predicted, without accusing honest knowledge?

Method: a screen is split as by the scheme ``perturbation``. Likeness of ``biojepa.evaluation.prior_leak``,
folds pooled, of every file of prior knowledge; of co-expression in training cells; of random features; and
of sources that were made from all cells of the screen, test cells included, as a careless user might:

- the table of mean responses, alone and with noise of 1 and 2 times its standard deviation
- their 3 and 10 leading components, their 30 most variable genes
- a network of genes that respond alike (correlation above 0.3), gene sets of them (clusters)

    python benchmarks/prior_leaks.py results/norman_tiny --networks NET.tsv.gz … --gene-sets SETS.gmt …

Prints a table in Markdown. Nothing of it is random but what is said to be, and that has a fixed seed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
from anndata.io import read_elem
from scipy.cluster.hierarchy import fcluster, linkage

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "workflow" / "lib"))

from biojepa.contracts import CONTROL
from biojepa.evaluation.prior_leak import Likeness, fold_evidence, likeness
from biojepa.evaluation.splits import read_split
from biojepa.evaluation.truth import Moments, collect_moments
from biojepa.files import sha256_of, write_tsv
from biojepa.labels import genes_of
from biojepa.pairing import PairSettings, build_pairs, freeze_split

MIN_CORRELATION = 0.3


def responses(moments: Moments) -> pd.DataFrame:
    """Average the change of every gene's own perturbation, or of all that hold it where it has none."""
    labels = [label for label in moments.labels if label != CONTROL]
    changes = moments.of(labels, moments.genes)[0] - moments.of([CONTROL], moments.genes)[0]
    rows = {}
    for gene in sorted({gene for label in labels for gene in genes_of(label)}):
        own = [place for place, label in enumerate(labels) if label == gene]
        rows[gene] = changes[own or [p for p, label in enumerate(labels) if gene in genes_of(label)]].mean(0)
    return pd.DataFrame(rows).T.rename_axis("gene")


def planted_tables(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield tables of gene features that give the responses away."""
    values = table.to_numpy()
    yield "leak_responses", table
    rng = np.random.default_rng(0)
    for times in (1, 2):
        noise = rng.standard_normal(values.shape) * values.std() * times
        yield f"leak_responses_noise{times}", pd.DataFrame(values + noise, table.index)
    left, singular, _ = np.linalg.svd(values - values.mean(axis=0), full_matrices=False)
    for k in (3, 10):
        yield f"leak_components{k}", pd.DataFrame(left[:, :k] * singular[:k], table.index)
    variable = np.argsort(-values.var(axis=0))[:30]
    yield "leak_variable30", pd.DataFrame(values[:, variable], table.index)
    yield "random_features", pd.DataFrame(rng.standard_normal((len(table), 50)), table.index)


def planted_network(table: pd.DataFrame) -> pd.DataFrame:
    """Join genes that respond alike."""
    alike = np.corrcoef(table.to_numpy() - table.to_numpy().mean(axis=0))
    first, second = np.nonzero(np.tril(alike, -1) > MIN_CORRELATION)
    genes = table.index.to_numpy()
    edges = {"gene_a": genes[first], "gene_b": genes[second], "weight": alike[first, second]}
    return pd.DataFrame(edges)


def planted_sets(table: pd.DataFrame) -> str:
    """Group genes that respond alike, four to a group on average, as GMT."""
    centred = table.to_numpy() - table.to_numpy().mean(axis=0)
    groups = fcluster(linkage(centred, "average", "cosine"), max(2, len(table) // 4), "maxclust")
    lines = []
    for group in np.unique(groups):
        members = table.index[groups == group]
        if len(members) > 1:
            lines.append("\t".join([f"group{group}", "planted", *members]))
    return "\n".join(lines) + "\n"


def measure(results: Path, networks: list[str], gene_sets: list[str], n_folds: int) -> list[Likeness]:
    """Build ``pairs.h5`` of every fold with all sources, and compare them with the responses."""
    cells = results / "preprocess" / "cells.h5ad"
    with h5py.File(cells, "r") as file:
        genes = pd.Index(read_elem(file["var"]).index.astype(str))
    moments = collect_moments(cells, genes)
    table, settings = responses(moments), PairSettings(coexpression=True)
    evidence = []
    with tempfile.TemporaryDirectory() as name:
        folder, tables = Path(name), []
        for stem, planted in planted_tables(table):
            tables.append(folder / f"{stem}.tsv")
            write_tsv(planted.reset_index(), tables[-1])
        write_tsv(planted_network(table), folder / "leak_network.tsv")
        (folder / "leak_clusters.gmt").write_text(planted_sets(table), encoding="utf-8")
        for fold in range(n_folds):
            split = folder / f"fold{fold}" / "split.tsv"
            freeze_split(cells, split, results.name, "perturbation", fold, settings)
            pairs = split.with_name("pairs.h5")
            build_pairs(
                cells,
                split,
                pairs,
                [*networks, folder / "leak_network.tsv"],
                [*gene_sets, folder / "leak_clusters.gmt"],
                settings,
                {"split_sha256": sha256_of(split)},
                gene_tables=tables,
            )
            with h5py.File(pairs, "r") as file:
                used = pd.Index(file["names/genes"].asstr()[:])
            frozen = read_split(split, split.with_suffix(".json"), fold)
            evidence.append(fold_evidence(pairs, frozen, moments, used))
    return likeness(evidence)


def main() -> None:
    """Print one row for each source."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path, help="folder of a dataset's results")
    parser.add_argument("--networks", nargs="*", default=[])
    parser.add_argument("--gene-sets", nargs="*", default=[])
    parser.add_argument("--folds", type=int, default=5)
    asked = parser.parse_args()
    screen = f"{asked.results.name}, {asked.folds} folds"
    print(f"| {screen} | likeness | lower end | changes | pairs | suspicious |")
    print("| --- | ---: | ---: | --- | ---: | --- |")
    for item in measure(asked.results, asked.networks, asked.gene_sets, asked.folds):
        print(
            f"| {item.source} | {item.value:.2f} | {item.low:.2f} | {item.form} | {item.n_pairs} | "
            f"{'yes' if item.suspicious else 'no'} |"
        )


if __name__ == "__main__":
    main()
