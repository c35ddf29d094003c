"""Claims about the linear branch: two views averaged, and a perturbation's own target apart."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from training_case import KnownEffects, pairs_of

from biojepa.baselines import fit_linear_branch
from biojepa.linear import AdditiveKernelRidge, Components, ComponentwiseKernelRidge
from biojepa.linear_branch import LinearBranch, OwnTarget, fit_branch
from biojepa.pairs import Pairs, multi_hot, trainable_labels

CASE = KnownEffects(seed=0)
TRAIN = trainable_labels(CASE.pairs)
RNG = np.random.default_rng(1)
READOUT = RNG.standard_normal((6, len(CASE.pairs.genes)))
TOKEN_CHANGE = RNG.standard_normal((len(TRAIN), 6))


def moments(pairs: Pairs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    means, control = pairs.pseudobulk()
    cells = pairs.dense(np.flatnonzero(pairs.perturbation == -1))
    return means - control, control, cells.var(axis=0)


def fitted(share: float = 0.5, pairs: Pairs = CASE.pairs):
    delta, control, variance = moments(pairs)
    return fit_branch(pairs, TRAIN, delta[TRAIN], TOKEN_CHANGE, control, variance, READOUT, share)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_change_is_the_average_of_two_ridges_fitted_apart(share):
    branch, _ = fitted(share)
    pairs, everything = CASE.pairs, np.arange(len(CASE.pairs.labels))
    delta, _, _ = moments(pairs)
    direct = fit_linear_branch(pairs, TRAIN, delta[TRAIN])
    latent = ComponentwiseKernelRidge(direct.components).fit(TRAIN, TOKEN_CHANGE, pairs.n_cells[TRAIN])
    tokens = latent.predict(everything)
    expected = (1 - share) * direct.predict(everything) + share * tokens @ READOUT
    np.testing.assert_allclose(branch.change(pairs.membership, pairs.codes, READOUT), expected, atol=1e-8)
    np.testing.assert_allclose(branch.token_change(pairs.membership, pairs.codes), tokens, atol=1e-8)
    sd = direct.standard_deviation(everything)
    found = branch.uncertainty(pairs.codes).standard_deviation(pairs.membership)
    np.testing.assert_allclose(found, sd, atol=1e-7)


def test_combinations_outside_the_screen_get_what_the_kernels_say_of_them():
    """A screen in which the combination is a label without cells gives the same prediction."""
    branch, _ = fitted()
    asked = multi_hot(["P01+P07"], CASE.pairs.perturbed_genes)
    wider = np.vstack([CASE.pairs.membership, asked])
    delta, _, _ = moments(CASE.pairs)
    separate = branch.separate
    model = AdditiveKernelRidge(Components.of(wider, CASE.pairs.codes, separate))
    model.fit(TRAIN, delta[TRAIN], CASE.pairs.n_cells[TRAIN])
    expected = model.predict(np.array([len(wider) - 1]))
    alone = replace(branch, share=0.0)
    np.testing.assert_allclose(alone.change(asked, CASE.pairs.codes, READOUT), expected, atol=1e-8)


def test_control_does_not_change():
    branch, _ = fitted()
    control = np.zeros((1, len(CASE.pairs.perturbed_genes)))
    assert not branch.change(control, CASE.pairs.codes, READOUT).any()
    assert not branch.token_change(control, CASE.pairs.codes).any()
    assert not branch.uncertainty(CASE.pairs.codes).standard_deviation(control).any()


def test_left_out_predictions_are_those_of_both_views():
    _, left_out = fitted(0.3)
    delta, _, _ = moments(CASE.pairs)
    direct = fit_linear_branch(CASE.pairs, TRAIN, delta[TRAIN])
    latent = ComponentwiseKernelRidge(direct.components)
    tokens = latent.fit(TRAIN, TOKEN_CHANGE, CASE.pairs.n_cells[TRAIN]).leave_one_out()
    np.testing.assert_allclose(left_out.tokens, tokens, atol=1e-8)
    expected = 0.7 * direct.leave_one_out() + 0.3 * tokens @ READOUT
    np.testing.assert_allclose(left_out.expression, expected, atol=1e-8)


def test_a_componentwise_ridge_is_a_ridge_of_each_principal_score():
    components = Components.of(CASE.pairs.membership, CASE.pairs.codes)
    everything, n_cells = np.arange(len(CASE.pairs.labels)), CASE.pairs.n_cells[TRAIN]
    model = ComponentwiseKernelRidge(components, n_leading=2).fit(TRAIN, TOKEN_CHANGE, n_cells)
    values, vectors = np.linalg.eigh(TOKEN_CHANGE.T @ TOKEN_CHANGE)
    vectors = vectors[:, np.argsort(-values)]
    expected = 0
    for group in (vectors[:, :1], vectors[:, 1:2], vectors[:, 2:]):
        ridge = AdditiveKernelRidge(components).fit(TRAIN, TOKEN_CHANGE @ group, n_cells)
        expected = expected + ridge.predict(everything) @ group.T
    # The search for the weights begins elsewhere, so it ends a little elsewhere.
    np.testing.assert_allclose(model.predict(everything), expected, atol=2e-3)
    assert np.abs(model.predict(everything)).max() > 0.1


def screen(own: np.ndarray, control: np.ndarray, n_cells: int = 50, seed: int = 0) -> Pairs:
    """Perturbed genes that are measured: each changes gene 0 by one, and itself by ``own``."""
    rng = np.random.default_rng(seed)
    genes = ["X", *(f"G{i}" for i in range(len(own)))]
    blocks = [control + 0.3 * rng.standard_normal((600, len(genes)))]
    labels = ["control"] * 600
    for i, change in enumerate(own):
        cells = control + 0.3 * rng.standard_normal((n_cells, len(genes)))
        cells[:, 0] += 1
        cells[:, i + 1] += change
        blocks.append(cells)
        labels += [genes[i + 1]] * n_cells
    sets = dict.fromkeys(genes[1:], "train")
    unseen = {"G0": "test"}
    carried = np.array([label not in unseen for label in labels])
    return pairs_of(np.vstack(blocks)[carried], np.array(labels)[carried], sets | unseen, genes=genes)


def own_target(pairs: Pairs) -> OwnTarget:
    delta, control, variance = moments(pairs)
    train = trainable_labels(pairs)
    return OwnTarget.fit(pairs, train, delta[train], control, variance)


def test_an_unseen_gene_gets_the_typical_change_of_targets():
    control = np.full(12, 3.0)
    own = own_target(screen(np.full(11, -1.2), control))
    assert own.change[0] == pytest.approx(-1.2, abs=0.03)
    pairs = screen(np.full(11, -1.2), control)
    assert [pairs.genes[column] for column in own.column] == list(pairs.perturbed_genes)
    np.testing.assert_allclose(own.change, -1.2, atol=0.12)


def test_a_change_in_proportion_to_expression_is_told_from_a_constant_one():
    control = np.linspace(1, 4, 12)
    own = own_target(screen(-0.5 * control[1:], control))
    assert own.change[0] == pytest.approx(-0.5 * control[1], abs=0.04)


def test_a_trained_gene_keeps_what_was_measured_of_it():
    changes = np.array([0.0, -1.0, -1.0, -1.0, -1.0, -1.0, -1.0, 0.5])
    own = own_target(screen(changes, np.full(9, 3.0)))
    assert own.change[7] == pytest.approx(0.5, abs=0.1)
    assert -1.1 < own.change[0] < -0.5


def test_targets_that_do_not_change_are_left_alone():
    own = own_target(screen(np.zeros(12), np.full(13, 3.0)))
    assert abs(own.change[0]) < 0.05


def test_a_target_that_is_not_measured_has_no_column_and_changes_nothing():
    pairs = screen(np.full(8, -1.0), np.full(9, 3.0))
    hidden = replace(pairs, genes=("X", "OTHER", *pairs.genes[2:]))
    own = own_target(hidden)
    assert own.column[0] == -1 and own.change[0] == 0
    few = replace(pairs, genes=("X", "G0", "G1", *(f"Y{i}" for i in range(6))))
    assert not own_target(few).change.any()  # one trained target is no basis


def test_own_changes_are_taken_out_of_training_and_put_back_for_the_target_alone():
    pairs = screen(np.full(8, -1.5), np.full(9, 3.0))
    delta, control, variance = moments(pairs)
    train = trainable_labels(pairs)
    own = own_target(pairs)
    without = own.without(pairs, train, delta[train])
    others = np.array(
        [np.delete(delta[train], i, axis=0)[:, label + 1].mean() for i, label in enumerate(train)]
    )
    np.testing.assert_allclose(without[np.arange(len(train)), train + 1], others, atol=1e-9)
    assert np.abs(others).max() < 0.1
    changed = without != delta[train]
    assert changed.sum() == len(train)
    branch, _ = fit_branch(
        pairs, train, delta[train], np.zeros((len(train), 2)), control, variance, np.zeros((2, 9)), 0.0
    )
    change = branch.change(pairs.membership, pairs.codes, np.zeros((2, 9)))
    assert change[0, 1] == pytest.approx(-1.5, abs=0.15)  # G0, which no training cell carries
    assert np.abs(np.delete(change[0], [0, 1])).max() < 0.1


def test_the_state_makes_an_equal_branch():
    branch, _ = fitted()
    again = LinearBranch(**branch.state())
    asked = CASE.pairs.membership
    np.testing.assert_array_equal(
        again.change(asked, CASE.pairs.codes, READOUT), branch.change(asked, CASE.pairs.codes, READOUT)
    )
