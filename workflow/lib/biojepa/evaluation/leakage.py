"""Check, by name and by number, that what training read holds nothing of a test perturbation.

These checks are exact as far as names go: they compare files with each other by the names of cells, labels
and genes. A test cell that was copied under a name of its own passes them. Signs of a leak in the prior
codes, which no comparison of files can prove, are in :mod:`biojepa.evaluation.prior_leak`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd

from biojepa.contracts import (
    BATCH,
    CONTROL,
    GENES_BY_BATCH,
    POSITIVE_CONTROLS,
    SELECTED_ON,
    SET,
    SOURCES,
    STATED,
    TEST,
    TRAIN,
    TRAINED_ON,
)
from biojepa.errors import InputError
from biojepa.evaluation.predictions import FROM_CELLS, PredictionFile
from biojepa.evaluation.scoring import sentinel
from biojepa.evaluation.splits import FoldSplit
from biojepa.labels import genes_of, spell_label
from biojepa.pairs import (
    CONTROL_CODE,
    batches_that_choose,
    gene_moments_of_codes,
    select_genes,
    select_genes_by_batch,
)
from biojepa.splits import LeakageError, cell_labels, require_same_split

_REMAKE = "Fix: delete pairs.h5 and rerun from the pair stage"


def check_all(
    pairs_paths: Sequence[str | Path], cells_path: str | Path, splits: Sequence[FoldSplit]
) -> list[dict[str, Any]]:
    """Run every check of ``pairs.h5`` for each fold; files in the order of the splits.

    Raises
    ------
    LeakageError
        See the single checks.
    """
    rows, obs = [], read_obs(cells_path)
    for pairs_path, split in zip(pairs_paths, splits, strict=True):
        rows += check_training_cells(pairs_path, cells_path, split, obs)
        rows += check_sets(pairs_path, split)
    rows += check_gene_selection(pairs_paths, cells_path, splits, obs)
    return [*rows, *check_origins(pairs_paths), _readers()]


def read_obs(cells_path: str | Path) -> pd.DataFrame:
    """Read the annotation of all cells, which every fold is compared with."""
    with h5py.File(cells_path, "r") as file:
        return ad.io.read_elem(file["obs"])


def _readers() -> dict[str, Any]:
    """Say who reads cells from ``pairs.h5`` alone: true by how the workflow is made, and checked nowhere."""
    return sentinel(
        "encoder, predictor, readout, scaling, PCA, early stopping and simple models read cells from "
        "pairs.h5 alone",
        True,
        "the rule train is given no other cells; simple models and heads open cells.h5ad too, to count cells "
        "and to refuse its cells in another screen, and are fitted to pairs.h5 by their code",
        STATED,
    )


def unchecked() -> list[dict[str, Any]]:
    """Say that what training read is not there to be checked."""
    return [
        sentinel(
            "what training read: cells, genes, sets and prior codes",
            None,
            "no pairs.h5 of these folds; the predictions were made elsewhere, or the archive lacks it",
        )
    ]


def check_training_cells(
    pairs_path: str | Path, cells_path: str | Path, split: FoldSplit, obs: pd.DataFrame | None = None
) -> list[dict[str, Any]]:
    """Compare the cells of ``pairs.h5`` with ``cells.h5ad`` by name: their labels, and what is tested.

    ``pairs.h5`` is all that training sees of cells, so a test cell that hides there under another label,
    as a control say, is found here and nowhere else.

    Parameters
    ----------
    pairs_path, cells_path, split
        Files and split of one fold.
    obs
        :func:`read_obs` of ``cells_path``, where it was read already.

    Returns
    -------
    The outcome, for the report.

    Raises
    ------
    LeakageError
        Naming a cell that belongs to a test perturbation, that carries another label than in
        ``cells.h5ad`` or that is not in it, or when the file belongs to another split.
    """
    with h5py.File(pairs_path, "r") as file:
        names = file["names/cell_names"].asstr()[:]
        labels, codes = file["names/labels"].asstr()[:], file["cells/perturbation"][:]
        carried = np.where(codes == CONTROL_CODE, CONTROL, labels[codes])
        facts = dict(file.attrs)
    require_same_split(facts, split.path, pairs_path)
    obs = read_obs(cells_path) if obs is None else obs
    true = pd.Series(cell_labels(obs, split.info), index=obs.index).reindex(names)
    held_out = true.isin(split.labels(TEST)).to_numpy()
    if held_out.any():
        cell = names[held_out][0]
        raise LeakageError(
            f"{pairs_path}: {held_out.sum()} cell(s) of test perturbations were read by training, such as "
            f"{cell} of {true[cell]}. {_REMAKE}"
        )
    wrong = (true.to_numpy() != carried) | true.isna().to_numpy()
    if wrong.any():
        place = int(np.flatnonzero(wrong)[0])
        own: object = "in it at all" if pd.isna(true.iloc[place]) else true.iloc[place]
        raise LeakageError(
            f"{pairs_path}: {wrong.sum()} cell(s) carry another label than in {cells_path}, such as "
            f"{names[place]}: {carried[place]}, not {own}. {_REMAKE}"
        )
    return [
        sentinel(
            f"fold {split.fold}: no cell that training read belongs to a test perturbation",
            True,
            f"{len(names)} cells of pairs.h5 compared with cells.h5ad one by one",
        )
    ]


def check_sets(pairs_path: str | Path, split: FoldSplit) -> list[dict[str, Any]]:
    """Compare the sets in ``pairs.h5``, which decide what trains and what stops, with ``split.tsv``.

    Raises
    ------
    LeakageError
        Naming a label that is in another set, or in one of the two files alone.
    """
    with h5py.File(pairs_path, "r") as file:
        carried = pd.Series(file["names/sets"].asstr()[:], index=file["names/labels"].asstr()[:])
    frozen = split.table[SET]
    labels = frozen.index.union(carried.index)
    there, here = carried.reindex(labels), frozen.reindex(labels)
    wrong = labels[(there != here).to_numpy()]
    if len(wrong):
        label = next((name for name in wrong if here[name] == TEST), wrong[0])
        raise LeakageError(
            f"{pairs_path}: {len(wrong)} perturbation(s) are in another set than in {split.path}, such as "
            f"{label}: {there[label]}, not {here[label]}; early stopping and selection would use it so. "
            f"{_REMAKE}"
        )
    counts = frozen.value_counts()
    return [
        sentinel(
            f"fold {split.fold}: training, early stopping and selection have the sets of split.tsv",
            True,
            ", ".join(f"{counts.get(name, 0)} {name}" for name in ("train", "val", "test")),
        )
    ]


def check_gene_selection(
    pairs_paths: Sequence[str | Path],
    cells_path: str | Path,
    splits: Sequence[FoldSplit],
    obs: pd.DataFrame | None = None,
) -> list[dict[str, Any]]:
    """Choose each fold's genes again, on its training cells and controls, and compare with ``pairs.h5``.

    Within batches where the file says that they were ranked so.

    One pass over the cells for all folds; none where every gene was kept. ``obs`` as in
    :func:`check_training_cells`.

    Raises
    ------
    LeakageError
        Naming genes that the training cells do not choose, or choose and the file lacks.
    """
    obs = read_obs(cells_path) if obs is None else obs
    with h5py.File(cells_path, "r") as file:
        measured = np.asarray(ad.io.read_elem(file["var"]).index, dtype=str)
        found, codings = {}, []
        chosen: list[tuple[str | Path, FoldSplit, bool]] = []
        for path, split in zip(pairs_paths, splits, strict=True):
            with h5py.File(path, "r") as pairs:
                genes, by_batch = (
                    pairs["names/genes"].asstr()[:],
                    bool(pairs.attrs.get(GENES_BY_BATCH, False)),
                )
                # Flags may have left cells of training perturbations out; none that is not there had a say.
                there = obs.index.isin(pairs["names/cell_names"].asstr()[:])
            found[split.fold] = genes
            if set(genes) == set(measured):
                continue
            training = there & np.isin(cell_labels(obs, split.info), [*split.labels(TRAIN), CONTROL])
            batches = batches_that_choose(obs[BATCH].astype(str).to_numpy(), training) if by_batch else None
            chosen.append((path, split, batches is not None))
            codings.append(np.where(training, 0, -1) if batches is None else batches)
        moments = gene_moments_of_codes(file["X"], codings, len(measured)) if chosen else []
    for (path, split, by_batch), (mean, variance) in zip(chosen, moments, strict=True):
        perturbed = {gene for label in split.table.index for gene in genes_of(label)}
        genes, always = found[split.fold], np.isin(measured, sorted(perturbed))
        if by_batch:
            own = measured[select_genes_by_batch(mean, variance, len(genes), always)]
        else:
            own = measured[select_genes(mean[0], variance[0], len(genes), always)]
        extra, lost = sorted(set(genes) - set(own)), sorted(set(own) - set(genes))
        if extra or lost:
            raise LeakageError(
                f"{path}: its {len(genes)} genes are not those that the training cells of {split.path} "
                f"choose: {len(extra)} in excess ({', '.join(extra[:5])}), {len(lost)} missing "
                f"({', '.join(lost[:5])}), so that other cells had a say. {_REMAKE}"
            )
    counts = ", ".join(f"fold {fold}: {len(genes)}" for fold, genes in found.items())
    kept = len(splits) - len(chosen)
    detail = f"genes: {counts}, of {len(measured)}"
    if kept:
        detail += f"; {kept} of {len(splits)} folds keep every gene, so that nothing was chosen there"
    return [
        sentinel(
            "the genes are those that training cells and controls alone choose, chosen again", True, detail
        )
    ]


def check_origins(pairs_paths: Sequence[str | Path]) -> list[dict[str, Any]]:
    """Say what the prior codes of every fold were made from; nothing is known of files without the record.

    That responses in another screen come from other cells is checked, cell by cell, when ``pairs.h5`` is
    made; what the author of a network or a table made it from, no file says.
    """
    kinds: dict[str, str] = {}
    for path in pairs_paths:
        with h5py.File(path, "r") as file:
            origins = json.loads(file.attrs.get(SOURCES, "{}"))
            for name in file.get("codes", {}):
                kinds[name] = origins.get(name, {}).get("kind", "")
    if not kinds:
        return [sentinel("prior codes: none", True, "this dataset names no prior source")]
    unknown = [name for name, kind in kinds.items() if not kind]
    return [
        sentinel(
            "prior codes: it is on record what every source was read from",
            None if unknown else True,
            "; ".join(f"{name}: {kind or 'not recorded'}" for name, kind in sorted(kinds.items())),
            STATED,
        )
    ]


def check_declared(files: Iterable[PredictionFile], split: FoldSplit) -> list[dict[str, Any]]:
    """Compare what the models of a fold say they were trained and selected on with what it tests.

    Positive controls see test cells on purpose and are left out.

    Returns
    -------
    The outcome; models that say nothing are named in a line of their own, which is neither passed nor
    failed.

    Raises
    ------
    LeakageError
        Naming the model's file and a test perturbation that trained it, or by which it was selected.
    """
    tested, declared, silent = set(split.labels(TEST)), 0, set()
    counts: dict[str, int] = {TRAINED_ON: 0, SELECTED_ON: 0}
    for file in files:
        if file.path == FROM_CELLS or file.model in POSITIVE_CONTROLS:
            continue
        provenance = _provenance(file.path)
        if TRAINED_ON not in provenance:
            silent.add(file.model)
            continue
        declared += 1
        for key, what in ((TRAINED_ON, "was trained on"), (SELECTED_ON, "was selected or stopped by")):
            labels = _labels(provenance.get(key, []), split, f"{file.path}, uns['provenance'], {key}")
            leaked = sorted(tested & labels)
            if leaked:
                raise LeakageError(
                    f"{file.path}: {file.model} {what} {len(leaked)} test perturbation(s) of {split.path}: "
                    f"{', '.join(leaked[:10])}. Fix: train it on this split"
                )
            counts[key] = max(counts[key], len(labels))
    rows = []
    if declared:
        rows.append(
            sentinel(
                f"fold {split.fold}: no model was trained, stopped or selected on a test perturbation, "
                "as far as they declare",
                True,
                f"{declared} files; trained on at most {counts[TRAINED_ON]} perturbations and selected by at "
                f"most {counts[SELECTED_ON]}, none of the {len(tested)} that are tested",
                STATED,
            )
        )
    if silent:
        rows.append(
            sentinel(
                f"fold {split.fold}: what trained these models is not declared",
                None,
                f"{', '.join(sorted(silent))}; their files hold no list {TRAINED_ON!r} in uns['provenance']",
                STATED,
            )
        )
    return rows


def _provenance(path: Path) -> dict[str, Any]:
    """Read ``uns["provenance"]`` of a predictions file; empty where there is none."""
    with h5py.File(path, "r") as file:
        stored = ad.io.read_elem(file["uns/provenance"]) if "uns/provenance" in file else "{}"
    content = json.loads(str(stored))
    return content if isinstance(content, dict) else {}


def _labels(values: Any, split: FoldSplit, where: str) -> set[str]:
    """Return declared labels as the split spells them."""
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise InputError(where, repr(values)[:80], "a list of perturbations", "write a list of labels")
    return {spell_label(value, split.table.index) for value in values}
