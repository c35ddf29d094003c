"""Settings of the preprocess stage: the section ``preprocess`` of the config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from biojepa.errors import InputError
from biojepa.guides import GuideAssignment

DOUBLET_METHODS = ("none", "scrublet")


@dataclass(frozen=True)
class PreprocessSettings:
    """How cells are filtered, normalized and described.

    Parameters
    ----------
    target_sum
        Counts are scaled to this many per cell before log1p.
    min_counts
        Fewest UMIs of a cell (its library size). Raise to 500-1000 for whole transcriptomes.
    min_genes
        Fewest genes detected in a cell, among the genes of the file.
    max_pct_mito
        Largest mitochondrial share in percent. None: no fixed limit.
    mad_threshold
        Cells farther than this many median absolute deviations (unscaled) from the median of
        their batch are dropped: both sides for log1p library size and log1p detected genes, the
        upper side for the mitochondrial share. Batches of fewer than 50 cells take the limits of
        all cells. None: off.
    min_cells_per_perturbation
        Perturbations with fewer cells are dropped, which also removes guide combinations that met
        by accident. The control needs as many.
    min_cells_per_gene
        Genes detected in fewer of the cells that are left are dropped, but for perturbed genes that are
        detected in any.
    doublets
        ``none`` or ``scrublet`` (per batch, one of more than 50,000 cells in random parts; about 10 s per
        10,000 cells).
    doublet_threshold
        Scrublet score from which a cell is a doublet. None: chosen by Scrublet, needs scikit-image.
    guide_assignment
        How guides are called where the file has guide counts and no labels.
    permutations
        Permutations of the effect size test; its smallest p-value is 1/(permutations + 1).
    effect_cells
        Most cells of a perturbation, and of the control, in the effect size.
    effect_components
        Principal components in which effect sizes are measured.
    cell_cycle
        Whether to score S phase and G2/M, where the screen has five genes or more of each.
    min_cells_per_guide
        Fewest cells of a guide for it to be compared with the other guides of its perturbation,
        or called weak.
    min_guides_per_perturbation
        Perturbations with fewer guides carry flag_few_guides, which removes nothing by itself.
    responding_cells
        Whether to tell, for perturbations with a clear effect, which cells respond.
    seed
        Seed of doublet simulation, subsampling and permutations.
    """

    target_sum: float = 10_000.0
    min_counts: int = 1
    min_genes: int = 1
    max_pct_mito: float | None = 20.0
    mad_threshold: float | None = 5.0
    min_cells_per_perturbation: int = 25
    min_cells_per_gene: int = 10
    doublets: str = "none"
    doublet_threshold: float | None = None
    guide_assignment: GuideAssignment = field(default_factory=GuideAssignment)
    permutations: int = 1000
    effect_cells: int = 200
    effect_components: int = 50
    cell_cycle: bool = True
    min_cells_per_guide: int = 20
    min_guides_per_perturbation: int = 1
    responding_cells: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.doublets not in DOUBLET_METHODS:
            raise InputError(
                "config, preprocess.doublets",
                repr(self.doublets),
                " or ".join(DOUBLET_METHODS),
                "use one of them",
            )
        lowest = {
            "target_sum": 1e-9,
            "min_counts": 0,
            "min_genes": 0,
            "max_pct_mito": 0,
            "mad_threshold": 1e-9,
            "min_cells_per_perturbation": 2,
            "min_cells_per_gene": 0,
            "doublet_threshold": 0,
            "permutations": 1,
            "effect_cells": 2,
            "effect_components": 1,
            "min_cells_per_guide": 2,
            "min_guides_per_perturbation": 0,
            "seed": 0,
        }
        for name, low in lowest.items():
            value = getattr(self, name)
            # Written so that NaN fails as well.
            if value is not None and not value >= low:
                what = "a positive number" if low == 1e-9 else f"{low} or more"
                raise InputError(f"config, preprocess.{name}", str(value), what, "raise it")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> PreprocessSettings:
        """Build settings from the section of the config, refusing unknown keys."""
        given = dict(values)
        calls = given.get("guide_assignment", {})
        for section, keys, known in (
            ("preprocess", given, {f.name for f in fields(cls)}),
            (
                "preprocess.guide_assignment",
                calls if isinstance(calls, Mapping) else {},
                {f.name for f in fields(GuideAssignment)},
            ),
        ):
            if unknown := sorted(set(keys) - known):
                raise InputError(
                    f"config, {section}",
                    f"unknown key {unknown[0]!r}",
                    ", ".join(sorted(known)),
                    "correct its spelling",
                )
        if isinstance(calls, Mapping):
            given["guide_assignment"] = GuideAssignment(**calls)
        return cls(**given)
