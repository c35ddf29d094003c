"""Claims about the baseline `other_screen`, worked out by hand."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from training_case import pairs_of

from biojepa.baselines import fit_baselines
from biojepa.other_screen import OtherScreen, predict_from_screens
from biojepa.responses import read_other_screens
from biojepa.splits import LeakageError

PERTURBED, GENES = ("A", "B", "C", "D"), ("X", "Y", "Z")
LABELS = ("A", "B", "A+B", "C", "A+D", "D")
MEMBERSHIP = np.array(
    [[1, 0, 0, 0], [0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 1], [0, 0, 0, 1]], float
)
TRAIN = np.array([0, 1])
# Training changes over X, Y, Z, and what the same genes changed elsewhere, where Z is not measured.
DELTA = np.array([[2.0, 0.0, 5.0], [0.0, 4.0, 1.0]])
MEAN = DELTA.mean(axis=0)
ELSEWHERE = OtherScreen(
    ("C", "A", "B", "Q"),
    ("Y", "W", "X"),
    np.array([[3.0, 9.0, -1.0], [0.0, 9.0, 1.0], [1.0, 9.0, 0.0], [7.0, 7.0, 7.0]]),
)
# Over X and Y: A is (1, 0) there and (2, 0) here, B is (0, 1) there and (0, 4) here.
SCALE = (1 * 2 + 1 * 4) / (1 + 1)
EXPLAINED = SCALE * 6 / (4 + 16)


def predicted(screens, delta=DELTA, train=TRAIN) -> dict[str, np.ndarray]:
    return dict(
        zip(LABELS, predict_from_screens(screens, MEMBERSHIP, PERTURBED, GENES, train, delta), strict=True)
    )


def test_scale_missing_genes_and_combinations_by_hand():
    delta = predicted({"elsewhere": ELSEWHERE})
    assert SCALE == 3
    np.testing.assert_allclose(delta["A"], [3, 0, MEAN[2]])
    np.testing.assert_allclose(delta["C"], [-3, 9, MEAN[2]])
    np.testing.assert_allclose(delta["A+B"], [3, 3, MEAN[2]])
    np.testing.assert_allclose(delta["A+D"], [3, 0, MEAN[2]])  # D is not known and adds nothing
    np.testing.assert_allclose(delta["D"], MEAN)


def test_the_scale_is_least_squares_on_the_training_labels_it_knows_and_no_other():
    rng = np.random.default_rng(0)
    train = np.array([0, 1, 2, 5])  # D is trained and not known there
    delta = rng.standard_normal((4, 3))
    there = {"A": [1.0, 0.0], "B": [0.0, 1.0], "C": [-1.0, 3.0], "A+B": [1.0, 1.0]}
    x = np.concatenate([there[name] for name in ("A", "B", "A+B")])
    scale = np.linalg.lstsq(x[:, None], np.abs(delta)[:3, :2].ravel(), rcond=None)[0][0]
    found = predicted({"elsewhere": ELSEWHERE}, np.abs(delta), train)
    np.testing.assert_allclose(found["C"][:2], scale * np.array(there["C"]))
    changed = np.abs(delta)
    changed[3] += 10  # enters the training mean and not the scale
    again = predicted({"elsewhere": ELSEWHERE}, changed, train)
    np.testing.assert_allclose(again["C"][:2], found["C"][:2])
    np.testing.assert_allclose(again["D"], changed.mean(axis=0))


def test_a_screen_that_runs_against_this_one_or_shares_nothing_says_nothing():
    against = OtherScreen(ELSEWHERE.perturbed, ELSEWHERE.measured, -ELSEWHERE.changes)
    strange = OtherScreen(("Q",), ("W",), np.ones((1, 1)))
    still = OtherScreen(("A", "B", "C"), GENES, np.zeros((3, 3)))
    untrained = OtherScreen(("C",), GENES, np.ones((1, 3)))
    for screen in (against, strange, still, untrained):
        for delta in predicted({"one": screen}).values():
            np.testing.assert_allclose(delta, MEAN)


def test_several_screens_are_averaged_by_what_they_explain_gene_by_gene():
    # Knows A alone, all of its genes, and predicts it without error.
    second = OtherScreen(("A", "D"), GENES, np.array([[4.0, 0.0, 10.0], [2.0, 2.0, 2.0]]))
    delta = predicted({"elsewhere": ELSEWHERE, "second": second})
    assert pytest.approx(0.9) == EXPLAINED
    first, other = np.array([3.0, 0.0]), np.array([2.0, 0.0])
    np.testing.assert_allclose(delta["A"][:2], (EXPLAINED * first + other) / (EXPLAINED + 1))
    np.testing.assert_allclose(delta["A"][2], 5)  # measured by the second alone
    np.testing.assert_allclose(delta["D"], [1, 1, 1])  # known to the second alone
    np.testing.assert_allclose(delta["C"], [-3, 9, MEAN[2]])  # known to the first alone
    turned = predicted({"second": second, "elsewhere": ELSEWHERE})
    for name in LABELS:
        np.testing.assert_allclose(turned[name], delta[name])


def write_cells(path: Path, labels: list[str], X: np.ndarray, genes: list[str], name: str) -> Path:
    obs = pd.DataFrame(
        {"perturbation": pd.Categorical(labels)}, index=[f"{name}{i}" for i in range(len(labels))]
    )
    ad.AnnData(sparse.csr_matrix(X.astype(np.float32)), obs, pd.DataFrame(index=genes)).write_h5ad(path)
    return path


def test_the_baseline_reads_the_other_screen_and_predicts_what_no_cell_here_shows(tmp_path):
    there = ["control", "control", "A", "A", "B", "E", "A+B"]
    X = np.array([[1, 1, 1], [1, 1, 1], [2, 1, 0], [2, 1, 2], [1, 3, 1], [1, 1, 4], [9, 9, 9]])
    other = write_cells(tmp_path / "other.h5ad", there, X, ["M", "N", "B"], "there")
    own = write_cells(tmp_path / "cells.h5ad", ["control", "A"], np.ones((2, 2)), ["B", "M"], "here")
    screens = read_other_screens(own, {"other": other})
    assert screens["other"].perturbed == ("A", "B", "E")
    assert screens["other"].measured == ("M", "N", "B")
    np.testing.assert_allclose(screens["other"].changes, [[1, 0, 0], [0, 2, 0], [0, 0, 3]])
    here = ["control", "control", "A", "C"]
    expression = np.array([[1, 1], [1, 1], [1, 3], [3, 1]])  # B and M
    sets = {"A": "train", "C": "train", "E": "test", "A+E": "test", "F": "test"}
    pairs = pairs_of(expression, here, sets, genes=["B", "M"])
    fitted = fit_baselines(pairs, ["other_screen"], screens=screens)["other_screen"].delta
    delta = dict(zip(pairs.labels, fitted, strict=True))
    # A changes M by 1 there and by 2 here: the scale is 2.
    np.testing.assert_allclose(delta["A"], [0, 2], atol=1e-6)
    np.testing.assert_allclose(delta["E"], [6, 0], atol=1e-6)
    np.testing.assert_allclose(delta["A+E"], [6, 2], atol=1e-6)
    np.testing.assert_allclose(delta["F"], [1, 1], atol=1e-6)


def test_a_copy_of_this_screen_is_refused_whatever_it_is_called(tmp_path):
    rng = np.random.default_rng(0)
    labels = ["control"] * 10 + ["A"] * 10 + ["B"] * 10
    counts = rng.poisson(2.0, (30, 20)) + 1
    genes = [f"G{i}" for i in range(20)]
    own = write_cells(tmp_path / "cells.h5ad", labels, np.log1p(counts), genes, "c")
    copy = write_cells(tmp_path / "copy.h5ad", labels, np.log1p(3 * counts), genes, "c")
    with pytest.raises(LeakageError, match=r"copy\.h5ad holds about 100% of the perturbed cells"):
        read_other_screens(own, {"copy": copy})
    fresh = rng.poisson(2.0, (30, 20)) + 1
    another = write_cells(tmp_path / "another.h5ad", labels, np.log1p(fresh), genes, "c")
    assert set(read_other_screens(own, {"another": another})) == {"another"}


def test_a_copy_under_other_cell_names_in_another_order_with_other_genes_is_refused(tmp_path):
    rng = np.random.default_rng(1)
    labels = ["control"] * 40 + ["A"] * 80 + ["B"] * 80
    counts = rng.poisson(0.7, (200, 60))
    genes = [f"G{i}" for i in range(60)]
    own = write_cells(tmp_path / "cells.h5ad", labels, np.log1p(counts), genes, "c")
    order, kept = rng.permutation(200), rng.permutation(60)[:50]
    renamed = write_cells(
        tmp_path / "renamed.h5ad",
        [labels[row] for row in order],
        np.log1p(2.5 * counts[order][:, kept]),
        [genes[column] for column in kept],
        "renamed",
    )
    with pytest.raises(LeakageError, match=r"renamed\.h5ad holds about .*0 have the same name"):
        read_other_screens(own, {"renamed": renamed})
    # Three copied cells of 160 are more than one in a hundred; controls may be shared.
    other = rng.poisson(0.7, (200, 60))
    other[:40] = counts[:40]
    path = write_cells(tmp_path / "controls.h5ad", labels, np.log1p(other), genes, "x")
    assert set(read_other_screens(own, {"controls": path})) == {"controls"}
    other[100:103] = counts[50:53]
    path = write_cells(tmp_path / "some.h5ad", labels, np.log1p(other), genes, "x")
    with pytest.raises(LeakageError, match=r"3 of 160 compared by content alone"):
        read_other_screens(own, {"some": path})


def test_without_another_screen_the_baseline_cannot_be_asked_for():
    pairs = pairs_of(np.ones((2, 2)), ["control", "A"], {"A": "train"})
    with pytest.raises(ValueError, match="other_screen needs the responses of another screen"):
        fit_baselines(pairs, ["mean", "other_screen"])
