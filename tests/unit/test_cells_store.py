"""Claims about the cells kept on the device, and about the populations drawn from them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from training_case import KnownEffects, pairs_of

from biojepa.pairs import CONTROL_CODE
from biojepa.training import cells as cells_module
from biojepa.training.cells import LAYOUTS, CellStore, Populations

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pairs():
    return KnownEffects(seed=1, cells_per_label=12, n_controls=50).pairs


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_are_those_of_the_dense_matrix_in_any_order_and_number(pairs, layout):
    store = CellStore(pairs, CPU, layout)
    assert len(store) == len(pairs.perturbation)
    for cells in ([7], [3, 3, 0, len(store) - 1, 5], list(range(len(store)))):
        wanted = np.array(cells)
        np.testing.assert_array_equal(store.rows(torch.from_numpy(wanted)), pairs.dense(wanted))


def test_rows_padded_to_the_longest_are_the_same(pairs):
    store, cells = CellStore(pairs, CPU, "sparse"), torch.tensor([5, 0, 5, len(pairs.perturbation) - 1])
    assert torch.equal(store._padded(cells), store.rows(cells))


def test_rows_that_were_named_before_are_given_once_and_others_never(pairs):
    store, cells, others = CellStore(pairs, CPU, "host"), torch.tensor([1, 2]), torch.tensor([3, 4])
    store.prefetch(cells, "first")
    np.testing.assert_array_equal(store.rows(others, "second"), pairs.dense(others.numpy()))
    np.testing.assert_array_equal(store.rows(cells, "first"), pairs.dense(cells.numpy()))
    np.testing.assert_array_equal(store.rows(others, "first"), pairs.dense(others.numpy()))


def test_many_cells_are_kept_sparse_and_an_unknown_layout_is_refused(pairs, monkeypatch):
    assert CellStore(pairs, CPU).layout == "dense"
    monkeypatch.setattr(cells_module, "CPU_DENSE", 4 * len(pairs.perturbation) * len(pairs.genes) - 1)
    assert CellStore(pairs, CPU).layout == "sparse"
    with pytest.raises(ValueError, match="layout is 'csr'; expected one of dense, sparse, host"):
        CellStore(pairs, CPU, "csr")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cells_without_any_count_are_rows_of_zeros(layout):
    expression = np.array([[0, 0, 0], [0, 2, 0], [0, 0, 0], [1, 0, 3]])
    store = CellStore(pairs_of(expression, ["control", "A", "A", "control"], {"A": "train"}), CPU, layout)
    np.testing.assert_array_equal(store.rows(torch.tensor([2, 3, 0, 1])), expression[[2, 3, 0, 1]])
    assert not store.rows(torch.tensor([0, 2])).any()


def test_moments_agree_with_numpy_however_the_cells_are_cut(pairs):
    store, cells = CellStore(pairs, CPU), np.arange(0, 300, 3)
    dense = pairs.dense(cells).astype(float)
    for block in (7, 4096):
        mean, deviation = store.moments(torch.from_numpy(cells), block)
        np.testing.assert_allclose(mean, dense.mean(axis=0), rtol=1e-5)
        np.testing.assert_allclose(deviation, dense.std(axis=0), rtol=1e-4)


def test_drawn_cells_carry_the_label_and_their_controls_share_the_batch(pairs):
    torch.manual_seed(0)
    populations = Populations(pairs, CPU)
    carried = np.flatnonzero(pairs.n_cells)
    labels = torch.from_numpy(carried).repeat(3)
    cells, controls = populations.draw(labels, 40)
    assert cells.shape == controls.shape == (len(labels), 40)
    assert (pairs.perturbation[cells] == labels.numpy()[:, None]).all()
    assert (pairs.perturbation[controls] == CONTROL_CODE).all()
    np.testing.assert_array_equal(pairs.batch[controls], pairs.batch[cells])


def test_every_cell_of_a_label_and_every_control_of_a_batch_is_drawn_alike(pairs):
    torch.manual_seed(0)
    cells, controls = Populations(pairs, CPU).draw(torch.tensor([2]), 60_000)
    own = np.flatnonzero(pairs.perturbation == 2)
    counts = np.bincount(cells.numpy().ravel(), minlength=len(pairs.perturbation))[own]
    assert counts.sum() == 60_000 and stats.chisquare(counts).pvalue > 1e-3
    in_batch = np.flatnonzero((pairs.perturbation == CONTROL_CODE) & (pairs.batch == 0))
    counts = np.bincount(controls.numpy().ravel(), minlength=len(pairs.perturbation))[in_batch]
    assert (counts > 0).all() and stats.chisquare(counts).pvalue > 1e-3


def test_a_batch_without_controls_borrows_from_all_of_them():
    labels = ["control", "A", "control", "A", "A"]
    pairs = pairs_of(np.ones((5, 2)), labels, {"A": "train"}, batch_of_cell=[0, 1, 2, 1, 0])
    torch.manual_seed(0)
    controls = Populations(pairs, CPU).draw_controls(torch.tensor([1] * 200))
    assert set(controls.tolist()) == {0, 2}
    assert set(Populations(pairs, CPU).draw_controls(torch.tensor([2] * 50)).tolist()) == {2}
