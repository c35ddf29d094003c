"""Make one fold: freeze its split, choose genes on training cells, pair cells with controls."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
from anndata.io import read_elem

from biojepa.contracts import BATCH, CONTROL, LIBRARY_SIZE, PERTURBATION, TEST, TRAIN, VAL
from biojepa.errors import InputError
from biojepa.files import atomic_path
from biojepa.pairs import CONTROL_CODE, gene_moments, match_controls, select_genes, write_pairs
from biojepa.priors import GeneCodes, coverage, read_priors, require_coverage
from biojepa.splits import (
    MIN_PERTURBATIONS,
    genes_of,
    labels_in,
    read_split,
    refuse_held_out,
    split_perturbations,
    write_split,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PairSettings:
    """Settings of the pair stage.

    Attributes
    ----------
    n_folds
        Folds that the perturbations are dealt into.
    validation_share
        Share of all perturbations that each fold keeps for selection and early stopping.
    seed
        Of the split and of the pairing.
    n_genes
        Genes at most; the most variable ones on training cells, perturbed genes always.
    prior_dim
        Dimensions at most of the codes of each prior source.
    restart
        Restart probability of the random walk on a network.
    """

    n_folds: int = 5
    validation_share: float = 0.1
    seed: int = 0
    n_genes: int = 5000
    prior_dim: int = 64
    restart: float = 0.2


def freeze_split(
    cells_path: str | Path, path: str | Path, dataset: str, scheme: str, fold: int, settings: PairSettings
) -> pd.DataFrame:
    """Write ``split.tsv`` and ``split.json`` of one fold, and return the table.

    Raises
    ------
    InputError
        With too few perturbations to split.
    """
    with h5py.File(cells_path, "r") as file:
        labels = read_elem(file["obs"])[PERTURBATION].astype(str).unique()
    n = len(set(labels) - {CONTROL})
    if n < max(MIN_PERTURBATIONS, settings.n_folds):
        raise InputError(
            cells_path,
            f"{n} perturbation(s) after quality control",
            f"at least {max(MIN_PERTURBATIONS, settings.n_folds)} for {settings.n_folds} folds",
            "lower preprocess.min_cells_per_perturbation or pair.n_folds; qc.tsv says what was removed",
        )
    tables = split_perturbations(labels, settings.n_folds, settings.validation_share, settings.seed)
    write_split(
        tables[fold],
        path,
        dataset=dataset,
        scheme=scheme,
        fold=fold,
        n_folds=settings.n_folds,
        seed=settings.seed,
    )
    return tables[fold]


def build_pairs(
    cells_path: str | Path,
    split_path: str | Path,
    path: str | Path,
    networks: Sequence[str | Path],
    gene_sets: Sequence[str | Path],
    settings: PairSettings,
    facts: dict[str, object],
) -> pd.DataFrame:
    """Write ``pairs.h5`` of one fold.

    Parameters
    ----------
    cells_path, split_path
        ``cells.h5ad`` and the frozen ``split.tsv``.
    path
        Where to write.
    networks, gene_sets
        Files of prior knowledge.
    settings, facts
        Settings, and attributes to store.

    Returns
    -------
    How well each prior source covers the perturbed genes, see :func:`~biojepa.priors.coverage`.

    Raises
    ------
    InputError
        When a prior covers no perturbed gene, or the screen has no control cells.
    LeakageError
        When a test perturbation would reach the file.
    """
    split = read_split(split_path)
    genes = sorted({gene for label in split[PERTURBATION] for gene in genes_of(label)})
    sources = read_priors(networks, gene_sets, genes, settings.prior_dim, settings.restart)
    require_coverage(sources, genes, [*networks, *gene_sets])
    covered = coverage(sources, genes)
    for row in covered.itertuples():
        log.info("prior %s covers %d of %d perturbed genes", row.source, row.n_covered, row.n_genes)

    with h5py.File(cells_path, "r") as file:
        obs = read_elem(file["obs"])
        names = np.asarray(read_elem(file["var"]).index, dtype=str)
        label = obs[PERTURBATION].astype(str).to_numpy()
        if not (label == CONTROL).any():
            raise InputError(
                cells_path, "no control cell", f"cells labelled {CONTROL}", "rerun the preprocess stage"
            )
        training = np.isin(label, [*labels_in(split, TRAIN), CONTROL])
        keep = np.isin(label, [*labels_in(split, TRAIN, VAL), CONTROL])
        refuse_held_out(label[training], split, (TRAIN,), "gene selection")
        refuse_held_out(label[keep], split, (TRAIN, VAL), "pairs.h5")

        mean, variance = gene_moments(file["X"], training, len(names))
        columns = select_genes(mean, variance, settings.n_genes, np.isin(names, genes))
        position = {CONTROL: CONTROL_CODE} | {name: code for code, name in enumerate(split[PERTURBATION])}
        perturbation = np.array([position[name] for name in label[keep]], dtype=np.int32)
        batches = obs.loc[keep, BATCH].astype(str)
        batch_names = sorted(batches.unique())
        batch = pd.Categorical(batches, categories=batch_names).codes.astype(np.int32)
        rng = np.random.default_rng([settings.seed, 1])
        partner, orphans = match_controls(perturbation, batch, rng)
        if orphans:
            log.warning(
                "no control cell in batch %s: their cells are paired with controls of all batches",
                ", ".join(batch_names[code] for code in orphans),
            )
        with atomic_path(path) as temporary:
            write_pairs(
                temporary,
                file["X"],
                keep,
                columns,
                tables={
                    "perturbation": perturbation,
                    "batch": batch,
                    "log_library_size": np.log(obs.loc[keep, LIBRARY_SIZE].to_numpy(np.float32)),
                    "partner": partner,
                },
                names={
                    "genes": names[columns],
                    "cell_names": obs.index[keep].to_numpy(str),
                    "batches": batch_names,
                    "labels": split[PERTURBATION].tolist(),
                    "sets": split["set"].tolist(),
                    "categories": split["category"].tolist(),
                    "perturbed_genes": genes,
                },
                codes={source.name: _rows(source, genes) for source in sources},
                facts=facts,
            )
    log.info(
        "%d cells of %d training and %d validation perturbations, %d genes; %d perturbations held out",
        keep.sum(),
        len(labels_in(split, TRAIN)),
        len(labels_in(split, VAL)),
        len(columns),
        len(labels_in(split, TEST)),
    )
    return covered


def _rows(source: GeneCodes, genes: Sequence[str]) -> np.ndarray:
    """Centred codes of ``genes`` in their order, of unit length, zero where not covered.

    What all genes share says nothing about one of them, and would be shrunken away anyway.
    """
    position = {gene: row for row, gene in enumerate(source.genes)}
    known = np.array([gene in position for gene in genes])
    values = np.zeros((len(genes), source.values.shape[1]), dtype=np.float32)
    values[known] = source.values[[position[gene] for gene in genes if gene in position]]
    if known.sum() > 1:
        values[known] -= values[known].mean(axis=0)
    norms = np.linalg.norm(values, axis=1, keepdims=True)
    # A gene that the source cannot tell from the average is left at zero: rounding is no code.
    return np.where(norms > 1e-5, values / np.maximum(norms, 1e-5), 0).astype(np.float32)
