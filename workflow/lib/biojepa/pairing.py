"""Make one fold: freeze its split, choose genes on training cells, pair cells with controls."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from anndata.io import read_elem

from biojepa.coexpression import coexpression_source
from biojepa.contracts import (
    BATCH,
    CELL_TYPE,
    CONTEXT,
    CONTEXT_COLUMN,
    CONTROL,
    DOSE,
    GENES_BY_BATCH,
    LEFT_OUT,
    LEFT_OUT_BY_FLAG,
    LIBRARY_SIZE,
    MATCHED,
    NEAREST,
    NO_SPLIT,
    OPTIMAL_TRANSPORT,
    PERTURBATION,
    PERTURBATION_TYPE,
    POPULATION,
    RANDOM,
    SCHEMES,
    SOURCES,
    STRATEGIES,
    STRATEGY,
    TARGET_SUM,
    TEST,
    TRAIN,
    VAL,
    VALIDATION_ELSEWHERE,
)
from biojepa.controls import (
    ControlPools,
    batch_levels,
    combine,
    draw_controls,
    match_depth,
    nearest_controls,
    principal_scores,
    transport_controls,
)
from biojepa.errors import InputError
from biojepa.files import atomic_path
from biojepa.flagged_cells import drop_flagged
from biojepa.pairs import (
    CONTROL_CODE,
    batches_that_choose,
    gene_moments,
    gene_moments_of_codes,
    match_controls,
    select_genes,
    select_genes_by_batch,
    write_pairs,
)
from biojepa.prediction_requests import ALL
from biojepa.priors import (
    AVERAGE,
    GeneCodes,
    PriorSource,
    coverage,
    read_sources,
    require_coverage,
    require_differences,
)
from biojepa.responses import refuse_same_cells, response_source
from biojepa.schemes import (
    COMBINATION_PROTOCOLS,
    HALF_OF_DOUBLES,
    MIN_PERTURBATIONS,
    HeldOut,
    no_split,
    split_context,
    split_genes,
    split_listed,
    split_perturbations,
)
from biojepa.splits import (
    cell_contexts,
    cell_labels,
    genes_of,
    labels_in,
    read_facts,
    read_split,
    refuse_held_out,
    write_split,
)

log = logging.getLogger(__name__)
UNKNOWN_TYPE = "unknown"


@dataclass(frozen=True)
class PairSettings:
    """Settings of the pair stage.

    Attributes
    ----------
    n_folds
        Folds of the schemes perturbation and gene, and draws of the scheme combination.
    combination_protocol
        What the scheme combination holds out, a key of :data:`~biojepa.schemes.COMBINATION_PROTOCOLS`.
    context_column
        Column of ``cells.h5ad`` whose values are the contexts of the scheme context.
    contexts
        Contexts that the scheme context holds out in turn, one fold each; needed for that scheme.
    min_cells_in_context
        Fewest cells of a perturbation in the held-out context, and in the others together, to be used.
    list
        What the scheme list holds out: ``test`` and, if not drawn, ``validation`` labels, or the path of a
        TSV with the columns perturbation and set.
    validation_share
        Share of all perturbations that each fold keeps for selection and early stopping.
    seed
        Of the split and of the pairing.
    drop_flags
        Flags in ``obs`` of ``cells.h5ad`` whose cells are left out of training, and of nothing else.
    n_genes
        Genes at most; the most variable ones on training cells, perturbed genes always.
    genes_by_batch
        Whether genes are ranked within each batch, and the ranks combined, where several batches have
        enough training cells.
    prior_dim
        Dimensions at most of the codes of each prior source.
    restart
        Restart probability of the random walk on a network.
    coexpression
        Whether co-expression of genes in training cells is a prior source too.
    strategy
        How a control is found for a cell, one of :data:`~biojepa.contracts.STRATEGIES`.
    n_nearest
        Of the strategy matched: controls nearest in depth that one is drawn from.
    n_components
        Of the strategies nearest and optimal_transport: principal components in which cells are compared.
    transport_cells
        Of the strategy optimal_transport: cells at most of a side of a plan.
    """

    n_folds: int = 5
    combination_protocol: str = HALF_OF_DOUBLES
    context_column: str = CELL_TYPE
    contexts: Sequence[str] | None = None
    min_cells_in_context: int = 10
    list: Mapping[str, Sequence[str]] | str | None = None
    validation_share: float = 0.1
    seed: int = 0
    drop_flags: Sequence[str] = ()
    n_genes: int = 5000
    genes_by_batch: bool = True
    prior_dim: int = 64
    restart: float = 0.2
    coexpression: bool = False
    strategy: str = POPULATION
    n_nearest: int = 10
    n_components: int = 50
    transport_cells: int = 512


def freeze_split(
    cells_path: str | Path, path: str | Path, dataset: str, scheme: str, fold: int, settings: PairSettings
) -> pd.DataFrame:
    """Write ``split.tsv`` and ``split.json`` of one fold, and return the table.

    The scheme ``none`` has one fold, 0, in which everything is training.

    Raises
    ------
    InputError
        With too few perturbations to split, or when the screen lacks what the scheme asks for.
    ValueError
        For an unknown scheme.
    """
    with h5py.File(cells_path, "r") as file:
        obs = read_elem(file["obs"])
    held_out, n_folds = hold_out(obs, scheme, fold, settings, cells_path)
    elsewhere = held_out.facts.get(VALIDATION_ELSEWHERE, ())
    left_out = held_out.facts.get(LEFT_OUT, {})
    few = ", ".join(f"{name} ({n})" for name, n in left_out.items() if name not in elsewhere)
    if few:
        log.warning("too few cells to be used: %s", few)
    if elsewhere:
        log.info("not tested, since validation in the other contexts: %s", ", ".join(elsewhere))
    write_split(
        held_out.table,
        path,
        dataset=dataset,
        scheme=scheme,
        fold=fold,
        n_folds=n_folds,
        seed=settings.seed,
        **held_out.facts,
    )
    return held_out.table


def hold_out(
    obs: pd.DataFrame, scheme: str, fold: int, settings: PairSettings, where: str | Path
) -> tuple[HeldOut, int]:
    """Deal one fold of a scheme, and say how many folds it has.

    Parameters
    ----------
    obs
        Columns ``perturbation`` and, for the scheme context, the one that holds contexts.
    scheme, fold, settings
        Which fold of what.
    where
        File that the labels come from, for messages.

    Raises
    ------
    InputError
        With too few perturbations to split, or when the screen lacks what the scheme asks for.
    ValueError
        For an unknown scheme.
    """
    labels, share, seed = obs[PERTURBATION].astype(str).to_numpy(), settings.validation_share, settings.seed
    if scheme == "gene":
        return split_genes(labels, fold, settings.n_folds, share, seed, where), settings.n_folds
    if scheme == "combination":
        protocol = settings.combination_protocol
        held_out = COMBINATION_PROTOCOLS[protocol](labels, fold, share, seed, where)
        return HeldOut(held_out.table, {"protocol": protocol, **held_out.facts}), settings.n_folds
    if scheme == "context":
        column, contexts = settings.context_column, list(settings.contexts or ())
        if column not in obs or not contexts:
            raise InputError(
                f"{where}, scheme context",
                f"no column {column} in obs" if contexts else "no context to hold out",
                "contexts in pair.contexts, and their column in the cells",
                "name the contexts, and the column of the raw screen in the table of datasets",
            )
        context, fewest = obs[column].astype(str).to_numpy(), settings.min_cells_in_context
        return split_context(labels, context, contexts, fold, column, fewest, share, seed, where), len(
            contexts
        )
    if scheme == "list":
        if settings.list is None:
            raise InputError("config, pair.list", "nothing", "what to hold out", "see config/README.md")
        return split_listed(labels, settings.list, share, seed, where), 1
    if scheme not in (NO_SPLIT, "perturbation"):
        raise ValueError(f"scheme is {scheme!r}; expected one of {', '.join((*SCHEMES, NO_SPLIT))}")
    n, n_folds = len(set(labels) - {CONTROL}), 1 if scheme == NO_SPLIT else settings.n_folds
    needed = 1 if scheme == NO_SPLIT else max(MIN_PERTURBATIONS, n_folds)
    if n < needed:
        raise InputError(
            where,
            f"{n} perturbation(s) after quality control",
            f"at least {needed} for {n_folds} fold(s)",
            "lower preprocess.min_cells_per_perturbation or pair.n_folds; qc.tsv says what was removed",
        )
    if scheme == NO_SPLIT:
        return HeldOut(no_split(labels)), 1
    return HeldOut(split_perturbations(labels, n_folds, share, seed)[fold]), n_folds


@dataclass(frozen=True)
class FoldTables:
    """What there is to read of a fold beside ``pairs.h5``.

    Attributes
    ----------
    coverage
        Rows of ``coverage.tsv``, see :func:`~biojepa.priors.coverage`.
    training_cells
        Rows of ``training_cells.tsv``, see :func:`~biojepa.flagged_cells.drop_flagged`.
    """

    coverage: pd.DataFrame
    training_cells: pd.DataFrame


def build_pairs(
    cells_path: str | Path,
    split_path: str | Path,
    path: str | Path,
    networks: Sequence[str | Path],
    gene_sets: Sequence[str | Path],
    settings: PairSettings,
    facts: dict[str, object],
    gene_tables: Sequence[str | Path] = (),
    responses: Mapping[str, str | Path] | None = None,
    requests: Sequence[str] | str = (),
) -> FoldTables:
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
    gene_tables
        Tables of gene features, prior knowledge too.
    responses
        Other screens, name to ``cells.h5ad``, whose responses are prior knowledge for this one.
    requests
        Perturbations outside the screen that will be predicted, or ``all``: those of their genes that a
        source knows get codes as well. No code of a gene of the screen depends on them.

    Returns
    -------
    Which prior source covers which perturbed gene, and how many cells of each perturbation train.

    Raises
    ------
    InputError
        When a prior covers no perturbed gene or tells none apart, the screen has no control cells, or a flag
        is unknown or leaves hardly a perturbation.
    LeakageError
        When a test perturbation would reach the file, or another screen holds cells of this one.
    """
    split, held_out = read_split(split_path), read_facts(split_path)
    genes = sorted({gene for label in split[PERTURBATION] for gene in genes_of(label)})
    sources = read_sources(networks, gene_sets, gene_tables, settings.restart)
    for name, cells in (responses or {}).items():
        if Path(cells).resolve() == Path(cells_path).resolve():
            raise InputError(
                cells,
                "the screen itself among the screens whose responses are prior knowledge",
                "another screen",
                "a screen must not predict itself; take it out of the column responses",
            )
        refuse_same_cells(cells_path, cells)
        sources.append(response_source(name, cells))
    with h5py.File(cells_path, "r") as file:
        obs = read_elem(file["obs"])
        names = np.asarray(read_elem(file["var"]).index, dtype=str)
        label, context = cell_labels(obs, held_out), cell_contexts(obs, held_out)
        if not (label == CONTROL).any():
            raise InputError(
                cells_path, "no control cell", f"cells labelled {CONTROL}", "rerun the preprocess stage"
            )
        dropped, of_training = drop_flagged(obs, label, split, settings.drop_flags, cells_path)
        training = _carries(label, [*labels_in(split, TRAIN), CONTROL]) & ~dropped
        keep = _carries(label, [*labels_in(split, TRAIN, VAL), CONTROL]) & ~dropped
        refuse_held_out(label[training], split, (TRAIN,), "gene selection")
        refuse_held_out(label[keep], split, (TRAIN, VAL), "pairs.h5")

        if settings.coexpression:
            sources.append(
                coexpression_source(file["X"], names.tolist(), training, settings.prior_dim, cells_path)
            )
        require_coverage(sources, genes)
        others = _others(requests, sources, genes)
        codes = {
            source.name: _rows(source.codes(genes, settings.prior_dim, others), genes, others)
            for source in sources
        }
        require_differences(sources, codes, genes)
        types, design = _design(obs, label, split[PERTURBATION].tolist())
        columns, by_batch = _choose_genes(file["X"], training, obs, settings, np.isin(names, genes))
        position = {CONTROL: CONTROL_CODE} | {name: code for code, name in enumerate(split[PERTURBATION])}
        perturbation = np.array([position[name] for name in label[keep]], dtype=np.int32)
        batches = obs.loc[keep, BATCH].astype(str)
        batch_names = sorted(batches.unique())
        batch = pd.Categorical(batches, categories=batch_names).codes.astype(np.int32)
        context_names, context_code = _context_codes(context, keep)
        depth = np.log(obs.loc[keep, LIBRARY_SIZE].to_numpy(np.float32))
        if settings.strategy == POPULATION:
            rng = np.random.default_rng([settings.seed, 1])
            partner, orphans = match_controls(perturbation, batch, rng, context_code)
        else:
            kept = KeptCells(perturbation, batch, context_code, _type_codes(obs, keep), depth)
            partner, orphans = pair_cells(kept, file["X"], keep, training, columns, settings, cells_path)
        if orphans:
            log.warning(
                "no control cell%s in batch %s: their cells are paired with controls of all batches%s",
                " of some cell types" if settings.strategy == MATCHED else "",
                ", ".join(batch_names[code] for code in orphans),
                "" if context_code is None else " of their context, or of all contexts where it has none",
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
                    "log_library_size": depth,
                    "partner": partner,
                    **({} if context_code is None else {"context": context_code}),
                },
                design=design,
                names={
                    "genes": names[columns],
                    "cell_names": obs.index[keep].to_numpy(str),
                    "batches": batch_names,
                    "labels": split[PERTURBATION].tolist(),
                    "sets": split["set"].tolist(),
                    "categories": split["category"].tolist(),
                    "types": types,
                    "perturbed_genes": [*genes, *others],
                    **({} if context_code is None else {"contexts": context_names}),
                },
                codes=codes,
                facts={
                    **facts,
                    **_context_facts(held_out),
                    SOURCES: _origins(sources),
                    STRATEGY: settings.strategy,
                    **({GENES_BY_BATCH: True} if by_batch else {}),
                    **_target_sum(file),
                    **_left_out(of_training, settings.drop_flags),
                },
            )
    log.info(
        "%d cells of %d training and %d validation perturbations, %d genes; %d perturbations held out",
        keep.sum(),
        len(labels_in(split, TRAIN)),
        len(labels_in(split, VAL)),
        len(columns),
        len(labels_in(split, TEST)),
    )
    left = of_training.loc[of_training["n_training_cells"] > 0, PERTURBATION]
    trained = {gene for name in left for gene in genes_of(name)}
    covered = coverage({name: values[: len(genes)] for name, values in codes.items()}, genes, trained)
    for name in codes:
        log.info("prior %s covers %d of %d perturbed genes", name, covered[name].sum(), len(genes))
    unknown = covered.loc[covered["consequence"] == AVERAGE, "gene"]
    if len(unknown):
        log.warning(
            "no prior source covers %d held-out gene(s), %s: %s", len(unknown), AVERAGE, ", ".join(unknown)
        )
    return FoldTables(covered, of_training)


@dataclass(frozen=True)
class KeptCells:
    """What pairing needs to know of the cells of ``pairs.h5``.

    Attributes
    ----------
    perturbation, batch, context, cell_type
        ``(cells,)`` codes; control is -1; context and cell type None where all cells are of one.
    log_library_size
        ``(cells,)``
    """

    perturbation: np.ndarray
    batch: np.ndarray
    context: np.ndarray | None
    cell_type: np.ndarray | None
    log_library_size: np.ndarray


def pair_cells(
    cells: KeptCells,
    matrix: h5py.Group,
    keep: np.ndarray,
    training: np.ndarray,
    columns: np.ndarray,
    settings: PairSettings,
    where: str | Path,
) -> tuple[np.ndarray, list[int]]:
    """Find the partner of every cell by a strategy other than population.

    Parameters
    ----------
    cells
        The cells of ``pairs.h5``.
    matrix
        CSR group of log-expression of all cells of the screen.
    keep, training
        ``(cells of the screen,)`` bool: those of ``pairs.h5``, and training cells and controls, which alone
        set the principal components.
    columns
        Genes of the fold.
    settings
        Of the stage.
    where
        File to name in an error.

    Returns
    -------
    partner
        ``(cells,)`` int32 position of a control cell.
    orphan_batches
        Batches of cells for which there is no control as near as the strategy wants it.

    Raises
    ------
    InputError
        With too few cells or genes for principal components.
    ValueError
        For an unknown strategy.
    """
    rng = np.random.default_rng([settings.seed, 1])
    context, cell_type, batch = cells.context, cells.cell_type, cells.batch
    levels = batch_levels(batch, context)
    if settings.strategy == RANDOM:
        levels = levels[1:]
    elif settings.strategy == MATCHED and cell_type is not None:
        levels = [combine(context, batch, cell_type), combine(context, cell_type), *levels]
    pools = ControlPools.of(cells.perturbation, levels)
    far = pools.level > 0 if settings.strategy != RANDOM else np.zeros(len(batch), dtype=bool)
    orphans = np.unique(batch[far]).tolist()
    if settings.strategy == RANDOM:
        return draw_controls(pools, rng), orphans
    if settings.strategy == MATCHED:
        return match_depth(pools, cells.log_library_size, settings.n_nearest, rng), orphans
    if settings.strategy not in (NEAREST, OPTIMAL_TRANSPORT):
        raise ValueError(f"strategy is {settings.strategy!r}; expected one of {', '.join(STRATEGIES)}")
    if min(training.sum(), len(columns)) < 2:
        raise InputError(
            where,
            f"{training.sum()} training cell(s) and control(s), {len(columns)} gene(s)",
            f"at least two of each for pair.strategy {settings.strategy}",
            "set pair.strategy to population, or raise pair.n_genes",
        )
    scores = principal_scores(matrix, keep, training, columns, settings.n_components, rng)
    if settings.strategy == NEAREST:
        return nearest_controls(pools, scores, rng), orphans
    return transport_controls(pools, cells.perturbation, scores, settings.transport_cells, rng), orphans


def _choose_genes(
    matrix: h5py.Group, training: np.ndarray, obs: pd.DataFrame, settings: PairSettings, always: np.ndarray
) -> tuple[np.ndarray, bool]:
    """Choose genes on training cells and controls: sorted positions, and whether batches had a say each."""
    if settings.n_genes >= len(always):
        return np.arange(len(always)), False
    batches = None
    if settings.genes_by_batch:
        batches = batches_that_choose(obs[BATCH].astype(str).to_numpy(), training)
    if batches is None:
        mean, variance = gene_moments(matrix, training, len(always))
        return select_genes(mean, variance, settings.n_genes, always), False
    log.info("genes are ranked within %d batches", batches.max() + 1)
    [(mean, variance)] = gene_moments_of_codes(matrix, [batches], len(always))
    return select_genes_by_batch(mean, variance, settings.n_genes, always), True


def _target_sum(cells: h5py.File) -> dict[str, float]:
    """Read what ``cells.h5ad`` was scaled to, where it says so: cells made elsewhere do not."""
    if "uns/provenance" not in cells:
        return {}
    settings = json.loads(cells["uns/provenance"].asstr()[()]).get("settings", {})
    return {TARGET_SUM: float(settings["target_sum"])} if "target_sum" in settings else {}


def _left_out(of_training: pd.DataFrame, flags: Sequence[str]) -> dict[str, str]:
    """Count the cells that each flag left out of training, and all that were, as JSON text."""
    if not flags:
        return {}
    used = of_training[of_training["n_left_out"] > 0]
    return {LEFT_OUT_BY_FLAG: json.dumps({name: int(used[name].sum()) for name in (*flags, "n_left_out")})}


def _type_codes(obs: pd.DataFrame, keep: np.ndarray) -> np.ndarray | None:
    """Code the cell type of the kept cells; nothing where the screen gives none."""
    if CELL_TYPE not in obs:
        return None
    return pd.factorize(obs.loc[keep, CELL_TYPE].astype(str), sort=True)[0].astype(np.int32)


def _carries(label: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Tell which cells ``(cells,)`` carry one of some labels, however many these are."""
    return pd.Series(label).isin(names).to_numpy()


def _origins(sources: Sequence[PriorSource]) -> str:
    """Say what every source was made from, as JSON text; folders are left out, they differ by machine."""
    origins = {source.name: {"kind": source.kind, "file": Path(source.where).name} for source in sources}
    return json.dumps(origins, sort_keys=True)


def _others(requests: Sequence[str] | str, sources: Sequence[PriorSource], genes: Sequence[str]) -> list[str]:
    """List the genes that are asked for, that a source knows and that are none of the screen's, sorted."""
    known = frozenset[str]().union(*(source.known for source in sources))
    asked = known if requests == ALL else {gene for label in requests for gene in genes_of(label)}
    return sorted((asked & known) - set(genes))


def _context_facts(held_out: Mapping[str, Any]) -> dict[str, Any]:
    """Pick what names the held-out context, where there is one."""
    return {key: held_out[key] for key in (CONTEXT_COLUMN, CONTEXT) if key in held_out}


def _context_codes(context: np.ndarray | None, keep: np.ndarray) -> tuple[list[str], np.ndarray | None]:
    """Code the context of the kept cells; nothing where the fold holds out no context."""
    if context is None:
        return [], None
    names = sorted(set(context[keep]))
    return names, pd.Categorical(context[keep], categories=names).codes.astype(np.int32)


def _design(
    obs: pd.DataFrame, label_of_cell: np.ndarray, labels: Sequence[str]
) -> tuple[list[str], dict[str, np.ndarray]]:
    """Take type and dose of every label from the screen's design, which is known before any cell is measured.

    The most common type of a label's cells (the first of them in the alphabet when tied), and their
    median dose, 1 where none is given.
    """
    kind = obs[PERTURBATION_TYPE].astype(str).to_numpy() if PERTURBATION_TYPE in obs else UNKNOWN_TYPE
    given = pd.to_numeric(obs[DOSE]).to_numpy(float) if DOSE in obs else np.nan
    cells = pd.DataFrame({"label": label_of_cell, "type": kind, "dose": given})
    rows = pd.Index(labels)
    common = pd.crosstab(cells["label"], cells["type"]).idxmax(axis=1).reindex(rows).astype(str)
    types = sorted(set(common.tolist()))
    dose = cells.groupby("label")["dose"].median().reindex(rows).fillna(1.0)
    code = np.array([types.index(name) for name in common], dtype=np.int32)
    return types, {"type_code": code, "dose": dose.to_numpy(np.float32)}


def _rows(source: GeneCodes, genes: Sequence[str], others: Sequence[str] = ()) -> np.ndarray:
    """Centred codes of ``genes``, of unit length, then of ``others``; zero where not covered.

    What all genes share says nothing about one of them, and would be shrunken away anyway. The centre
    is that of ``genes``, the screen's, alone. One of the ``others`` gets the code that a gene of the screen
    with the same direction has, times its captured share, the length of its projection: the less of it
    the source relates to the screen, the closer it is to zero, the average unseen gene.
    """
    position = {gene: row for row, gene in enumerate(source.genes)}
    wanted = [*genes, *others]
    known = np.array([gene in position for gene in wanted])
    values = np.zeros((len(wanted), source.values.shape[1]), dtype=np.float32)
    values[known] = source.values[[position[gene] for gene in wanted if gene in position]]
    share = np.linalg.norm(values[len(genes) :], axis=1, keepdims=True)
    values[len(genes) :] /= np.maximum(share, 1e-12)
    of_screen = np.flatnonzero(known[: len(genes)])
    if len(of_screen) > 1:
        values[known] -= values[of_screen].mean(axis=0)
    norms = np.linalg.norm(values, axis=1, keepdims=True)
    # A gene that the source cannot tell from the average is left at zero: rounding is no code.
    codes = np.where(norms > 1e-5, values / np.maximum(norms, 1e-5), 0).astype(np.float32)
    codes[len(genes) :] *= share
    return codes
