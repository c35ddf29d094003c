"""The truth of a fold: what it is computed from, and what may never enter it."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from evaluation_case import GENES, LABELS, Screen
from scipy import sparse

from biojepa.errors import InputError
from biojepa.evaluation import truth as module
from biojepa.evaluation.truth import assemble_fold, collect_moments
from biojepa.halves import half_b


@pytest.fixture(scope="module")
def screen(tmp_path_factory):
    return Screen(tmp_path_factory.mktemp("screen"))


def fold_truth(screen, fold=0, genes=GENES):
    moments = collect_moments(screen.cells, pd.Index(genes))
    return assemble_fold(moments, screen.splits[fold], pd.Index(genes))


def test_means_and_variances_equal_those_of_the_cells(screen):
    truth = fold_truth(screen)
    in_b = half_b(screen.names, 0, screen.labels)
    assert truth.perturbations == [label for i, label in enumerate(LABELS) if i % 2 == 0]
    for row, label in enumerate(truth.perturbations):
        cells = screen.X[screen.labels == label].astype(float)
        b = in_b[screen.labels == label]
        for mean, variance, chosen in (
            (truth.half_a, truth.var_a, ~b),
            (truth.half_b, truth.var_b, b),
            (truth.all_cells, truth.var_all, b | ~b),
        ):
            assert mean[row] == pytest.approx(cells[chosen].mean(axis=0))
            assert variance[row] == pytest.approx(cells[chosen].var(axis=0, ddof=1))
        assert (truth.n_a[row], truth.n_b[row]) == ((~b).sum(), b.sum())
    control = screen.X[screen.labels == "control"].astype(float)
    assert truth.control_mean == pytest.approx(control.mean(axis=0))
    assert truth.control_var == pytest.approx(control.var(axis=0, ddof=1))
    assert truth.n_control == len(control)


def test_perturbed_mean_is_the_unweighted_mean_over_training_perturbations(screen):
    assert fold_truth(screen).perturbed_mean == pytest.approx(screen.perturbed_mean(0))


def test_test_and_validation_cells_never_reach_the_references(screen, tmp_path):
    """Whatever happens to held-out cells, the perturbed mean and the control stay."""
    altered = Screen(tmp_path)
    held_out = altered.table(0).query("set != 'train'")["perturbation"]
    altered.X[np.isin(altered.labels, held_out.to_numpy())] = 9.0
    altered.write_cells(altered.cells)
    before, after = fold_truth(screen), fold_truth(altered)
    assert (before.perturbed_mean == after.perturbed_mean).all()
    assert (before.control_mean == after.control_mean).all()
    assert not np.allclose(before.half_b, after.half_b)


def test_additive_reference_adds_trained_singles_and_is_missing_otherwise(screen):
    table = screen.table(0).set_index("perturbation")["set"]
    truth = fold_truth(screen)
    control = screen.mean_of("control")
    for row, label in enumerate(truth.perturbations):
        genes = label.split("+")
        if len(genes) > 1 and all(table[gene] == "train" for gene in genes):
            expected = sum(screen.mean_of(gene) for gene in genes) - control
            assert truth.additive[row] == pytest.approx(expected)
        else:
            assert np.isnan(truth.additive[row]).all()
    combination = assemble_fold_of(screen, test="G0+G1")
    assert combination.additive[0] == pytest.approx(screen.mean_of("G0") + screen.mean_of("G1") - control)


def assemble_fold_of(screen, test):
    """A fold that tests one label and trains on all others."""
    table = screen.splits[0].table.copy()
    table["set"] = np.where(table.index == test, "test", "train")
    split = type(screen.splits[0])(0, table, screen.splits[0].path)
    return assemble_fold(collect_moments(screen.cells, pd.Index(GENES)), split, pd.Index(GENES))


def test_block_size_and_cell_order_do_not_matter(screen, tmp_path, monkeypatch):
    whole = collect_moments(screen.cells, pd.Index(GENES))
    monkeypatch.setattr(module, "BLOCK_VALUES", 300)
    blocks = collect_moments(screen.cells, pd.Index(GENES))
    shuffled = Screen(tmp_path)
    order = np.random.default_rng(9).permutation(len(shuffled.labels))
    shuffled.X, shuffled.labels, shuffled.names = (
        shuffled.X[order],
        shuffled.labels[order],
        shuffled.names[order],
    )
    shuffled.write_cells(shuffled.cells)
    again = collect_moments(shuffled.cells, pd.Index(GENES))
    for other in (blocks, again):
        assert other.total == pytest.approx(whole.total)
        assert other.squares == pytest.approx(whole.squares)
        assert (other.n_cells == whole.n_cells).all()


def test_a_fold_may_use_fewer_genes_in_another_order(screen):
    some = ["G31", "G13", "G0"]
    truth, full = fold_truth(screen, genes=some), fold_truth(screen)
    assert truth.half_b == pytest.approx(full.half_b[:, [31, 13, 0]])
    targets = dict(
        zip(truth.perturbations, (columns.tolist() for columns in truth.target_columns), strict=True)
    )
    assert targets["G0+G13"] == [2, 1]
    assert targets["G0"] == [2]
    assert targets["G12"] == []


def test_genes_that_were_not_measured_are_named(screen):
    with pytest.raises(InputError, match=r"1 predicted genes not measured, e\.g\. \['TP53'\]"):
        collect_moments(screen.cells, pd.Index([*GENES, "TP53"]))


def test_a_matrix_that_is_not_csr_is_refused(screen, tmp_path):
    for matrix in (np.asarray, sparse.csc_matrix):
        path = screen.write_cells(tmp_path / "other.h5ad", matrix)
        with pytest.raises(InputError, match=r"not CSR.*preprocess"):
            collect_moments(path, pd.Index(GENES))


def test_a_label_with_one_cell_and_missing_controls_are_refused(tmp_path):
    def write(labels):
        obs = pd.DataFrame({"perturbation": labels}, index=[f"c{i}" for i in range(len(labels))])
        X = sparse.csr_matrix(np.ones((len(labels), 2), dtype=np.float32))
        ad.AnnData(X, obs=obs, var=pd.DataFrame(index=["A", "B"])).write_h5ad(tmp_path / "few.h5ad")
        return tmp_path / "few.h5ad"

    with pytest.raises(
        InputError, match=r"few\.h5ad, perturbation 'A'.*one cell.*min_cells_per_perturbation"
    ):
        collect_moments(write(["control", "control", "A"]), pd.Index(["A"]))
    with pytest.raises(InputError, match="no cell labelled 'control'"):
        collect_moments(write(["A", "A", "B", "B"]), pd.Index(["A"]))
