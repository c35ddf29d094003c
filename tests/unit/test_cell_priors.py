"""Claims about prior sources that come from cells: responses in another screen, co-expression in training."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from sklearn.decomposition import PCA

from biojepa import coexpression, pairs
from biojepa.coexpression import coexpression_source, expression_loadings
from biojepa.errors import InputError
from biojepa.responses import mean_responses, response_source

N_CELLS, N_GENES = 300, 40
GENES = [f"G{i}" for i in range(N_GENES)]


def unit(values: np.ndarray) -> np.ndarray:
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def write_cells(path: Path, X: np.ndarray, labels: np.ndarray, genes: list[str] = GENES) -> Path:
    obs = pd.DataFrame({"perturbation": pd.Categorical(labels)}, index=[f"c{i}" for i in range(len(labels))])
    ad.AnnData(sparse.csr_matrix(X.astype(np.float32)), obs, pd.DataFrame(index=genes)).write_h5ad(path)
    return path


@pytest.fixture
def screen(tmp_path) -> tuple[Path, np.ndarray, np.ndarray]:
    """Sparse expression with a few common factors, and labels with singles and a combination."""
    rng = np.random.default_rng(0)
    factors = rng.standard_normal((N_CELLS, 4)) @ rng.standard_normal((4, N_GENES)) * np.arange(1, 41) / 10
    X = np.maximum(factors + rng.standard_normal((N_CELLS, N_GENES)), 0)
    X[:, 7] = 0
    labels = rng.choice(["control", "A", "B", "C", "D", "A+B"], N_CELLS)
    return write_cells(tmp_path / "cells.h5ad", X, labels), X.astype(np.float32).astype(float), labels


def test_responses_are_pseudobulk_changes_of_single_perturbations(screen, monkeypatch):
    path, X, labels = screen
    monkeypatch.setattr(pairs, "BLOCK", 64)
    genes, changes = mean_responses(path)
    means = pd.DataFrame(X).groupby(labels).mean()
    assert genes == ("A", "B", "C", "D")
    np.testing.assert_allclose(changes, means.loc[list(genes)] - means.loc["control"], atol=1e-9)


def test_codes_of_responses_are_principal_components_and_other_genes_are_projected(screen):
    path, _, _ = screen
    source = response_source("other", path)
    assert source.name == "responses_other" and source.known == {"A", "B", "C", "D"}
    _, changes = mean_responses(path)
    codes = source.codes(["A", "C", "D", "STRANGER"], 8, ["B"])
    pca = PCA(2, svd_solver="full").fit(changes[[0, 2, 3]])
    whole = np.linalg.norm(changes[1] - changes[[0, 2, 3]].mean(axis=0))
    expected = np.vstack([unit(pca.transform(changes[[0, 2, 3]])), pca.transform(changes[[1]]) / whole])
    assert codes.genes == ("A", "C", "D", "B")
    signs = np.sign((codes.values * expected).sum(axis=0))
    np.testing.assert_allclose(codes.values, expected * signs, atol=1e-5)


@pytest.mark.parametrize("labels", [["A+B", "control"], ["A", "B"]])
def test_a_screen_without_singles_or_controls_informs_no_other(tmp_path, labels):
    path = write_cells(tmp_path / "cells.h5ad", np.ones((4, 2)), np.array(labels * 2), ["X", "Y"])
    with pytest.raises(InputError, match=r"cells\.h5ad: found .*some of both.*column responses"):
        response_source("other", path)


def loadings_of(path: Path, keep: np.ndarray, n: int) -> np.ndarray:
    with h5py.File(path) as file:
        return expression_loadings(file["X"], keep, n)


@pytest.mark.parametrize("n_components", [3, 64])
def test_loadings_are_those_of_a_dense_principal_component_analysis(screen, monkeypatch, n_components):
    path, X, labels = screen
    keep = labels != "D"
    monkeypatch.setattr(coexpression, "OVERSAMPLED", 4)
    loadings = loadings_of(path, keep, n_components)
    varying = np.arange(N_GENES) != 7
    Z = X[keep][:, varying]
    Z = (Z - Z.mean(axis=0)) / Z.std(axis=0)
    _, singular, right = np.linalg.svd(Z, full_matrices=False)
    k = min(n_components, 39)
    expected = (right.T * singular)[:, :k] / np.sqrt(len(Z))
    assert not loadings[7].any()
    np.testing.assert_allclose(loadings[varying] @ loadings[varying].T, expected @ expected.T, atol=2e-3)


def test_all_components_together_give_the_correlations_of_genes(screen):
    path, X, labels = screen
    keep = labels != "D"
    loadings = np.delete(loadings_of(path, keep, 64), 7, axis=0)
    correlation = np.corrcoef(np.delete(X[keep], 7, axis=1).T)
    np.testing.assert_allclose(loadings @ loadings.T, correlation, atol=1e-8)


def test_cells_outside_training_change_no_loading_and_those_inside_do(screen, tmp_path):
    path, X, labels = screen
    keep = labels != "D"
    before = loadings_of(path, keep, 5)
    held_out, trained = X.copy(), X.copy()
    held_out[~keep] = np.random.default_rng(1).uniform(5, 9, held_out[~keep].shape)
    trained[np.flatnonzero(keep)[:50]] = 8
    np.testing.assert_array_equal(
        loadings_of(write_cells(tmp_path / "a.h5ad", held_out, labels), keep, 5), before
    )
    changed = loadings_of(write_cells(tmp_path / "b.h5ad", trained, labels), keep, 5)
    assert np.abs(changed @ changed.T - before @ before.T).max() > 0.1


def test_codes_of_coexpression_compare_genes_by_their_loadings_and_leave_out_silent_ones(screen):
    path, _, labels = screen
    keep = labels != "D"
    with h5py.File(path) as file:
        source = coexpression_source(file["X"], GENES, keep, 5, path)
    codes = source.codes(["G3", "G7", "G20", "G31", "NOT_MEASURED"], 5, ["G0", "G7"])
    assert codes.genes == ("G20", "G3", "G31", "G0")
    loadings = loadings_of(path, keep, 5)[[20, 3, 31]]
    np.testing.assert_allclose(
        codes.values[:3] @ codes.values[:3].T, unit(loadings) @ unit(loadings).T, atol=1e-5
    )


def test_a_large_sparse_screen_never_becomes_dense(tmp_path):
    rng = np.random.default_rng(0)
    n, genes = 8_000, 2_000
    X = sparse.random(n, genes, density=0.02, format="csr", dtype=np.float32, random_state=rng)
    path = tmp_path / "cells.h5ad"
    with h5py.File(path, "w") as file:
        group = file.create_group("X")
        group.attrs["shape"] = X.shape
        for key in ("data", "indices", "indptr"):
            group[key] = getattr(X, key)
    tracemalloc.start()
    with h5py.File(path) as file:
        expression_loadings(file["X"], np.ones(n, dtype=bool), 16)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < n * genes * 8 / 10, f"{peak / 1e6:.0f} MB"
