"""What is said of cells, guides and perturbations once the cells are written.

One pass over the expression serves effects, scores in principal components and the cell cycle; one more,
over the blocks that hold them, places cells of strong perturbations that were not sampled.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from biojepa.contracts import (
    CONTROL,
    FLAG_DISCORDANT_GUIDE,
    FLAG_NON_RESPONDING,
    GUIDE_ID,
    PERTURBATION,
    RESPONDING_POSTERIOR,
)
from biojepa.preprocess.cell_cycle import (
    GENES_FILE,
    CellCycle,
    cell_cycle_note,
    enough_genes,
    read_cell_cycle_genes,
)
from biojepa.preprocess.effects import JOIN, SIGNIFICANT, Effects, sample_rows
from biojepa.preprocess.guide_agreement import (
    differing,
    discordant_guides,
    guide_table,
    guides_of,
    sampled_guides,
)
from biojepa.preprocess.responding import CONTROL_CELLS, MIN_CHANGED_GENES, NON_RESPONDING, Responding
from biojepa.preprocess.settings import PreprocessSettings
from biojepa.raw.matrix import RowBlocks

log = logging.getLogger(__name__)

GUIDES_DISAGREE = "guides_disagree"


@dataclass
class Described:
    """What is known of the cells that were kept.

    Parameters
    ----------
    perturbations, guides
        Rows of perturbations.tsv and of guides.tsv.
    columns
        Columns of ``obs``, by name.
    notes
        What a reader of the provenance should know.
    """

    perturbations: pd.DataFrame
    guides: pd.DataFrame
    columns: dict[str, np.ndarray | pd.Categorical] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def describe_screen(
    obs: pd.DataFrame,
    genes: pd.Index,
    effects: Effects,
    expression: RowBlocks,
    settings: PreprocessSettings,
    cell_cycle_genes: str | Path = GENES_FILE,
) -> Described:
    """Describe the cells that were added to ``effects``, in one or two passes over them.

    Parameters
    ----------
    obs
        Of all cells.
    genes
        ``(genes,)`` symbols of the columns.
    effects
        To which all cells were added.
    expression
        The same cells, to be read again.
    settings
        What is wanted, sizes of samples, seed.
    cell_cycle_genes
        Table of the genes of S and G2/M.
    """
    marks = read_cell_cycle_genes(genes, cell_cycle_genes) if settings.cell_cycle else None
    cycle, notes = _cell_cycle(genes, marks, effects, len(obs))
    guides = guides_of(obs)
    compared = sampled_guides(guides, effects.sample, settings)
    control = np.union1d(
        effects.sample[CONTROL],
        sample_rows(effects.control, CONTROL_CELLS, settings.seed, "responding cells"),
    )
    also = [rows for rows_of in compared.values() for rows in rows_of.values()]
    perturbations, scores = effects.describe(expression, control, also, [cycle] if cycle else [])
    columns: dict[str, np.ndarray | pd.Categorical] = dict(cycle.columns()) if cycle else {}
    columns.update(effects.flag_cells(perturbations))

    weak = effects.weak_guides
    table = guide_table(guides, compared, scores, control, effects.target, weak, perturbations, settings)
    discordant = discordant_guides(table)
    columns[FLAG_DISCORDANT_GUIDE] = _carries(obs, discordant)
    disagree = perturbations[PERTURBATION].isin(set(table.loc[differing(table), PERTURBATION]))
    perturbations["flag"] = [
        JOIN.join(filter(None, [flag, GUIDES_DISAGREE if differ else ""]))
        for flag, differ in zip(perturbations["flag"], disagree, strict=True)
    ]
    if settings.responding_cells:
        clear = (perturbations["effect_q"] < SIGNIFICANT) & (perturbations["n_deg"] >= MIN_CHANGED_GENES)
        rows_of = {str(name): effects.rows[name] for name in perturbations.loc[clear, PERTURBATION]}
        responding = Responding(rows_of, effects.sample, control, scores, len(obs), settings.seed)
        responding.place_others(expression)
        posterior, shares = responding.posteriors()
        columns[RESPONDING_POSTERIOR] = posterior
        columns[FLAG_NON_RESPONDING] = posterior < NON_RESPONDING  # NaN is not
        perturbations["responding_share"] = perturbations[PERTURBATION].map(shares).astype(np.float64)
    return Described(perturbations, table, columns, notes)


def _cell_cycle(
    genes: pd.Index, marks: dict[str, list[str]] | None, effects: Effects, n_cells: int
) -> tuple[CellCycle | None, list[str]]:
    """Return what scores the cell cycle, where it is wanted and can be, and what there is to say of it."""
    if marks is None:
        return None, []
    note = cell_cycle_note(marks)
    log.info("%s", note)
    if not enough_genes(marks):
        return None, [note]
    return CellCycle(genes, marks, effects.mean_expression(), n_cells), [note]


def _carries(obs: pd.DataFrame, guides: dict[str, set[str]]) -> np.ndarray:
    """Tell which cells ``(cells,)`` carry one of the guides listed for their perturbation, and no other."""
    pairs = pd.MultiIndex.from_arrays([obs[PERTURBATION].astype(str), obs[GUIDE_ID].astype(str)])
    listed = [(label, guide) for label, names in guides.items() for guide in names]
    return np.asarray(pairs.isin(listed)) if listed else np.zeros(len(obs), dtype=bool)
