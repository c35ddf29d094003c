"""Measure preprocess against the plain script in memory that one would write first with scanpy.

Question: what does it cost in time, and save in memory, to preprocess a screen in blocks of cells? Method:
simulate a screen of 100,000 cells (``sparse_screen.py``) and take the same steps on it in two processes of
one thread: ours, and ``plain`` below, which reads the whole file, filters, normalizes and takes logarithms
with scanpy, describes each perturbation from rows of the matrix, and writes the same tables. What scanpy has
not, the permutation test of the energy distance within batches, is the same function in both, on the same
sampled cells.
The two take turns; medians over repeats. Seconds exclude imports; peak memory is the resident set of the
process. The results are compared: cells kept, matrices, and the numbers of perturbations.tsv.

Usage::

    python benchmarks/preprocess_against_scanpy.py [--cells 100000] [--perturbations 500] [--repeats 3]

Writes ``benchmarks/results/preprocess_against_scanpy.json``. Linux only, for it reads ``/proc``.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from sparse_screen import CONTROL_LABEL, SparseScreen, measured, run_and_print, screen_source

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "workflow" / "lib"))

from record import provenance, write_result  # noqa: E402

WAYS = ("ours", "plain")
FILES = ("cells.h5ad", "qc.tsv", "perturbations.tsv", "guides.tsv")
# Largest relative difference of numbers; the matrix is float32.
TOLERANCE = 1e-5


def simulate(folder: Path) -> Callable[[], None]:
    """Prepare to write the screen that ``screen.json`` in ``folder`` describes."""
    settings = json.loads((folder / "screen.json").read_text(encoding="utf-8"))
    return lambda: SparseScreen(**settings).write(folder)


def ours(folder: Path) -> Callable[[], None]:
    """Prepare to preprocess as the pipeline does."""
    from biojepa.preprocess import PreprocessSettings, preprocess_file

    (folder / "ours").mkdir(exist_ok=True)
    files = [folder / "ours" / name for name in FILES]
    return lambda: preprocess_file(screen_source(folder), PreprocessSettings(), *files)


class AllScores:
    """Scores of all cells in principal components, held in memory."""

    def __init__(self, scores: np.ndarray) -> None:
        self.rows, self._scores = np.arange(len(scores)), scores

    def of(self, rows: np.ndarray) -> np.ndarray:
        """Return the scores of some of the cells."""
        return self._scores[rows]


def plain(folder: Path) -> Callable[[], None]:
    """Prepare to do the same in memory with scanpy, in the way of its tutorials."""
    import scanpy as sc
    from scipy import stats
    from sklearn.decomposition import PCA

    from biojepa.preprocess import PreprocessSettings
    from biojepa.preprocess.batch_effects import BatchCentred
    from biojepa.preprocess.effects import PCA_CELLS, PCA_GENES, TEST_CONTROLS, energy_test, sample_rows
    from biojepa.preprocess.responding import CONTROL_CELLS

    settings = PreprocessSettings()

    def described(adata: sc.AnnData) -> pd.DataFrame:
        """Compare the cells of each perturbation with the controls."""
        import zlib

        X, labels = adata.X, adata.obs["perturbation"].astype(str).to_numpy()
        mean = np.asarray(X.mean(axis=0)).ravel()
        variable = np.asarray(X.multiply(X).mean(axis=0)).ravel() - mean**2
        genes = np.sort(np.argsort(-variable, kind="stable")[:PCA_GENES])
        part = X[:, genes]
        fit_on = sample_rows(np.arange(adata.n_obs), PCA_CELLS, settings.seed, "principal components")
        pca = PCA(settings.effect_components, svd_solver="covariance_eigh")
        pca.fit(part[fit_on].toarray().astype(np.float64))
        scores = np.asarray(part @ pca.components_.T) - pca.mean_ @ pca.components_.T

        def sampled(rows: np.ndarray, name: str) -> np.ndarray:
            return sample_rows(rows, settings.effect_cells, settings.seed, name)

        def moments(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
            cells, n = X[rows].astype(np.float64), len(rows)
            average = np.asarray(cells.mean(axis=0)).ravel()
            square = np.asarray(cells.multiply(cells).mean(axis=0)).ravel()
            return average, np.sqrt(np.maximum(square - average**2, 0) * n / (n - 1)), n

        def cp10k(gene: str, rows: np.ndarray) -> np.ndarray:
            return np.expm1(by_gene[:, [adata.var_names.get_loc(gene)]].toarray().ravel()[rows]).astype(float)

        by_gene = X.tocsc()
        control = np.flatnonzero(labels == "control")
        tested = sample_rows(control, TEST_CONTROLS, settings.seed, "on-target test")
        reference = moments(control)
        of_control = sampled(control, "control")
        centre = sample_rows(control, CONTROL_CELLS, settings.seed, "responding cells")
        centred = BatchCentred(AllScores(scores), adata.obs["lane"], np.union1d(of_control, centre))
        rows = []
        for name in sorted(set(labels) - {"control"}):
            cells = np.flatnonzero(labels == name)
            rng = np.random.default_rng([settings.seed, zlib.crc32(name.encode()), 1])
            of_cells = sampled(cells, name)
            distance = energy_test(
                centred.of(of_cells),
                centred.of(of_control),
                settings.permutations,
                rng,
                centred.strata_with_control(of_cells, of_control),
            )
            group = moments(cells)
            with np.errstate(divide="ignore", invalid="ignore"):
                p = stats.ttest_ind_from_stats(
                    group[0], np.maximum(group[1], reference[1]), group[2], *reference, equal_var=False
                ).pvalue
            change = np.log2((cp10k(name, cells).mean() + 0.01) / (cp10k(name, control).mean() + 0.01))
            rank = stats.mannwhitneyu(cp10k(name, cells), cp10k(name, tested), method="asymptotic").pvalue
            n_deg = int((stats.false_discovery_control(np.nan_to_num(p, nan=1.0)) < 0.05).sum())
            rows.append((name, len(cells), change, rank, *distance, n_deg))
        names = (
            "perturbation",
            "n_cells",
            "on_target_log2fc",
            "on_target_p",
            "effect_size",
            "effect_p",
            "n_deg",
        )
        table = pd.DataFrame(rows, columns=list(names))
        table.insert(6, "effect_q", stats.false_discovery_control(table["effect_p"]))
        return table

    def run() -> None:
        adata = sc.read_h5ad(folder / "raw.h5ad")
        sc.pp.calculate_qc_metrics(adata, percent_top=None, inplace=True)
        keep = np.ones(adata.n_obs, dtype=bool)
        lost = {}
        metrics = {"mad_counts": "log1p_total_counts", "mad_genes": "log1p_n_genes_by_counts"}
        outliers = {}
        for row, column in metrics.items():
            groups = adata.obs.groupby("lane", observed=True)[column]
            median, spread = groups.transform("median"), groups.transform(stats.median_abs_deviation)
            outliers[row] = ((adata.obs[column] - median).abs() > settings.mad_threshold * spread).to_numpy()
        for row, bad in outliers.items():
            lost[row] = int((keep & bad).sum())
            keep &= ~bad
        adata = adata[keep].copy()
        adata.obs["perturbation"] = adata.obs["gene"].cat.rename_categories({CONTROL_LABEL: "control"})
        sizes = adata.obs["perturbation"].value_counts()
        few = sizes[sizes < settings.min_cells_per_perturbation].index
        adata = adata[~adata.obs["perturbation"].isin(few)].copy()
        genes, n_cells = sc.pp.filter_genes(adata, min_cells=settings.min_cells_per_gene, inplace=False)
        genes |= adata.var_names.isin(adata.obs["perturbation"]) & (n_cells > 0)
        adata.layers["counts"] = adata.X.astype(np.float32)
        adata.X = adata.X.astype(np.float32)
        sc.pp.normalize_total(adata, target_sum=settings.target_sum)
        sc.pp.log1p(adata)
        adata = adata[:, genes].copy()
        table = described(adata)
        (folder / "plain").mkdir(exist_ok=True)
        paths = [folder / "plain" / name for name in FILES]
        adata.write_h5ad(paths[0], compression="gzip", compression_opts=1)
        pd.Series(lost).rename_axis("filter").rename("cells_removed").to_csv(paths[1], sep="\t")
        table.to_csv(paths[2], sep="\t", index=False, float_format="%.10g")

    return run


def compare(folder: Path) -> Callable[[], None]:
    """Prepare to check that both ways gave the same, and to write how large the differences are."""
    import anndata as ad

    def relative(one: np.ndarray, other: np.ndarray) -> float:
        # Relative to 1 % of the largest value where values are near zero.
        floor = 0.01 * np.abs(one).max(initial=0) + 1e-300
        return float((np.abs(one - other) / np.maximum(np.abs(one), floor)).max(initial=0))

    def run() -> None:
        # guides.tsv is ours alone.
        (cells, qc, table), (cells_p, qc_p, table_p) = (
            (
                ad.read_h5ad(folder / way / FILES[0]),
                *(pd.read_csv(folder / way / n, sep="\t") for n in FILES[1:3]),
            )
            for way in WAYS
        )
        removed, removed_p = (t.set_index("filter")["cells_removed"] for t in (qc, qc_p))
        found: dict[str, float] = {
            "cells": float(cells.obs_names.equals(cells_p.obs_names)),
            "genes": float(cells.var_names.equals(cells_p.var_names)),
            "qc": float((removed.loc[removed_p.index] == removed_p).all()),
        }
        for name, one, other in (
            ("X", cells.X, cells_p.X),
            ("counts", cells.layers["counts"], cells_p.layers["counts"]),
        ):
            other.sort_indices()
            found[f"{name} entries"] = float(
                np.array_equal(one.indptr, other.indptr) and np.array_equal(one.indices, other.indices)
            )
            found[name] = relative(one.data, other.data)
        found["library_size"] = relative(
            cells.obs["library_size"].to_numpy(), cells_p.obs["total_counts"].to_numpy()
        )
        for name in table_p.columns[1:]:
            found[name] = relative(table[name].to_numpy(float), table_p[name].to_numpy(float))
        (folder / "compared.json").write_text(json.dumps(found), encoding="utf-8")

    return run


COMMANDS = {"simulate": simulate, "ours": ours, "plain": plain, "compare": compare}
EQUAL = ("cells", "genes", "qc", "X entries", "counts entries")


def main() -> None:
    """Measure both ways in turns, compare what they wrote, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cells", type=int, default=100_000)
    parser.add_argument("--genes", type=int, default=5_000)
    parser.add_argument("--perturbations", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--name", default="preprocess_against_scanpy")
    parser.add_argument("--stage", choices=list(COMMANDS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage:
        run_and_print(COMMANDS[arguments.stage](Path(arguments.folder)))
        return
    made_by = provenance(__file__, arguments)
    made_by["arguments"] = {
        key: value for key, value in made_by["arguments"].items() if key not in ("stage", "folder")
    }
    runs = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sizes = {"n_cells": arguments.cells, "n_genes": arguments.genes}
        sizes["n_perturbations"] = arguments.perturbations
        (folder / "screen.json").write_text(json.dumps(sizes), encoding="utf-8")
        measured(__file__, "simulate", folder)
        for _ in range(arguments.repeats):
            for way in WAYS:
                runs.append({"way": way, **measured(__file__, way, folder)})
                print(runs[-1], file=sys.stderr, flush=True)
        measured(__file__, "compare", folder)
        differences = json.loads((folder / "compared.json").read_text(encoding="utf-8"))
        written = {way: (folder / way / FILES[0]).stat().st_size / 2**20 for way in WAYS}
    wrong = [
        name for name, value in differences.items() if (value != 1 if name in EQUAL else value > TOLERANCE)
    ]
    if wrong:
        raise SystemExit(f"the two ways differ in {', '.join(wrong)}: {differences}")
    table = pd.DataFrame(runs).groupby("way", sort=False).median().reset_index()
    table["written_mib"] = table["way"].map(written)
    ours_row, plain_row = (table[table["way"] == way].iloc[0] for way in WAYS)
    columns = ["seconds", "processor_seconds", "peak_gib", "written_mib"]
    ratio = {"way": "ours / plain", **{name: ours_row[name] / plain_row[name] for name in columns}}
    write_result(
        arguments.name,
        made_by,
        pd.concat([table, pd.DataFrame([ratio])], ignore_index=True),
        runs=runs,
        largest_relative_differences={k: v for k, v in differences.items() if k not in EQUAL},
        equal=list(EQUAL),
    )


if __name__ == "__main__":
    main()
