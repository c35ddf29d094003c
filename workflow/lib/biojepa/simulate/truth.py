"""The truth of a simulated screen as tables, for tests; no stage of the pipeline reads it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict

import anndata as ad
import numpy as np
import pandas as pd

from biojepa.contracts import CONTROL, GENE_SEPARATOR, N_CELLS, N_PERTURBED_GENES
from biojepa.simulate.cells import SINGLET, STATUSES, TWO_GUIDES
from biojepa.simulate.design import Screen
from biojepa.simulate.responses import perturbation_labels
from biojepa.simulate.settings import N_MITOCHONDRIAL

CELL_COLUMNS = ("barcode", "perturbation", "guides", "status", "weak_guide")
FULL_EFFICACY = "full_efficacy"


def true_log_fold_changes(screen: Screen, condition: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the true log fold change (natural) of a condition, shape ``(genes,)`` twice.

    First the log of the mean fold change over its guides (their pairs, for a combination), which is
    what the mean of its cells shows; then that of a cell whose guides have full efficacy.

    Parameters
    ----------
    condition
        1 for the first single, counting on through the combinations.
    """
    responses, guides = screen.responses, screen.guides
    pair = condition - 1 - len(responses.targets)
    first, second, factor = condition - 1, -1, 1.0
    if pair >= 0:
        first, second = responses.pairs[pair]
        factor = responses.interaction[pair]
    of_first = guides.efficacy[guides.target == first]
    of_second = guides.efficacy[guides.target == second] if pair >= 0 else np.zeros(1)
    efficacy = np.stack(np.meshgrid(of_first, of_second), -1).reshape(-1, 2)
    efficacy = np.vstack([efficacy, [[1.0, 1.0]]])
    n = len(efficacy)
    change = responses.log_fold_change(
        np.full(n, first), np.full(n, second), efficacy, np.full(n, float(factor))
    )
    return np.log(np.exp(change[:-1].astype(float)).mean(0)), change[-1]


def truth_of_perturbations(screen: Screen) -> ad.AnnData:
    """Return one row per perturbation: ``X`` its true log fold change (natural) per gene.

    ``layers["full_efficacy"]`` is that of perfect guides; ``obs`` has the cells (singlets with
    captured guides), the strength, and the interaction of a combination with its factor; ``var``
    the parameters of each gene; ``uns`` the settings, the guides' efficacy and each single's
    coordinates in the space of programmes (``varm["loadings"]``).
    """
    genes, responses, plan = screen.genes, screen.responses, screen.plan
    n_singles, n_pairs = len(responses.targets), len(responses.pairs)
    changes = [true_log_fold_changes(screen, index + 1) for index in range(n_singles + n_pairs)]
    singlet = plan.status[: plan.n_barcodes] == SINGLET
    cells = np.bincount(plan.condition[: plan.n_barcodes][singlet], minlength=n_singles + n_pairs + 1)
    kind = np.array(["buffering", "additive", "synergy"])[np.sign(responses.interaction - 1).astype(int) + 1]
    obs = pd.DataFrame(
        {
            N_PERTURBED_GENES: np.repeat([1, 2], [n_singles, n_pairs]),
            N_CELLS: cells[1:],
            "strength": np.append(responses.strength, np.full(n_pairs, np.nan)),
            "strength_class": pd.Categorical([*responses.strength_class, *[""] * n_pairs]),
            "interaction": pd.Categorical([*[""] * n_singles, *kind]),
            "interaction_factor": np.append(np.ones(n_singles), responses.interaction),
        },
        index=perturbation_labels(genes, responses),
    )
    outside = np.zeros(N_MITOCHONDRIAL, dtype=int)
    var = pd.DataFrame(
        {
            "share": genes.share,
            "dispersion": genes.dispersion,
            "module": np.append(screen.network.module + 1, outside),
            "is_hub": np.append(screen.network.is_hub, outside.astype(bool)),
        },
        index=genes.names,
    )
    truth = ad.AnnData(np.array([mean for mean, _ in changes], dtype=np.float32), obs=obs, var=var)
    truth.layers[FULL_EFFICACY] = np.array([full for _, full in changes], dtype=np.float32)
    truth.varm["loadings"] = responses.loadings.T
    truth.uns["programme"] = responses.programme
    truth.uns["settings"] = json.dumps(asdict(screen.settings), sort_keys=True)
    truth.uns["guide_names"] = screen.guides.names
    truth.uns["guide_efficacy"] = screen.guides.efficacy
    return truth


def truth_of_cells(screen: Screen, rows: int = 50_000) -> Iterator[pd.DataFrame]:
    """Yield what each barcode holds, ``rows`` barcodes at a time, columns ``CELL_COLUMNS``.

    ``perturbation`` joins all genes whose guides the droplet holds (both cells of a doublet);
    ``guides`` joins their guides by ``;``, captured or not; ``weak_guide`` says whether one of them
    is weak.
    """
    plan, guides = screen.plan, screen.guides
    labels = np.array([CONTROL, *perturbation_labels(screen.genes, screen.responses)], dtype=object)
    for start in range(0, plan.n_barcodes, rows):
        cells = np.arange(start, min(start + rows, plan.n_barcodes))
        perturbation = labels[plan.condition[cells]]
        mixed = (plan.status[cells] == TWO_GUIDES) | (plan.partner[cells] >= 0)
        for row in np.flatnonzero(mixed):
            perturbation[row] = _label(screen, _carried(screen, int(cells[row])))
        carried = [_carried(screen, int(cell)) for cell in cells]
        yield pd.DataFrame(
            {
                "barcode": screen.barcodes[cells],
                "perturbation": perturbation,
                "guides": [";".join(guides.names[held]) for held in carried],
                "status": np.array(STATUSES)[plan.status[cells]],
                "weak_guide": [bool(guides.is_weak[held].any()) for held in carried],
            },
            columns=list(CELL_COLUMNS),
        )


def _carried(screen: Screen, cell: int) -> np.ndarray:
    """Return the guides in a cell's droplet."""
    plan = screen.plan
    held = plan.guide[cell]
    if plan.partner[cell] >= 0:
        held = np.concatenate([held, plan.guide[plan.partner[cell]]])
    return held[held >= 0]


def _label(screen: Screen, held: np.ndarray) -> str:
    targets = screen.guides.target[held]
    names = screen.genes.names[screen.responses.targets[targets[targets >= 0]]]
    return GENE_SEPARATOR.join(np.unique(names)) or CONTROL
