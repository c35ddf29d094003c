"""The truth of a fold: what it is computed from, and what may never enter it."""

from __future__ import annotations

from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from evaluation_case import GENES, LABELS, Screen, random_truth
from scipy import sparse, stats

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


def test_error_of_the_additive_reference_follows_from_its_parts(screen):
    """Var(a + b − c) = Var(a)/n + Var(b)/n + Var(c)/n, with singles at least as variable as control."""
    truth = assemble_fold_of(screen, test="G0+G1")
    cells = {label: screen.X[screen.labels == label].astype(float) for label in ("control", "G0", "G1")}
    floor = cells["control"].var(axis=0, ddof=1)
    expected = floor / len(cells["control"])
    for label in ("G0", "G1"):
        expected = expected + np.maximum(cells[label].var(axis=0, ddof=1), floor) / len(cells[label])
    assert truth.additive_var[0] == pytest.approx(expected)
    assert assemble_fold_of(screen, test="G3").additive_var is None


def test_top_genes_are_those_of_largest_t_and_the_earlier_of_equal_ones():
    rng = np.random.default_rng(1)
    for values in (rng.normal(size=50), rng.integers(0, 4, 50).astype(float), np.zeros(50)):
        expected = np.argsort(-values, kind="stable")[:20]
        assert module._largest(values, 20).tolist() == expected.tolist()


def test_significance_is_that_of_all_p_values_though_only_small_ones_are_computed():
    for fdr in (0.01, 0.05, 0.4):
        truth = random_truth(seed=7, n=6, genes=200, fdr=fdr)
        # Most genes changed, so that p-values up to nearly the level are rejected.
        changes = np.linspace(0.0, 3.0, 200) * np.sqrt(truth.control_var / 12)
        half_b = truth.control_mean + np.tile(3.0 * changes, (6, 1))
        truth = replace(truth, half_b=half_b, var_b=np.tile(truth.control_var, (6, 1)))
        with np.errstate(divide="ignore", invalid="ignore"):
            p_values = stats.ttest_ind_from_stats(
                truth.half_b, np.sqrt(truth.floored(truth.var_b)), 12,
                truth.control_mean, np.sqrt(truth.control_var), 60, equal_var=False,
            ).pvalue  # fmt: skip
        assert (truth.significant == (stats.false_discovery_control(p_values, axis=1) < fdr)).all()
        assert truth.significant.any()


def test_one_cell_in_a_half_makes_nothing_significant():
    """Welch's t needs a variance: with one cell there is no degree of freedom, and no error either."""
    lone = np.array([1] + [12] * 8)
    truth = random_truth(seed=4, n_a=lone, n_b=lone)
    assert not truth.significant[0].any()
    assert (truth.significant[1:] == random_truth(seed=4).significant[1:]).all()


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
