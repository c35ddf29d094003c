"""Settings of the evaluation: the config section ``evaluate``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from biojepa.errors import InputError

SIMPLE_BASELINES = (
    "no_change",
    "mean",
    "target_only",
    "additive",
    "matching_mean",
    "linear",
    "multihot",
    "ridge",
    "kernel_ridge",
    "knn",
    "mlp",
    "other_screen",
)
"""Models that a new one must beat: no learned embedding of cells, seconds to fit."""


@dataclass(frozen=True)
class EnrichmentSettings:
    """Gene-set enrichment of predicted and observed changes.

    Attributes
    ----------
    models
        Models to run it for, besides ``mean``, ``duplicate`` and the best baseline, which are always
        run where present, since they say what a value of the score means. Empty: the model under test.
    permutations
        Permutations behind a normalized enrichment score; 100 suffice to correlate scores.
    min_size, max_size
        Measured genes that a gene set must have.
    max_sets
        Gene sets kept at most: those with the most measured genes.
    max_perturbations
        Test perturbations scored at most: those with the most changed genes in half A, which the
        score never sees. Bounds the run time; 0 turns it off.
    seed
        Seed of the permutations.
    """

    models: tuple[str, ...] = ()
    permutations: int = 100
    min_size: int = 5
    max_size: int = 500
    max_sets: int = 50
    max_perturbations: int = 40
    seed: int = 0


@dataclass(frozen=True)
class DistributionSettings:
    """Comparison of predicted with observed single cells.

    Attributes
    ----------
    models
        Models to run it for, besides ``mean``, ``no_change``, ``duplicate``, the best baseline and the models
        that predict cells, which are always run where present. Empty: the model under test.
    max_cells
        Cells at most of each half of a perturbation, of the controls, and of each prediction.
    max_perturbations
        Test perturbations scored at most: those with the most changed genes in half A. 0 turns it off.
    seed
        Seed of the choice of cells.
    """

    models: tuple[str, ...] = ()
    max_cells: int = 100
    max_perturbations: int = 100
    seed: int = 0


@dataclass(frozen=True)
class EvaluationSettings:
    """How predictions are scored.

    Attributes
    ----------
    model
        Model under test: the one that the verdict speaks of.
    baselines
        Simple models; the best of them per category and metric is the one to beat.
    half_seed
        Seed of halves A and B; must be the one that the duplicate was made with.
    draws
        Bootstrap draws over perturbations.
    confidence
        Level of the confidence intervals.
    fdr
        Level at which a gene counts as differentially expressed, and a comparison as significant.
    min_perturbations
        Fewer test perturbations than this, and the verdict is that the dataset cannot tell.
    seed
        Seed of the bootstrap.
    enrichment
        Gene-set enrichment, run when gene sets are given.
    distribution
        Comparison of predicted with observed single cells.
    """

    model: str = "biojepa"
    baselines: tuple[str, ...] = SIMPLE_BASELINES
    half_seed: int = 0
    draws: int = 1000
    confidence: float = 0.95
    fdr: float = 0.05
    min_perturbations: int = 8
    seed: int = 0
    enrichment: EnrichmentSettings = field(default_factory=EnrichmentSettings)
    distribution: DistributionSettings = field(default_factory=DistributionSettings)

    @classmethod
    def from_mapping(cls, content: Mapping[str, Any] | None) -> EvaluationSettings:
        """Build the settings from the config section, refusing keys that do not exist.

        Raises
        ------
        InputError
            If a key is unknown or a value out of range.
        """
        content = dict(content or {})
        parts = {"enrichment": EnrichmentSettings, "distribution": DistributionSettings}
        nested = {
            key: part(**_checked(part, content.pop(key, None) or {}, f"evaluate.{key}"))
            for key, part in parts.items()
        }
        settings = _checked(cls, content, "evaluate")
        return cls(**{**settings, **nested})

    def __post_init__(self) -> None:
        """Refuse values that would give no interval."""
        for key, value, low, high in (
            ("confidence", self.confidence, 0.5, 0.9999),
            ("fdr", self.fdr, 1e-6, 0.5),
            ("draws", self.draws, 100, 1_000_000),
            ("min_perturbations", self.min_perturbations, 2, 10_000),
            ("enrichment.permutations", self.enrichment.permutations, 10, 1_000_000),
            ("distribution.max_cells", self.distribution.max_cells, 2, 10_000),
            ("distribution.max_perturbations", self.distribution.max_perturbations, 0, 1_000_000),
        ):
            if not low <= value <= high:
                raise InputError(
                    f"config, key evaluate.{key}",
                    str(value),
                    f"{low} to {high}",
                    "choose a value in this range",
                )


def _checked(cls: type, content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the content with lists as tuples, or name the unknown key."""
    known = {entry.name for entry in fields(cls)}
    for key in content:
        if key not in known:
            raise InputError(
                f"config, key {where}.{key}",
                "an unknown key",
                f"one of {sorted(known)}",
                "correct or remove it",
            )
    return {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}
