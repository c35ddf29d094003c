"""Genetic interactions: what is true, what is called, and the share found at 10 % false calls."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from evaluation_case import random_truth
from scipy import stats

from biojepa.evaluation import interaction as module
from biojepa.evaluation.interaction import expressed_genes, interaction_tpr, true_interactions

ONCE = np.ones((1, 3))


def combinations(difference, error=0.01, n_single=1, additive=1.0, **changes):
    """Combinations with an observed difference from the additive mean of known error, and some singles."""
    difference = np.asarray(difference, dtype=float)
    n, genes = difference.shape
    truth = random_truth(n=n + n_single, genes=genes)
    with_singles = np.full((n + n_single, genes), np.nan)
    with_singles[:n] = additive
    half_b = truth.half_b.copy()
    half_b[:n] = additive + difference
    variance = np.full((n + n_single, genes), 12 * error**2 / 2)
    return replace(
        truth, half_b=half_b, additive=with_singles, var_b=variance, control_var=0 * truth.control_var,
        additive_var=np.where(np.isnan(with_singles), np.nan, error**2 / 2), **changes,
    )  # fmt: skip


def by_hand():
    """Six true interactions of size 0.5 in two combinations, standard error 0.01."""
    observed = np.zeros((2, 10))
    observed[0, :4] = [0.5, 0.5, -0.5, -0.5]
    observed[1, :2] = 0.5
    said = np.zeros((3, 10))
    said[0, [0, 1, 2, 3, 4]] = [0.9, 0.8, -0.7, -0.25, 0.3]
    said[1, [0, 1, 5]] = [0.6, 0.1, 0.5]
    truth = combinations(observed)
    return truth, np.where(np.isnan(truth.additive), truth.half_b, truth.additive + said)


def test_share_found_before_one_call_in_ten_is_false_by_hand():
    """By size: 0.9 ✓ 0.8 ✓ 0.7 ✓ 0.6 ✓ | 0.5 ✗ 0.3 ✗ 0.25 ✓ 0.1 ✓: four of six before the first false one."""
    truth, guess = by_hand()
    rows, signs = true_interactions(truth)
    assert rows.tolist() == [0, 1]
    in_order = np.zeros(10)
    in_order[expressed_genes(truth)] = signs[0]
    assert in_order.tolist() == [1, 1, -1, -1, 0, 0, 0, 0, 0, 0]
    assert interaction_tpr(guess, truth, ONCE).tolist() == [4 / 6]
    weights = np.array([[2.0, 0, 1], [0, 3, 0], [0, 0, 1]])
    # First combination alone: 3 of 4; second alone: 1 of 2; no combination: nothing to find.
    assert interaction_tpr(guess, truth, weights) == pytest.approx([3 / 4, 1 / 2, np.nan], nan_ok=True)


def test_a_call_of_the_wrong_sign_is_false():
    truth, guess = by_hand()
    guess[0, 2] += 1.4
    assert interaction_tpr(guess, truth, ONCE).tolist() == [2 / 6]


def test_exactly_one_false_call_in_ten_is_allowed():
    """Ten true interactions and one false call at each place: found is what precedes a false share > 0.1."""
    for place, expected in ((0, 1.0), (8, 1.0), (9, 1.0), (10, 1.0)):
        assert _found_with_a_false_call_at(place, 10) == expected
    # Of eight true ones, a false call that comes sixth leaves 1/6 to 1/9 false: the first five count.
    assert _found_with_a_false_call_at(5, 8) == 5 / 8
    # Of nine, 1/10 is reached at the end.
    assert _found_with_a_false_call_at(5, 9) == 1.0


def _found_with_a_false_call_at(place, n_true):
    """Score a prediction whose calls, by falling size, are all true but one."""
    observed = np.insert(np.full(n_true, 0.5), place, 0.0)[None]
    truth = combinations(observed)
    guess = np.vstack([1.0 + np.linspace(2.0, 1.0, n_true + 1), truth.half_b[1]])
    return interaction_tpr(guess, truth, np.ones((1, 2)))[0]


def test_the_additive_model_and_no_combination_find_nothing():
    truth, guess = by_hand()
    stored = np.where(np.isnan(truth.additive), guess, truth.additive).astype(np.float32).astype(float)
    assert interaction_tpr(stored, truth, ONCE).tolist() == [0.0]
    assert np.isnan(interaction_tpr(guess, random_truth(n=3, genes=10), ONCE)).all()
    assert np.isnan(interaction_tpr(guess, combinations(np.zeros((2, 10))), ONCE)).all()


def test_a_sum_of_singles_below_zero_is_zero_and_no_interaction():
    """A mean of log1p values cannot be negative: the additive model predicts 0 there, and 0 is observed."""
    truth = combinations(np.zeros((2, 10)))
    truth.additive[:2, 0], truth.half_b[:2, 0] = -0.4, 0.0
    assert not true_interactions(truth)[1].any()
    truth.half_b[0, 0] = 0.3
    assert true_interactions(truth)[1].sum() == 1


def test_true_interactions_are_z_tests_with_benjamini_hochberg():
    from statsmodels.stats import multitest

    rng = np.random.default_rng(3)
    base = random_truth(seed=2, n=6, genes=40)
    additive = base.half_b + rng.normal(0, 0.6, base.half_b.shape)
    additive_var = rng.uniform(0.005, 0.05, additive.shape)
    truth = replace(base, additive=additive, additive_var=additive_var)
    rows, signs = true_interactions(truth)
    order = np.argsort(-base.control_mean, kind="stable")
    for row in rows:
        z = [
            (base.half_b[row, g] - max(additive[row, g], 0.0))
            / np.sqrt(max(base.var_b[row, g], base.control_var[g]) / 12 + additive_var[row, g])
            for g in order
        ]
        expected = multitest.multipletests(2 * stats.norm.sf(np.abs(z)), 0.05, method="fdr_bh")[0]
        assert (signs[row] == np.where(expected, np.sign(z), 0)).all()
    assert 0 < np.abs(signs).mean() < 1


@pytest.mark.parametrize("most", [10_000, 40])
def test_curve_equals_a_loop_over_all_thresholds(monkeypatch, most):
    """Pooled pairs, combinations repeated as often as they were drawn; few thresholds come close."""
    monkeypatch.setattr(module, "MAX_THRESHOLDS", most)
    rng = np.random.default_rng(0)
    observed = np.where(rng.random((5, 60)) < 0.4, rng.choice([-0.5, 0.5], (5, 60)), 0.0)
    truth = combinations(observed)
    guess = truth.half_b.copy()
    guess[:5] = 1.0 + (observed + rng.normal(0, 0.35, observed.shape)).round(2)  # with ties
    weights = np.vstack([np.ones(6), rng.multinomial(6, np.full(6, 1 / 6), size=20)]).astype(float)
    order = np.argsort(-truth.control_mean, kind="stable")
    for value, weight in zip(interaction_tpr(guess, truth, weights), weights, strict=True):
        drawn = np.repeat(np.arange(5), weight[:5].astype(int))
        said, real = (guess - 1.0)[drawn][:, order].ravel(), observed[drawn][:, order].ravel()
        best = 0.0
        for threshold in np.unique(np.abs(said)[np.abs(said) > 1e-4]):
            called = np.abs(said) >= threshold
            hits = (called & (np.sign(said) == np.sign(real))).sum()
            if 1 - hits / called.sum() <= 0.1:
                best = max(best, hits / (real != 0).sum())
        # 40 thresholds over at most some 120 true calls: about three calls apart.
        assert value == pytest.approx(best, abs=1e-12 if most > 1000 else 6 / (real != 0).sum())


def test_only_the_most_expressed_genes_are_looked_at(monkeypatch):
    monkeypatch.setattr(module, "EXPRESSED_GENES", 4)
    truth, guess = by_hand()
    kept = replace(truth, control_mean=np.array([0.1, 5, 5, 0.2, 5, 5, 0, 0, 0, 0]))
    # Genes 1, 2, 4, 5: true 1 and 2 of the first and 1 of the second; calls 0.8 ✓ 0.7 ✓ 0.5 ✗.
    assert interaction_tpr(guess, kept, ONCE) == pytest.approx([2 / 3])
