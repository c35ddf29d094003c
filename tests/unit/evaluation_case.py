"""A small screen on disk and a random fold in memory, for the tests of the evaluation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

from biojepa.evaluation.predictions import PredictionFile
from biojepa.evaluation.splits import FoldSplit, read_split
from biojepa.evaluation.truth import FoldTruth
from biojepa.files import sha256_of, write_json, write_tsv
from biojepa.halves import half_b

N_GENES = 40
GENES = [f"G{i}" for i in range(N_GENES)]
SINGLES = [f"G{i}" for i in range(14)]
LABELS = sorted([*SINGLES, "G0+G1", "G0+G13", "G12+G13"])


def random_truth(seed: int = 0, n: int = 9, genes: int = 30, **changes) -> FoldTruth:
    """A fold whose means come from cells drawn here, so that every field is consistent."""
    rng = np.random.default_rng(seed)
    control = rng.gamma(2.0, 0.5, (60, genes))
    effects = rng.normal(0, 0.6, (n, genes)) * (rng.random((n, genes)) < 0.4)
    halves = [[np.abs(rng.gamma(2.0, 0.5, (12, genes)) + effect) for effect in effects] for _ in "ab"]
    both = [np.vstack(pair) for pair in zip(*halves, strict=True)]
    stack = lambda cells, f: np.stack([f(part) for part in cells])  # noqa: E731
    mean, var = (lambda part: part.mean(axis=0)), (lambda part: part.var(axis=0, ddof=1))
    truth = FoldTruth(
        fold=0,
        genes=pd.Index([f"G{i}" for i in range(genes)]),
        perturbations=[f"P{i}" for i in range(n)],
        categories=np.array(["single"] * n, dtype=object),
        n_genes_seen=np.zeros(n, dtype=int),
        n_a=np.full(n, 12),
        n_b=np.full(n, 12),
        half_a=stack(halves[0], mean),
        half_b=stack(halves[1], mean),
        all_cells=stack(both, mean),
        var_a=stack(halves[0], var),
        var_b=stack(halves[1], var),
        var_all=stack(both, var),
        control_mean=control.mean(axis=0),
        control_var=control.var(axis=0, ddof=1),
        n_control=60,
        perturbed_mean=control.mean(axis=0) + rng.normal(0, 0.1, genes),
        additive=np.full((n, genes), np.nan),
    )
    return replace(truth, **changes)


class Screen:
    """A screen with singles and combinations, two folds, and predictions on disk."""

    def __init__(self, folder: Path, seed: int = 0, cells_per_label: int = 24, n_folds: int = 2) -> None:
        self.folder, self.n_folds = folder, n_folds
        rng = np.random.default_rng(seed)
        base = rng.gamma(1.5, 0.5, N_GENES)
        self.effect = {gene: rng.normal(0, 0.5, N_GENES) for gene in SINGLES}
        labels, rows = [], []
        for label in ["control", *LABELS]:
            n = 3 * cells_per_label if label == "control" else cells_per_label
            shift = sum(self.effect[gene] for gene in label.split("+")) if label != "control" else 0.0
            rows.append(np.maximum(base + shift + rng.normal(0, 0.4, (n, N_GENES)), 0.0))
            labels += [label] * n
        order = rng.permutation(len(labels))
        self.labels = np.array(labels, dtype=object)[order]
        self.X = np.vstack(rows).astype(np.float32)[order]
        self.names = np.array([f"cell{i}" for i in order], dtype=object)
        self.cells = self.write_cells(folder / "cells.h5ad")
        self.splits = [self.write_split(fold) for fold in range(n_folds)]

    def write_cells(self, path: Path, matrix=sparse.csr_matrix) -> Path:
        obs = pd.DataFrame({"perturbation": pd.Categorical(self.labels)}, index=self.names)
        ad.AnnData(matrix(self.X), obs=obs, var=pd.DataFrame(index=GENES)).write_h5ad(path)
        return path

    def table(self, fold: int) -> pd.DataFrame:
        sets = ["test" if i % self.n_folds == fold else "train" for i in range(len(LABELS))]
        sets[(fold + 1) % self.n_folds] = "val"
        category = ["combo_seen1" if "+" in label else "single" for label in LABELS]
        columns = {"perturbation": LABELS, "set": sets, "category": category, "n_genes_seen": 0}
        return pd.DataFrame(columns)

    def write_split(self, fold: int) -> FoldSplit:
        folder = self.folder / f"fold{fold}"
        table, info = folder / "split.tsv", folder / "split.json"
        write_tsv(self.table(fold), table)
        write_json({"fold": fold, "sha256": sha256_of(table), "scheme": "perturbation"}, info)
        return read_split(table, info, fold)

    def mean_of(self, label: str, half: str | None = None) -> np.ndarray:
        chosen = self.labels == label
        if half is not None:
            chosen &= half_b(self.names, 0, self.labels) == (half == "b")
        return self.X[chosen].astype(float).mean(axis=0)

    def perturbed_mean(self, fold: int) -> np.ndarray:
        train = self.table(fold).query("set == 'train'")["perturbation"]
        return np.mean([self.mean_of(label) for label in train], axis=0)

    def guess(self, model: str, label: str, fold: int, rng: np.random.Generator) -> np.ndarray:
        """Predicted mean: of a known kind by its name, otherwise noise around the perturbed mean."""
        mean = self.perturbed_mean(fold)
        if model == "mean":
            return mean
        if model == "duplicate":
            return self.mean_of(label, "a")
        if model == "no_change":
            return self.mean_of("control")
        if model == "biojepa":
            return mean + 0.8 * (self.mean_of(label, "a") - mean) + rng.normal(0, 0.02, N_GENES)
        return mean + rng.normal(0, 0.1, N_GENES)

    def write_prediction(self, model: str, fold: int, seed: int = 0, edit=None) -> PredictionFile:
        """Write the file of one model; ``edit`` may change the AnnData first."""
        rng = np.random.default_rng([seed, fold])
        rows = self.table(fold).query("set != 'train'")
        X = np.stack([self.guess(model, label, fold, rng) for label in rows["perturbation"]])
        obs = (
            rows[["perturbation", "set"]]
            .assign(context="all", n_cells=24)
            .set_index("perturbation", drop=False)
        )
        obs.index.name = None
        content = ad.AnnData(np.maximum(X, 0).astype(np.float32), obs=obs, var=pd.DataFrame(index=GENES))
        content = edit(content) if edit else content
        path = self.folder / f"fold{fold}" / f"{model}{seed}.h5ad"
        content.write_h5ad(path)
        return PredictionFile(model, fold, seed, path)

    def write_gene_sets(self, n_sets: int = 8) -> Path:
        rng = np.random.default_rng(5)
        lines = [
            "\t".join([f"SET{k}", "made up", *rng.choice(GENES, 8, replace=False)]) for k in range(n_sets)
        ]
        path = self.folder / "sets.gmt"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path
