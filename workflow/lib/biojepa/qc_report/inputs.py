"""What the page of quality control is made of, checked when it is put together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from biojepa import contracts
from biojepa.guides.settings import GuideAssignment
from biojepa.report.inputs import require_columns

MAP_COLUMNS = ("umap_1", "umap_2", contracts.PERTURBATION, contracts.BATCH, contracts.LIBRARY_SIZE)
# Columns that not every version of preprocess writes; shown where they are.
RESPONDING_SHARE = "responding_share"


@dataclass(frozen=True)
class CellFacts:
    """What the cells that were kept say, one number or a short table each.

    Attributes
    ----------
    n_cells, n_controls, n_genes
        Kept cells, controls among them, and genes of the matrix.
    medians
        Median over kept cells of ``library_size``, ``n_genes``, ``pct_mito``; NaN where not known.
    types
        Types of perturbation that occur, without ``unknown``.
    batches
        Indexed by batch: ``cells`` and ``controls``.
    in_one_batch
        Perturbations all of whose cells are in one batch though chance would have spread them.
    flags
        Cells that carry each flag of cells, by its column.
    phases
        Cells by phase of the cell cycle; empty where it was not scored.
    """

    n_cells: int
    n_controls: int
    n_genes: int
    medians: Mapping[str, float]
    types: tuple[str, ...]
    batches: pd.DataFrame
    in_one_batch: tuple[str, ...] = ()
    flags: Mapping[str, int] = field(default_factory=dict)
    phases: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class QcInputs:
    """Everything that the page shows, for one dataset.

    Attributes
    ----------
    dataset
        Name of the screen.
    qc, perturbations, guides, guide_calls, guides_per_cell, guide_umis, batches, distributions
        Tables of ``preprocess``.
    cells
        What the kept cells say.
    cell_map
        ``umap_1, umap_2, perturbation, batch, library_size`` of a sample of cells, and columns of
        quality where the cells have them; None where there is no map.
    settings
        Section ``preprocess`` of the config.
    provenance
        Shown as it is.
    reports
        Title and address, relative to the page, of the reports of the dataset.
    files
        Names of the tables beside the page.

    Raises
    ------
    InputError
        When a table lacks a column.
    """

    dataset: str
    qc: pd.DataFrame
    perturbations: pd.DataFrame
    guides: pd.DataFrame
    guide_calls: pd.DataFrame
    guides_per_cell: pd.DataFrame
    guide_umis: pd.DataFrame
    batches: pd.DataFrame
    distributions: pd.DataFrame
    cells: CellFacts
    cell_map: pd.DataFrame | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    reports: Mapping[str, str] = field(default_factory=dict)
    files: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        wanted: dict[str, tuple[str, ...]] = {
            "qc": contracts.QC_COLUMNS,
            "perturbations": contracts.PERTURBATION_TABLE_COLUMNS,
            "guide_calls": contracts.GUIDE_CALLS_COLUMNS,
            "guides_per_cell": contracts.GUIDES_PER_CELL_COLUMNS,
            "guide_umis": contracts.GUIDE_UMIS_COLUMNS,
            "batches": contracts.BATCHES_COLUMNS,
            "distributions": contracts.DISTRIBUTIONS_COLUMNS,
            "cell_map": MAP_COLUMNS,
            "guides": contracts.GUIDE_TABLE_COLUMNS,
        }
        for name, columns in wanted.items():
            table = getattr(self, name)
            if table is not None:
                require_columns(table, columns, f"QC page of {self.dataset}, {name}")

    @property
    def min_cells(self) -> int | None:
        """Fewest cells of a perturbation that was kept, by the config."""
        value = self.settings.get("min_cells_per_perturbation")
        return None if value is None else int(value)

    @property
    def assignment(self) -> GuideAssignment | None:
        """Rule by which guides were called; None where the settings do not say."""
        section = self.settings.get("guide_assignment")
        return None if section is None else GuideAssignment(**section)
