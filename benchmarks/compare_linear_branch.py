"""Compare ways to let an additive kernel ridge use prior knowledge.

Question: should the prior sources share one weight or have one each, and does their form matter?
Method: deal the perturbations into folds several times; in each fold fit every variant on the
training perturbations and score it on the *validation* perturbations. Cells of test perturbations
are never read: each fold is a ``pairs.h5`` made by the pipeline's own pair stage, which holds none.
Score: Pearson correlation over genes of predicted and observed change against the training
perturbed mean, and squared error summed over genes. Units: natural log of counts per target sum.

A perturbation that one fold validates on is tested by another. What is chosen by this table has seen
the whole screen, so the table justifies a rule; it is no estimate of performance.

Usage::

    python benchmarks/compare_linear_branch.py CELLS.h5ad --networks N.tsv.gz ... --gene-sets S.gmt ...
        [--deals 3] --name linear_branch_demo

Writes ``benchmarks/results/<name>.json``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "workflow" / "lib"))

from record import (  # noqa: E402
    paired_difference,
    provenance,
    require_files,
    squared_error,
    write_result,
)

from biojepa.baselines import fit_linear_branch  # noqa: E402
from biojepa.evaluation.registry import pearson_rows  # noqa: E402
from biojepa.linear import AdditiveKernelRidge, Components  # noqa: E402
from biojepa.pairing import PairSettings, build_pairs, freeze_split  # noqa: E402
from biojepa.pairs import (  # noqa: E402
    Pairs,
    read_pairs,
    refuse_leaked_pairs,
    trainable_labels,
    validation_labels,
)
from biojepa.priors import read_priors  # noqa: E402

RESTARTS = (0.05, 0.1, 0.35, 0.5, 0.7)
SHIPPED = "shipped: separate weights if one standard error better, left out"
ZERO_NORM = 1e-6

Codes = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Fold:
    """One fold of one deal.

    Attributes
    ----------
    pairs
        With centred codes, as the pipeline makes them.
    train, validation
        Positions of labels.
    delta
        ``(labels, genes)`` change against control; NaN for test labels, which have no cells.
    """

    pairs: Pairs
    train: np.ndarray
    validation: np.ndarray
    delta: np.ndarray

    @classmethod
    def of(cls, pairs: Pairs) -> Fold:
        """Take training and validation perturbations."""
        refuse_leaked_pairs(pairs)
        means, control = pairs.pseudobulk()
        return cls(pairs, trainable_labels(pairs), validation_labels(pairs), means - control)

    def fit(self, components: Components) -> AdditiveKernelRidge:
        """Fit a ridge with the given kernels on the training perturbations."""
        n_cells = self.pairs.n_cells[self.train]
        return AdditiveKernelRidge(components).fit(self.train, self.delta[self.train], n_cells)

    def components(self, codes: Codes, separate: bool = False) -> Components:
        """Build the kernels of this fold's labels."""
        return Components.of(self.pairs.membership, codes, separate)


@dataclass(frozen=True)
class Inputs:
    """The screen and its prior knowledge."""

    cells: Path
    networks: Sequence[Path]
    gene_sets: Sequence[Path]

    def fold(self, fold: int, settings: PairSettings) -> Pairs:
        """Run the pair stage for one fold and read what it wrote."""
        with tempfile.TemporaryDirectory() as folder:
            split, path = Path(folder) / "split.tsv", Path(folder) / "pairs.h5"
            freeze_split(self.cells, split, "benchmark", "perturbation", fold, settings)
            build_pairs(self.cells, split, path, self.networks, self.gene_sets, settings, {})
            return read_pairs(path)

    def folds(self, deals: int) -> Iterator[tuple[int, int, Pairs]]:
        """Yield deal, fold and pairs; a deal is a seed of the split."""
        for deal in range(deals):
            settings = PairSettings(seed=deal)
            for fold in range(settings.n_folds):
                yield deal, fold, self.fold(fold, settings)

    def uncentred_codes(self, genes: Sequence[str]) -> dict[str, np.ndarray]:
        """Codes ``(genes, dim)`` as the sources give them; zero where a source does not cover the gene."""
        row = {gene: index for index, gene in enumerate(genes)}
        settings, placed = PairSettings(), {}
        for source in read_priors(self.networks, self.gene_sets, genes, settings.prior_dim, settings.restart):
            placed[source.name] = np.zeros((len(genes), source.values.shape[1]))
            placed[source.name][[row[gene] for gene in source.genes]] = source.values
        return placed


def cubed_similarities(fold: Fold) -> Components:
    """Average the cubes of the gene similarities, which leaves close neighbours alone."""
    membership = fold.pairs.membership
    genes = [np.clip(codes @ codes.T, 0, None) ** 3 for codes in fold.pairs.codes.values()]
    prior = membership @ (sum(genes) / len(genes)) @ membership.T
    # Kernels are given by features whose products they are.
    values, vectors = np.linalg.eigh(prior)
    root = vectors * np.sqrt(np.clip(values, 0, None))
    return Components({**fold.components({}).features, "prior": root})


def best_source(fold: Fold) -> AdditiveKernelRidge:
    """Choose among the average and each source alone by leave-one-out error on training perturbations."""
    codes = fold.pairs.codes
    candidates = [codes, *({name: values} for name, values in codes.items())]
    models = [fold.fit(fold.components(candidate)) for candidate in candidates]
    observed = fold.delta[fold.train]
    return min(models, key=lambda model: squared_error(model.leave_one_out(), observed).mean())


def shipped(fold: Fold) -> AdditiveKernelRidge:
    """Fit the linear branch as the pipeline does."""
    return fit_linear_branch(fold.pairs, fold.train, fold.delta[fold.train])


def make_variants(
    uncentred: Codes, by_restart: Mapping[float, Codes]
) -> dict[str, Callable[[Fold], AdditiveKernelRidge]]:
    """Name what is compared; every entry fits a ridge on the training perturbations of a fold."""
    variants = {
        "no prior": lambda fold: fold.fit(fold.components({})),
        "average of the sources": lambda fold: fold.fit(fold.components(uncentred)),
        "average, codes centred": lambda fold: fold.fit(fold.components(fold.pairs.codes)),
        "one weight per source": lambda fold: fold.fit(fold.components(uncentred, separate=True)),
        "one weight per source, codes centred": lambda fold: fold.fit(
            fold.components(fold.pairs.codes, separate=True)
        ),
        SHIPPED: shipped,
        "best single source or average, left out": best_source,
        "average, codes centred, similarities cubed": lambda fold: fold.fit(cubed_similarities(fold)),
    }
    for restart, codes in by_restart.items():
        variants[f"average, codes centred, restart {restart:g}"] = lambda fold, codes=codes: fold.fit(
            fold.components(codes)
        )
    return variants


def score(fold: Fold, predicted: np.ndarray) -> pd.DataFrame:
    """Score Δ ``(validation labels, genes)``: columns ``perturbation``, ``r``, ``squared_error``."""
    observed, mean = fold.delta[fold.validation], fold.delta[fold.train].mean(axis=0)
    return pd.DataFrame(
        {
            "perturbation": [fold.pairs.labels[label] for label in fold.validation],
            "r": pearson_rows(predicted - mean, observed - mean, ZERO_NORM),
            "squared_error": squared_error(predicted, observed),
        }
    )


def compare(inputs: Inputs, deals: int) -> tuple[pd.DataFrame, dict[str, int]]:
    """Score every variant in every fold.

    Returns
    -------
    scores
        Columns ``variant``, ``deal``, ``fold``, ``perturbation``, ``r``, ``squared_error``.
    facts
        Folds, and in how many of them the shipped rule took separate weights.
    """
    scores, facts, variants = [], {"folds": 0, "folds_with_separate_weights": 0}, {}
    for deal, number, pairs in inputs.folds(deals):
        fold = Fold.of(pairs)
        if not variants:
            # Codes come from side information and the perturbed genes alone: they are those of every fold.
            codes = {r: inputs.fold(0, replace(PairSettings(), restart=r)).codes for r in RESTARTS}
            variants = make_variants(inputs.uncentred_codes(pairs.perturbed_genes), codes)
        mean = np.repeat(fold.delta[fold.train].mean(axis=0)[None], len(fold.validation), axis=0)
        found = {"training mean": score(fold, mean)}
        for name, fit in variants.items():
            model = fit(fold)
            found[name] = score(fold, model.predict(fold.validation))
            if name == SHIPPED:
                facts["folds"] += 1
                facts["folds_with_separate_weights"] += "prior" not in model.components.features
        scores += [table.assign(variant=name, deal=deal, fold=number) for name, table in found.items()]
    return pd.concat(scores, ignore_index=True), facts


def summarize(scores: pd.DataFrame) -> pd.DataFrame:
    """Average over all validation perturbations, and compare with the shipped rule in pairs."""
    indexed = scores.set_index(["variant", "perturbation", "deal", "fold"]).sort_index()
    rows = []
    for name in scores.variant.unique():
        own, reference = indexed.loc[name], indexed.loc[SHIPPED]
        gain, error = paired_difference(own.r, reference.r)
        rows.append(
            {
                "variant": name,
                "r": own.r.mean(),
                "squared_error": own.squared_error.mean(),
                "r_minus_shipped": gain,
                "standard_error": error,
            }
        )
    return pd.DataFrame(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, compare, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("cells", type=Path, metavar="CELLS.h5ad", help="cells.h5ad of the preprocess stage")
    parser.add_argument("--networks", type=Path, nargs="+", default=[], help="edge tables")
    parser.add_argument("--gene-sets", type=Path, nargs="+", default=[], help="GMT files")
    parser.add_argument("--deals", type=int, default=3, help="times the perturbations are dealt into folds")
    parser.add_argument("--name", required=True, help="of the result in benchmarks/results")
    options = parser.parse_args(arguments)
    require_files(parser, [options.cells, *options.networks, *options.gene_sets])
    if len(options.networks) + len(options.gene_sets) < 2:
        parser.error("the comparison needs two prior sources or more")
    torch.set_num_threads(1)
    made_by = provenance(__file__, options)
    scores, facts = compare(Inputs(options.cells, options.networks, options.gene_sets), options.deals)
    facts |= {
        "perturbations": int(scores.perturbation.nunique()),
        "scored": int((scores.variant == SHIPPED).sum()),
    }
    print(facts)
    write_result(options.name, made_by, summarize(scores), **facts)


if __name__ == "__main__":
    main()
