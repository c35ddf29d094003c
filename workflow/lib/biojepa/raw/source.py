"""What the dataset table says about one screen."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from biojepa.contracts import GENE_SEPARATOR, PERTURBATION_TYPES
from biojepa.errors import InputError

FORMATS = ("auto", "h5ad", "10x_mtx", "10x_h5")


@dataclass(frozen=True)
class ScreenSource:
    """One row of ``config/datasets.tsv``: where a screen is and what its columns are called.

    An empty field means "not given". Columns are looked up in ``obs`` after ``cell_metadata``
    was joined to it.

    Parameters
    ----------
    dataset
        Name of the screen, as in the paths of the results.
    path
        Local file (``h5ad``, ``10x_h5``) or folder (``10x_mtx``, ``10x_h5``), of one sample or several.
    format
        ``h5ad``, ``10x_mtx`` (matrix.mtx, features.tsv, barcodes.tsv, each plain or ``.gz``),
        ``10x_h5`` (feature_bc_matrix.h5) or ``auto``: by what is at ``path``.
    perturbation_column
        Column with the perturbation of each cell. Empty: guides are called from the guide counts
        in the matrix, or taken from ``guide_column`` and translated by ``guide_table``.
    control_label
        Label (or guide target) of control cells; several are joined by ``;``. Empty: any of the
        usual names (ctrl, control, non-targeting, NT, ...).
    separator
        What joins the genes of a combination in the file. Empty: ``+``.
    guide_column
        Column with the guide of each cell.
    batch_column
        Column with the batch (GEM group, replicate, lane). Filters by MAD, doublet scores
        and comparisons of guides work within it. Empty: the sample, where a folder has several.
    cell_type_column
        Column with the cell type or cell line.
    library_size_column
        Column with the UMIs of each cell over its whole transcriptome; needed when the file holds
        a panel of genes. Empty: the sum over all genes in the file.
    mito_column
        Column with the mitochondrial share, as a fraction or in percent (told apart by whether
        any cell exceeds 1). Empty: computed from genes called ``MT-`` where five or more are there.
    gene_column
        Column of ``var`` with gene symbols. Empty: the index of ``var``, or, where that holds Ensembl ids or
        numbers, a column with one of the usual names.
    perturbation_type
        CRISPRi, CRISPRa, CRISPRko or unknown, for the whole screen.
    cell_metadata
        CSV or TSV with one row per cell (column ``barcode`` or ``cell_barcode``, else the first).
        Barcodes without a row are no cells of the screen.
    guide_table
        CSV or TSV with columns ``guide`` and ``target``, or Cell Ranger's feature reference.
    guide_counts
        Guide counts that lie apart from the genes: a 10x matrix or a table, see
        :func:`biojepa.raw.guide_files.read_guide_counts`.
    guide_calls
        Cell Ranger's protospacer_calls_per_cell.csv, or a table of that form.
    counts_layer
        Where the raw counts are: ``X``, ``raw`` or the name of a layer. Empty: the first of X,
        layer ``counts``, other layers, ``raw`` that holds whole numbers.
    label_pattern
        Regular expression whose matches are removed from labels, such as ``g[0-9]+$`` to get from
        STAT1g2 to STAT1.
    """

    dataset: str
    path: str
    format: str = "auto"
    perturbation_column: str = ""
    control_label: str = ""
    separator: str = ""
    guide_column: str = ""
    batch_column: str = ""
    cell_type_column: str = ""
    library_size_column: str = ""
    mito_column: str = ""
    gene_column: str = ""
    perturbation_type: str = ""
    cell_metadata: str = ""
    guide_table: str = ""
    guide_counts: str = ""
    guide_calls: str = ""
    counts_layer: str = ""
    label_pattern: str = ""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            # Tables give None or NaN for an empty field; a Path is welcome for a path.
            empty = value is None or value != value
            object.__setattr__(self, field.name, "" if empty else str(value))
        if not self.separator:
            object.__setattr__(self, "separator", GENE_SEPARATOR)
        if not self.format:
            object.__setattr__(self, "format", "auto")
        if not self.perturbation_type:
            object.__setattr__(self, "perturbation_type", "unknown")
        where = f"dataset table, row {self.dataset!r}"
        if self.format not in FORMATS:
            raise InputError(
                f"{where}, column format", repr(self.format), " or ".join(FORMATS), "use one of them"
            )
        if self.perturbation_type not in PERTURBATION_TYPES:
            raise InputError(
                f"{where}, column perturbation_type",
                repr(self.perturbation_type),
                " or ".join(PERTURBATION_TYPES),
                "use one of them, or leave it empty",
            )

        try:
            re.compile(self.label_pattern)
        except re.error as error:
            raise InputError(
                f"{where}, column label_pattern",
                f"{self.label_pattern!r} ({error})",
                "a regular expression",
                "correct it, or leave it empty",
            ) from error

    @property
    def columns_in(self) -> str:
        """Where its columns of cells are looked for, for messages.

        A 10x matrix has none of its own beside the sample: the table of cells is named alone.
        """
        if not self.cell_metadata:
            return self.path
        has_own = self.format == "h5ad" or self.path.endswith(".h5ad")
        return f"{self.path} and {self.cell_metadata}" if has_own else self.cell_metadata

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> ScreenSource:
        """Build a source from a row of the table; keys of other stages are left aside."""
        names = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in values.items() if key in names})
