"""Fit the simulator's parameters on a real screen.

Question: which depth, gene means, dispersions, mitochondrial shares and guide UMIs does a real
CRISPR screen have? Method: moments and quantiles of the Papalexi et al. 2021 ECCITE-seq matrix
(a panel of its genes, with library sizes of the whole transcriptome). Units: UMIs, natural logs,
counts per 10,000.

Usage::

    python benchmarks/fit_simulator.py FOLDER [OUTPUT]

FOLDER holds ``papalexi2021_10x/`` with ``matrix.mtx.gz``, ``features.tsv.gz`` and ``cells.csv``
(columns ``replicate``, ``n_umis_all_genes``, ``p_mito``), and ``norman2019_tiny.h5ad`` (``obs``
columns ``perturbation``, ``total_counts_all``), which is compared and not fitted, because its
genes were chosen for their variability. OUTPUT defaults to ``resources/simulator.json``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse
from scipy.io import mmread
from scipy.optimize import least_squares

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "workflow" / "lib"))

from biojepa.files import sha256_of, write_json  # noqa: E402

SCREEN = "papalexi2021_10x"
COMPARED = "norman2019_tiny.h5ad"
FILES = ("matrix.mtx.gz", "features.tsv.gz", "cells.csv")
QUANTILE_LEVELS = (0, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.975, 0.99, 1)


def moment_dispersion(counts: np.ndarray, size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return means and negative binomial dispersions of genes by moments.

    Parameters
    ----------
    counts
        UMIs, shape ``(cells, genes)``.
    size
        Library size over its mean, shape ``(cells,)``.

    Returns
    -------
    mean, dispersion
        Of shape ``(genes,)``; the mean is that of a cell of size 1. The dispersion solves
        ``E[(x - s*mean)^2] = s*mean + dispersion * (s*mean)^2`` summed over cells; it is not a
        number for a gene without counts.
    """
    mean = counts.sum(0) / size.sum()
    expected = np.outer(size, mean)
    excess = ((counts - expected) ** 2 - expected).sum(0)
    square = (expected**2).sum(0)
    return mean, np.divide(excess, square, out=np.full_like(square, np.nan), where=square > 0)


def fit_trend(mean: np.ndarray, dispersion: np.ndarray) -> tuple[float, float, float]:
    """Fit ``log(floor + slope / mean)`` to log dispersions, robustly; returns also the scatter (MAD)."""
    kept = dispersion > 0
    log_dispersion = np.log(dispersion[kept])

    def residuals(logs: np.ndarray) -> np.ndarray:
        floor, slope = np.exp(logs)
        return np.log(floor + slope / mean[kept]) - log_dispersion

    fit = least_squares(residuals, x0=np.log([0.2, 0.05]), loss="soft_l1", f_scale=0.3)
    floor, slope = np.exp(fit.x)
    # Rarer genes scatter by sampling alone.
    common = mean[kept] >= 0.1
    scatter = 1.4826 * np.median(np.abs(residuals(fit.x)[common]))
    return float(floor), float(slope), float(scatter)


def batch_gene_sd(counts: np.ndarray, size: np.ndarray, batch: np.ndarray, dispersion: np.ndarray) -> float:
    """Return the standard deviation over batches of a gene's log mean, sampling variance taken off.

    Genes with at least 0.3 UMIs per cell; the delta-method variance of a log mean is
    ``(1/mean + dispersion) / cells``.
    """
    groups = [batch == name for name in np.unique(batch)]
    means = np.array([counts[rows].sum(0) / size[rows].sum() for rows in groups])
    kept = means.min(0) >= 0.3
    means, dispersion = means[:, kept], dispersion[kept]
    noise = np.array([(1 / row + dispersion) / rows.sum() for row, rows in zip(means, groups, strict=True)])
    variance = np.log(means).var(0, ddof=1) - noise.mean(0)
    return float(np.sqrt(max(np.median(variance), 0.0)))


def compare(path: Path, parameters: dict[str, Any]) -> dict[str, float]:
    """Return what another screen has for some of the fitted numbers.

    ``dispersion_over_trend`` is the median, over genes with 0.1 to 10 UMIs per control cell, of
    dispersion by the fitted trend.
    """
    screen = ad.read_h5ad(path)
    control = screen[screen.obs["perturbation"] == "control"]
    library = control.obs["total_counts_all"].to_numpy(float)
    counts = control.X.toarray() if sparse.issparse(control.X) else np.asarray(control.X)
    mean, dispersion = moment_dispersion(counts.astype(float), library / library.mean())
    kept = (mean >= 0.1) & (mean <= 10)
    trend = parameters["dispersion_floor"] + parameters["dispersion_slope"] / mean[kept]
    return {
        "library_log_mean": float(np.log(library).mean()),
        "library_log_sd": float(np.log(library).std()),
        "dispersion_over_trend": float(np.median(dispersion[kept] / trend)),
    }


def fit(folder: Path) -> dict[str, Any]:
    """Fit every parameter of the simulator on Papalexi et al., and compare with Norman et al."""
    parameters = fit_screen(folder / SCREEN)
    provenance = parameters["provenance"]
    provenance["sha256"][COMPARED] = sha256_of(folder / COMPARED)
    provenance["compared"] = {f"{COMPARED}, control cells": compare(folder / COMPARED, parameters)}
    return parameters


def fit_screen(folder: Path) -> dict[str, Any]:
    """Fit depth, genes, dispersion, mitochondrial share and guide UMIs on a 10x matrix."""
    matrix = mmread(folder / FILES[0]).tocsr()
    kinds = pd.read_csv(folder / FILES[1], sep="\t", header=None)[2].to_numpy()
    cells = pd.read_csv(folder / FILES[2])
    counts = matrix[kinds == "Gene Expression"].T.toarray().astype(float)
    guides = matrix[kinds == "CRISPR Guide Capture"].T.toarray()

    library = cells["n_umis_all_genes"].to_numpy(float)
    batch = cells["replicate"].to_numpy()
    log_library = pd.Series(np.log(library)).groupby(batch)
    size = library / library.mean()
    mean, dispersion = moment_dispersion(counts, size)
    floor, slope, scatter = fit_trend(mean, dispersion)
    log_cp10k = np.log(mean / library.mean() * 1e4)

    ordered = np.sort(guides, axis=1)
    total, top, second = ordered.sum(1), ordered[:, -1], ordered[:, -2]
    one_guide = top >= 0.6 * total
    log_top = np.log(top[one_guide])
    # The runner-up is left out: where it is large it is a second guide and not the background.
    background = (total - top - second)[one_guide].astype(float)
    low = background <= np.quantile(background, 0.99)
    background_mean = background[low].mean()
    log_mito = np.log(cells["p_mito"].to_numpy()[cells["p_mito"] > 0])

    return {
        "library_log_mean": float(np.log(library).mean()),
        "library_log_sd": float(log_library.std().mean()),
        "batch_depth_log_sd": float(log_library.mean().std()),
        "batch_gene_log_sd": batch_gene_sd(counts, size, batch, np.maximum(dispersion, 0)),
        "quantile_levels": list(QUANTILE_LEVELS),
        "log_cp10k_quantiles": np.quantile(log_cp10k, QUANTILE_LEVELS).tolist(),
        "dispersion_floor": floor,
        "dispersion_slope": slope,
        "dispersion_log_scatter": scatter,
        "mito_log_mean": float(log_mito.mean()),
        "mito_log_sd": float(log_mito.std()),
        "guide_signal_log_mean": float(log_top.mean()),
        "guide_signal_log_sd": float(log_top.std()),
        "guide_background_mean": float(background_mean),
        "guide_background_dispersion": float((background[low].var() - background_mean) / background_mean**2),
        "zero_fraction": float((counts == 0).mean()),
        "provenance": {
            "screen": "Papalexi et al. 2021, Nature Genetics 53:322, ECCITE-seq, THP-1, CRISPR knock-out",
            "shape": {"cells": counts.shape[0], "genes": counts.shape[1], "guides": guides.shape[1]},
            "sha256": {f"{SCREEN}/{name}": sha256_of(folder / name) for name in FILES},
            "command": "python benchmarks/fit_simulator.py FOLDER",
            "cells_with_one_guide": "at least 60 % of the guide UMIs on one guide",
        },
    }


def main(arguments: list[str]) -> None:
    """Fit and write."""
    if len(arguments) not in (1, 2):
        sys.exit(__doc__)
    output = Path(arguments[1]) if len(arguments) == 2 else ROOT / "resources" / "simulator.json"
    write_json(_rounded(fit(Path(arguments[0]))), output)


def _rounded(value: Any) -> Any:
    """Keep six significant digits, more than the fit is worth."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return value


if __name__ == "__main__":
    main(sys.argv[1:])
