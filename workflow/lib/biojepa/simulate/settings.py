"""Settings of a simulated screen, and the parameters of real screens that it imitates."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from biojepa.errors import InputError

N_MITOCHONDRIAL = 13
PARAMETERS_FILE = Path(__file__).resolve().parents[4] / "resources" / "simulator.json"


@dataclass(frozen=True)
class SimulatorSettings:
    """Say what a simulated screen contains; every field is a config key.

    Parameters
    ----------
    n_cells
        Barcodes in the matrix, of all kinds.
    n_genes
        Measured genes, 13 mitochondrial ones (``MT-…``) among them.
    n_singles
        Genes perturbed on their own. They are measured genes.
    n_combinations
        Designed pairs of these genes; a cell of a pair carries one guide for each.
    n_batches
        Batches (lanes); each has its own depth and its own gene-wise factors.
    guides_per_gene
        Guides that target one gene.
    share_control
        Share of the cells whose guide is non-targeting, and of the guides that are.
    share_no_guide
        Share of the barcodes whose guide was not captured.
    share_two_guides
        Share that took up a second guide by accident (cells of single perturbations only).
    share_doublets
        Share of the barcodes that hold two cells.
    share_dying
        Share that are dying: mitochondrial share several times higher, shallow.
    share_weak_guides
        Share of the targeting guides that reach 5-30 % of the effect (the others 85-100 %).
    share_interactions
        Share of the combinations that are not additive in log space: partners of one module
        buffer (the sum is multiplied by 0.3-0.7), partners of two modules are synergistic (1.3-1.7).
    share_clear
        Share of the perturbed genes with a clear effect.
    share_weak
        Share of the perturbed genes with hardly any effect; the rest is between.
    effect_strength
        Multiplies all log fold changes but the knock-down itself.
    knock_down_log2
        log2 fold change of the perturbed gene itself under a guide of full efficacy.
    saturation
        Limit of a log fold change (natural log): ``saturation * tanh(change / saturation)``.
    n_modules
        Modules of the gene network.
    n_programmes
        Response programmes, the dimension of the space of responses.
    network_degree
        Mean number of neighbours of a gene.
    network_noise
        Share of the true edges left out of the file, and of spurious edges added to it.
    share_common
        Share of a response's squared length that all perturbations have in common.
    share_own
        Share of a response's variance that is the gene's own and follows from no network.
    cycle_strength
        Standard deviation of the log expression of a cell-cycle gene over the cycle.
    block_size
        Cells written at a time: bounds the memory and changes no number.
    seed
        Same seed and settings, same files.

    Raises
    ------
    InputError
        When a value is out of range, naming the key.
    """

    n_cells: int = 10_000
    n_genes: int = 1_000
    n_singles: int = 60
    n_combinations: int = 20
    n_batches: int = 3
    guides_per_gene: int = 3
    share_control: float = 0.10
    share_no_guide: float = 0.05
    share_two_guides: float = 0.03
    share_doublets: float = 0.04
    share_dying: float = 0.05
    share_weak_guides: float = 0.10
    share_interactions: float = 0.50
    share_clear: float = 0.50
    share_weak: float = 0.33
    effect_strength: float = 1.0
    knock_down_log2: float = -2.0
    saturation: float = 2.5
    n_modules: int = 12
    n_programmes: int = 12
    network_degree: float = 12.0
    network_noise: float = 0.10
    share_common: float = 0.15
    share_own: float = 0.10
    cycle_strength: float = 0.35
    block_size: int = 10_000
    seed: int = 0

    def __post_init__(self) -> None:
        for key in fields(self):
            self._check_number(key.name, whole=key.type == "int")
        for name, minimum in _MINIMUM.items():
            value = getattr(self, name)
            if value < minimum:
                raise _setting_error(name, f"{value}", f"{minimum} or more", f"raise {name}")
        for key in fields(self):
            value = getattr(self, key.name)
            is_share = key.name.startswith("share_") or key.name == "network_noise"
            if is_share and not 0 <= value <= 1:
                raise _setting_error(key.name, f"{value}", "a share between 0 and 1", "write 5 % as 0.05")
        self._check_totals()

    def _check_number(self, name: str, whole: bool) -> None:
        value = getattr(self, name)
        kinds = (int, np.integer) if whole else (int, float, np.integer, np.floating)
        if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value):
            expected = "a whole number" if whole else "a finite number"
            raise _setting_error(name, f"{value!r}", expected, f"write {_DEFAULTS[name]}, for example")

    def _check_totals(self) -> None:
        room = self.n_genes - N_MITOCHONDRIAL
        if self.n_singles > room // 2:
            raise _setting_error(
                "n_singles", f"{self.n_singles}", f"at most {room // 2}, half of the genes that are not "
                "mitochondrial", "raise n_genes or lower n_singles",
            )  # fmt: skip
        if self.n_modules > room // 4:
            raise _setting_error(
                "n_modules", f"{self.n_modules}", f"at most {room // 4} with {self.n_genes} genes",
                "raise n_genes or lower n_modules",
            )  # fmt: skip
        pairs = self.n_singles * (self.n_singles - 1) // 2
        if self.n_combinations > pairs:
            raise _setting_error(
                "n_combinations", f"{self.n_combinations}", f"at most {pairs}, the pairs that "
                f"{self.n_singles} genes form", "raise n_singles or lower n_combinations",
            )  # fmt: skip
        broken = self.share_no_guide + self.share_two_guides + self.share_doublets + self.share_dying
        strengths = self.share_clear + self.share_weak
        for names, total in ((_FATES, broken), ("share_clear, share_weak", strengths)):
            if total > 1:
                raise _setting_error(names, f"a sum of {total:g}", "at most 1", "lower one of them")

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> SimulatorSettings:
        """Build the settings from a section of a config file.

        Raises
        ------
        InputError
            For a key that is not a setting, with the nearest one that is.
        """
        for name in settings:
            if name not in _DEFAULTS:
                near = difflib.get_close_matches(name, _DEFAULTS, n=1)
                fix = f"did you mean {near[0]}?" if near else "remove it"
                raise _setting_error(name, "a key that is no setting", f"one of {', '.join(_DEFAULTS)}", fix)
        return cls(**settings)


_FATES = "share_no_guide, share_two_guides, share_doublets, share_dying"
_MINIMUM = {
    "n_cells": 1, "n_genes": 40, "n_singles": 1, "n_combinations": 0, "n_batches": 1, "guides_per_gene": 1,
    "n_modules": 1, "n_programmes": 1, "network_degree": 1, "effect_strength": 0, "saturation": 0.1,
    "cycle_strength": 0, "block_size": 1, "seed": 0,
}  # fmt: skip
_DEFAULTS = {key.name: key.default for key in fields(SimulatorSettings)}


def _setting_error(name: str, found: str, expected: str, fix: str) -> InputError:
    return InputError(f"config, download.simulator.{name}", found, expected, fix)


@dataclass(frozen=True)
class ScreenParameters:
    """Hold what was fitted on real screens (``benchmarks/fit_simulator.py``).

    Parameters
    ----------
    library_log_mean, library_log_sd
        Natural log of the UMIs of a cell over the whole transcriptome, within a batch.
    batch_depth_log_sd, batch_gene_log_sd
        Standard deviation over batches of the log library size, and of a gene's log mean.
    quantile_levels, log_cp10k_quantiles
        Quantile function of the natural log of a gene's mean counts per 10,000.
    dispersion_floor, dispersion_slope, dispersion_log_scatter
        A gene's negative binomial dispersion is ``(floor + slope / mean) * exp(scatter * N(0, 1))``,
        mean in UMIs per cell of average depth; the variance is ``mean + dispersion * mean**2``.
    mito_log_mean, mito_log_sd
        Natural log of the mitochondrial share of a cell.
    guide_signal_log_mean, guide_signal_log_sd
        Natural log of the UMIs of the guide that a cell carries.
    guide_background_mean, guide_background_dispersion
        UMIs of all other guides together: mean and negative binomial dispersion.
    zero_fraction
        Share of zeros that the fitted matrix has: not used, but checked.
    provenance
        Files, their SHA-256 and method of the fit.
    """

    library_log_mean: float
    library_log_sd: float
    batch_depth_log_sd: float
    batch_gene_log_sd: float
    quantile_levels: tuple[float, ...]
    log_cp10k_quantiles: tuple[float, ...]
    dispersion_floor: float
    dispersion_slope: float
    dispersion_log_scatter: float
    mito_log_mean: float
    mito_log_sd: float
    guide_signal_log_mean: float
    guide_signal_log_sd: float
    guide_background_mean: float
    guide_background_dispersion: float
    zero_fraction: float
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def mean_library(self) -> float:
        """Mean library size, UMIs over the whole transcriptome."""
        return math.exp(self.library_log_mean + self.library_log_sd**2 / 2)

    def dispersion(self, mean: np.ndarray) -> np.ndarray:
        """Return the dispersion of the trend at a mean (UMIs per cell of average depth)."""
        return self.dispersion_floor + self.dispersion_slope / np.maximum(mean, 1e-8)

    @classmethod
    def read(cls, path: str | Path = PARAMETERS_FILE) -> ScreenParameters:
        """Read the parameters from JSON.

        Raises
        ------
        InputError
            When the file is absent, is not JSON, or lacks a parameter.
        """
        path = Path(path)
        refit = "restore resources/simulator.json or make it again with benchmarks/fit_simulator.py"
        if not path.is_file():
            raise InputError(path, "no such file", "the simulator's fitted parameters", refit)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise InputError(path, f"text that is not JSON ({error})", "JSON", refit) from error
        names = [key.name for key in fields(cls)]
        missing = [name for name in names if name not in content]
        if missing:
            raise InputError(path, f"no {', '.join(missing)}", f"the keys {', '.join(names)}", refit)
        lists = {name: tuple(content[name]) for name in ("quantile_levels", "log_cp10k_quantiles")}
        return cls(**{name: lists.get(name, content[name]) for name in names})
