"""Measure how long the evaluation of a genome-scale screen takes and how much memory it needs.

Question: are all metrics of pseudobulks and the bootstrap of 2,000 perturbations × 8,000 genes × 12
models done in two minutes on two cores, in less than 4 GB?
Method: simulate a screen and predictions, write the files that the pipeline writes, and run the
evaluation and the report on them, with all checks of what training read. Seconds and processor seconds
of a part exclude the parts within it; peak memory is the resident set of the whole process while the part
ran. The cells are few per perturbation: their number costs three passes over the file (moments, genes
chosen again, cells of the distribution metrics) and nothing else. Each fold keeps the 8,000 most variable
of 10,000 measured genes. Of ``pairs.h5``, expression is left out, which the evaluation never reads there.

Usage::

    python benchmarks/evaluation_speed.py [--perturbations 2000] [--genes 8000] [--folds 5] [--seeds 1]
        [--models 12] [--name evaluation_speed]

Writes ``benchmarks/results/<name>.json``. Linux only, for it reads ``/proc``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from scipy import sparse

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "workflow" / "lib"))

from record import provenance, write_result  # noqa: E402

from biojepa.contracts import (  # noqa: E402
    CONTROL,
    PERTURBATION_TABLE_COLUMNS,
    QC_COLUMNS,
    SELECTED_ON,
    SOURCES,
    TRAINED_ON,
)
from biojepa.evaluation import evaluate as stage  # noqa: E402
from biojepa.evaluation import leakage  # noqa: E402
from biojepa.evaluation.predictions import PredictionFile  # noqa: E402
from biojepa.evaluation.settings import EvaluationSettings  # noqa: E402
from biojepa.evaluation.splits import FoldSplit, read_split  # noqa: E402
from biojepa.files import sha256_of, write_json, write_tsv  # noqa: E402
from biojepa.labels import genes_of  # noqa: E402
from biojepa.pairs import CONTROL_CODE, gene_moments_of_groups, select_genes  # noqa: E402
from biojepa.report import build_report  # noqa: E402
from biojepa.report.read import ReportFiles, Run, read_report  # noqa: E402

# Beside these, the evaluation makes ``mean`` and ``duplicate`` from the cells.
NAMES = (
    "biojepa",
    "no_change",
    "additive",
    "matching_mean",
    "linear",
    "multihot",
    "ridge",
    "kernel_ridge",
    "knn",
    "pca_predictor",
)
WITH_SD = ("biojepa", "pca_predictor")
COMBINATIONS = 0.2
CELLS, CONTROLS = 20, 2000
# Measured genes for each one that a fold keeps.
MEASURED = 1.25
# Prior sources: share of the perturbed genes that they cover. Their codes are noise.
COVERED = {"network": 0.9, "gene_sets": 0.6}
CODE_DIM = 64
N_SETS, SET_SIZE = 50, 100

# Which function of the evaluation a part is; what runs in none of them is *other*.
PARTS_OF_CHECKS = {
    "read_obs": "checks: cells and sets that training read",
    "check_training_cells": "checks: cells and sets that training read",
    "check_sets": "checks: cells and sets that training read",
    "check_gene_selection": "checks: genes chosen again",
}
PARTS = {
    "check_declared": "checks: what models declare",
    "fold_evidence": "checks: likeness of prior codes",
    "check_priors": "checks: likeness of prior codes",
    "collect_moments": "moments: one pass over the cells",
    "assemble_fold": "truth of the folds",
    "score_prediction": "metrics",
    "metric_tables": "bootstrap",
    "summarize": "summary: intervals, gaps, paired tests",
    "reach_verdict": "verdict",
    "enrichment_scores": "prerank",
    "enrichment_table": "prerank",
    "observed_cells": "distribution metrics",
    "distribution_scores": "distribution metrics",
    "read_prior_codes": "strata and trust",
    "perturbation_properties": "strata and trust",
    "strata_table": "strata and trust",
    "trust_table": "strata and trust",
    "judge_trust": "strata and trust",
    "read_prediction": "reading predictions",
    "observed_means": "observed means for the report",
}
OTHER = "other"


@dataclass
class Watch:
    """Wall seconds, processor seconds and peak resident memory by part, each part without those inside it."""

    seconds: dict[str, float] = field(default_factory=dict)
    processor: dict[str, float] = field(default_factory=dict)
    peak: dict[str, float] = field(default_factory=dict)
    _stack: list[str] = field(default_factory=list)
    _since: tuple[float, float] = (0.0, 0.0)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what runs inside for ``name``."""
        self._book()
        self._stack.append(name)
        try:
            yield
        finally:
            self._book()
            self._stack.pop()

    def _book(self) -> None:
        """Book the time since the last change of part for the innermost part, and start anew."""
        now, used, peak = time.perf_counter(), time.process_time(), _peak_memory()
        if self._stack:
            name = self._stack[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since[0]
            self.processor[name] = self.processor.get(name, 0.0) + used - self._since[1]
            self.peak[name] = max(self.peak.get(name, 0.0), peak)
        self._since = now, used

    def wrapped(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that counts for ``name``."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return counted

    def table(self) -> pd.DataFrame:
        """Return one row per part, in the order in which they first ended."""
        rows = [
            {
                "part": name,
                "seconds": self.seconds[name],
                "processor_seconds": self.processor[name],
                "peak_gib": self.peak[name],
            }
            for name in self.seconds
        ]
        return pd.DataFrame(rows)


def _peak_memory() -> float:
    """Return the peak resident memory since the last call, GiB, and start to measure anew."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    # 5 resets the peak, see proc(5).
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return peak / 2**20


# --- the screen ---------------------------------------------------------------------------------


def labels_of(n: int, rng: np.random.Generator) -> list[str]:
    """Return ``n`` sorted perturbations, a fifth of them combinations of two of the singles."""
    n_doubles = int(COMBINATIONS * n)
    singles = [f"G{i:05d}" for i in range(n - n_doubles)]
    doubles: set[str] = set()
    while len(doubles) < n_doubles:
        doubles.add("+".join(sorted(rng.choice(singles, 2, replace=False))))
    return sorted([*singles, *doubles])


def simulate(folder: Path, arguments: argparse.Namespace) -> None:
    """Write cells, splits, what training read, predictions and gene sets to ``folder``."""
    rng = np.random.default_rng(0)
    labels = labels_of(arguments.perturbations, rng)
    genes = [f"G{i:05d}" for i in range(int(MEASURED * arguments.genes))]
    base = rng.gamma(0.5, 0.4, len(genes))
    shared = rng.normal(0, 0.1, len(genes))
    single = {
        label: np.where(rng.random(len(genes)) < 0.03, rng.normal(0, 1.5, len(genes)), 0.0)
        for label in labels
        if "+" not in label
    }
    blocks, means, names = [], {}, []
    for label in [CONTROL, *labels]:
        effect = 0.0 if label == CONTROL else shared + sum(single[gene] for gene in label.split("+"))
        n = CONTROLS if label == CONTROL else CELLS
        cells = np.log1p(rng.poisson(base * np.exp(effect), (n, len(genes)))).astype(np.float32)
        blocks.append(sparse.csr_matrix(cells))
        means[label] = cells.mean(axis=0)
        names += [label] * n
    obs = pd.DataFrame({"perturbation": pd.Categorical(names)}, index=[f"cell{i}" for i in range(len(names))])
    ad.AnnData(sparse.vstack(blocks, format="csr"), obs=obs, var=pd.DataFrame(index=genes)).write_h5ad(
        folder / "cells.h5ad"
    )
    deal = rng.integers(arguments.folds, size=len(labels))
    for fold in range(arguments.folds):
        write_split(folder, fold, labels, deal, arguments.folds)
    codes = codes_of(labels, rng)
    for fold, columns in enumerate(write_pairs(folder, arguments, obs, genes, codes)):
        kept = {label: mean[columns] for label, mean in means.items()}
        write_predictions(folder, fold, arguments, kept, [genes[column] for column in columns], rng)
    lines = [
        "\t".join([f"SET{k}", "", *rng.choice(genes, min(SET_SIZE, len(genes) // 2), replace=False)])
        for k in range(N_SETS)
    ]
    (folder / "sets.gmt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_tables(folder, labels)


def write_split(folder: Path, fold: int, labels: list[str], deal: np.ndarray, n_folds: int) -> None:
    """Freeze one fold: a share is tested, half as many validate, the rest train."""
    sets = np.where(deal == fold, "test", "train").astype(object)
    following = np.flatnonzero(deal == (fold + 1) % n_folds)
    sets[following[::2]] = "val"
    trained = {label for label, which in zip(labels, sets, strict=True) if which == "train"}
    seen = [sum(gene in trained for gene in label.split("+")) for label in labels]
    category = [f"combo_seen{k}" if "+" in label else "single" for label, k in zip(labels, seen, strict=True)]
    table = pd.DataFrame({"perturbation": labels, "set": sets, "category": category, "n_genes_seen": seen})
    path = folder / f"fold{fold}.tsv"
    write_tsv(table, path)
    write_json({"fold": fold, "sha256": sha256_of(path), "scheme": "perturbation"}, path.with_suffix(".json"))


def codes_of(labels: list[str], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Return codes of unit length, source to (perturbed genes, dimensions); zero where it covers nothing."""
    n = len({gene for label in labels for gene in genes_of(label)})
    codes = {}
    for source, share in COVERED.items():
        values = rng.standard_normal((n, CODE_DIM))
        values /= np.linalg.norm(values, axis=1, keepdims=True)
        codes[source] = np.where(rng.random((n, 1)) < share, values, 0).astype(np.float32)
    return codes


def write_pairs(
    folder: Path,
    arguments: argparse.Namespace,
    obs: pd.DataFrame,
    genes: list[str],
    codes: dict[str, np.ndarray],
) -> list[np.ndarray]:
    """Choose the genes of every fold on its training cells; write what is read of ``pairs.h5``.

    Returns
    -------
    The positions of the chosen genes, by fold.
    """
    carried = obs["perturbation"].astype(str)
    tables = [pd.read_csv(folder / f"fold{fold}.tsv", sep="\t") for fold in range(arguments.folds)]
    labels_in = [table.groupby("set")["perturbation"].agg(list) for table in tables]
    masks = [carried.isin([*members["train"], CONTROL]).to_numpy() for members in labels_in]
    with h5py.File(folder / "cells.h5ad", "r") as cells:
        moments = gene_moments_of_groups(cells["X"], masks, len(genes))
    perturbed = sorted({gene for label in tables[0]["perturbation"] for gene in genes_of(label)})
    columns = [select_genes(*moment, arguments.genes, np.isin(genes, perturbed)) for moment in moments]
    kind = json.dumps({source: {"kind": source, "file": source} for source in codes})
    for fold, (table, members) in enumerate(zip(tables, labels_in, strict=True)):
        kept = carried[~carried.isin(members["test"])]
        position = pd.Index(table["perturbation"]).get_indexer(kept)
        names = {
            "cell_names": kept.index,
            "labels": table["perturbation"],
            "sets": table["set"],
            "genes": [genes[column] for column in columns[fold]],
            "perturbed_genes": perturbed,
        }
        with h5py.File(folder / f"fold{fold}.pairs.h5", "w") as file:
            file.attrs.update({"split_sha256": sha256_of(folder / f"fold{fold}.tsv"), SOURCES: kind})
            file["cells/perturbation"] = np.where(position < 0, CONTROL_CODE, position).astype(np.int32)
            for name, values in names.items():
                text = np.array(values, dtype=object)
                file.create_dataset(f"names/{name}", data=text, dtype=h5py.string_dtype())
            for source, values in codes.items():
                file[f"codes/{source}"] = values
    return columns


def write_predictions(
    folder: Path,
    fold: int,
    arguments: argparse.Namespace,
    means: dict[str, np.ndarray],
    genes: list[str],
    rng: np.random.Generator,
) -> None:
    """Write a file per model and seed: training mean, a share of the change, and noise."""
    table = pd.read_csv(folder / f"fold{fold}.tsv", sep="\t")
    center = np.mean([means[label] for label in table.loc[table["set"] == "train", "perturbation"]], axis=0)
    rows = table[table["set"] != "train"]
    declared = {
        key: table.loc[table["set"] == name, "perturbation"].tolist()
        for key, name in ((TRAINED_ON, "train"), (SELECTED_ON, "val"))
    }
    change = np.stack([means[label] for label in rows["perturbation"]]) - center
    obs = rows[["perturbation", "set"]].assign(context="all", n_cells=CELLS)
    obs.index = pd.Index(rows["perturbation"].astype(str), name=None)
    for position, (model, seed) in enumerate(runs_of(arguments)):
        share, scale = 0.05 + 0.9 * position / len(runs_of(arguments)), 0.05
        noise = scale * rng.standard_normal(change.shape, dtype=np.float32)
        X = np.maximum(center + share * change + noise, 0).astype(np.float32)
        layers = {"sd": np.full(X.shape, scale, dtype=np.float32)} if model in WITH_SD else {}
        content = ad.AnnData(X, obs=obs, var=pd.DataFrame(index=genes), layers=layers)
        content.uns["provenance"] = json.dumps(declared)
        content.write_h5ad(folder / f"fold{fold}.{model}.{seed}.h5ad")


def runs_of(arguments: argparse.Namespace) -> list[tuple[str, int]]:
    """Return model and seed of every file of a fold; trained models alone have several seeds."""
    names = [NAMES[i] if i < len(NAMES) else f"variant{i}" for i in range(arguments.models - 2)]
    return [(name, seed) for name in names for seed in range(arguments.seeds if name in WITH_SD else 1)]


def write_tables(folder: Path, labels: list[str]) -> None:
    """Write the two tables of the preprocess stage that the report shows."""
    numbers = {
        name: np.zeros(len(labels)) for name in PERTURBATION_TABLE_COLUMNS if name not in ("guides", "flag")
    }
    table = pd.DataFrame(
        {**numbers, "perturbation": labels, "guides": "", "flag": "", "target_measured": "yes"}
    )
    write_tsv(table[list(PERTURBATION_TABLE_COLUMNS)], folder / "perturbations.tsv")
    counts = dict.fromkeys(QC_COLUMNS, 0)
    write_tsv(pd.DataFrame([{**counts, "filter": "none", "note": ""}]), folder / "qc.tsv")


# --- the measurement ----------------------------------------------------------------------------


def measure(folder: Path, arguments: argparse.Namespace) -> pd.DataFrame:
    """Evaluate the screen and build its report; return what each part took."""
    watch = Watch()
    instrument(stage, PARTS, watch)
    instrument(leakage, PARTS_OF_CHECKS, watch)
    splits: list[FoldSplit] = []
    files: list[PredictionFile] = []
    for fold in range(arguments.folds):
        table = folder / f"fold{fold}.tsv"
        splits.append(read_split(table, table.with_suffix(".json"), fold))
        for model, seed in runs_of(arguments):
            files.append(PredictionFile(model, fold, seed, folder / f"fold{fold}.{model}.{seed}.h5ad"))
    with watch.part(OTHER):
        result = stage.evaluate(
            folder / "cells.h5ad",
            splits,
            files,
            EvaluationSettings(),
            folder / "sets.gmt" if arguments.prerank else None,
            [folder / f"fold{split.fold}.pairs.h5" for split in splits],
        )
    with watch.part("writing tables"):
        write_tsv(result.metrics, folder / "metrics.tsv")
        write_tsv(result.summary, folder / "summary.tsv")
        write_tsv(result.enrichment, folder / "enrichment.tsv")
        write_tsv(result.strata, folder / "strata.tsv")
        write_tsv(result.trust, folder / "trust.tsv")
        write_json(result.verdict, folder / "verdict.json")
        result.observed.write_h5ad(folder / "observed.h5ad", compression="gzip")
    del result
    if arguments.report:
        with watch.part("report: reading"):
            inputs = read_report(
                ReportFiles(
                    metrics=folder / "metrics.tsv",
                    summary=folder / "summary.tsv",
                    enrichment=folder / "enrichment.tsv",
                    verdict=folder / "verdict.json",
                    observed=folder / "observed.h5ad",
                    splits=[split.path.with_suffix(".json") for split in splits],
                    qc=folder / "qc.tsv",
                    perturbations=folder / "perturbations.tsv",
                    predictions=[file.path for file in files],
                    prediction_runs=[Run(file.model, file.fold, file.seed) for file in files],
                    strata=folder / "strata.tsv",
                    trust=folder / "trust.tsv",
                ),
                dataset="simulated",
                split="perturbation",
            )
        with watch.part("report: page"):
            page = build_report(inputs)
        print(f"page: {len(page.encode()) / 1e6:.1f} MB", file=sys.stderr)
    return watch.table()


def instrument(module: ModuleType, parts: dict[str, str], watch: Watch) -> None:
    """Count the functions of ``parts`` that ``module`` calls."""
    for name, part in parts.items():
        setattr(module, name, watch.wrapped(part, getattr(module, name)))


def main() -> None:
    """Simulate in a process of its own, so that its memory is gone, then measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--perturbations", type=int, default=2000)
    parser.add_argument("--genes", type=int, default=8000)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=1, help="seeds of the trained models")
    parser.add_argument("--models", type=int, default=12, help="mean and duplicate included")
    parser.add_argument("--no-prerank", dest="prerank", action="store_false")
    parser.add_argument("--no-report", dest="report", action="store_false")
    parser.add_argument("--keep", help="keep the screen in this folder, or use the one there")
    parser.add_argument("--name", default="evaluation_speed")
    arguments = parser.parse_args()
    made_by = provenance(__file__, arguments)
    # Where the screen lies says nothing about the result.
    del made_by["arguments"]["keep"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.keep or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "qc.tsv").exists():
            child = multiprocessing.get_context("spawn").Process(target=simulate, args=(folder, arguments))
            child.start()
            child.join()
            if child.exitcode:
                raise SystemExit(child.exitcode)
        table = measure(folder, arguments)
    total = {
        "part": "all",
        "seconds": table["seconds"].sum(),
        "processor_seconds": table["processor_seconds"].sum(),
        "peak_gib": table["peak_gib"].max(),
    }
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps({"user": used.ru_utime, "system": used.ru_stime}), file=sys.stderr)
    write_result(arguments.name, made_by, pd.concat([table, pd.DataFrame([total])], ignore_index=True))


if __name__ == "__main__":
    main()
