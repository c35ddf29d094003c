"""Claims about the baseline `mlp`, on effects that are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from training_case import KnownEffects, pairs_of

from biojepa.additive_network import NetworkSettings, fit_additive_network
from biojepa.baselines import fit_baselines
from biojepa.contracts import CONTROL

N_GENES, CODE_DIM, OUTPUTS = 120, 4, 40


class Planted:
    """Changes that are sums over genes of a function of their codes, the first half of it curved."""

    def __init__(self, seed: int = 0, noise: float = 0.05) -> None:
        rng = np.random.default_rng(seed)
        self.codes = rng.standard_normal((N_GENES, CODE_DIM))
        loading = rng.standard_normal((2 * CODE_DIM, OUTPUTS)) / 3
        self.of_gene = np.hstack([np.abs(self.codes) - 0.8, self.codes]) @ loading
        singles = np.eye(N_GENES)
        pairs = singles[rng.permutation(N_GENES)[:20]] + singles[rng.permutation(N_GENES)[:20]]
        self.membership = np.minimum(np.vstack([singles, pairs]), 1)
        self.truth = self.membership @ self.of_gene
        # Singles of the last genes are held out, and with them all pairs that hold one.
        unseen = self.membership[:, 100:].any(axis=1)
        self.test = np.flatnonzero(unseen)
        seen = np.flatnonzero(~unseen)
        self.validation, self.train = seen[80:95], np.setdiff1d(seen, seen[80:95])
        self.measured = self.truth + noise * rng.standard_normal(self.truth.shape)

    def fit(self, seed: int = 0, **changes) -> np.ndarray:
        given = {
            "codes": {"net": self.codes},
            "delta": self.measured[self.train],
            "validation": self.validation,
            "validation_delta": self.measured[self.validation],
        } | changes
        return fit_additive_network(self.membership, train=self.train, seed=seed, **given)


@pytest.fixture(scope="module")
def planted() -> Planted:
    return Planted()


def relative_error(prediction: np.ndarray, truth: np.ndarray) -> float:
    return float(((prediction - truth) ** 2).sum() / (truth**2).sum())


def test_it_learns_a_curved_function_of_the_codes_that_no_linear_model_can(planted):
    test = planted.test
    network = relative_error(planted.fit()[test], planted.truth[test])
    X = np.hstack([planted.membership @ planted.codes, planted.membership.sum(axis=1, keepdims=True)])
    linear = X @ np.linalg.lstsq(X[planted.train], planted.measured[planted.train], rcond=None)[0]
    assert network < 0.2
    assert network < 0.5 * relative_error(linear[test], planted.truth[test])


def test_a_combination_is_the_sum_of_its_genes_and_nothing_perturbed_is_control(planted):
    delta = planted.fit()
    singles, pairs = delta[:N_GENES], planted.membership[N_GENES:]
    np.testing.assert_allclose(delta[N_GENES:], pairs @ singles, atol=1e-10)
    nothing = fit_additive_network(
        np.vstack([planted.membership, np.zeros(N_GENES)]),
        {"net": planted.codes},
        planted.train,
        planted.measured[planted.train],
        planted.validation,
        planted.measured[planted.validation],
    )[-1]
    np.testing.assert_array_equal(nothing, 0)


def test_without_codes_a_gene_has_its_own_offset_and_an_unseen_one_the_common_effect(planted):
    delta = planted.fit(codes={})
    unseen = delta[100:N_GENES]
    np.testing.assert_allclose(unseen, np.broadcast_to(unseen[0], unseen.shape), atol=1e-12)
    singles = planted.train[planted.train < N_GENES]
    before = relative_error(np.broadcast_to(unseen[0], (len(singles), OUTPUTS)), planted.truth[singles])
    assert relative_error(delta[singles], planted.truth[singles]) < 0.8 * before


def test_the_same_seed_gives_the_same_numbers_whatever_the_threads_and_another_does_not(planted):
    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    try:
        torch.set_num_threads(2)
        first = planted.fit(seed=3)
        assert torch.get_num_threads() == 2
        torch.set_num_threads(1)
        np.testing.assert_array_equal(first, planted.fit(seed=3))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(state, torch.random.get_rng_state()), "the draws of other models must not shift"
    assert not np.allclose(first, planted.fit(seed=4))


def test_validation_stops_the_training_and_teaches_nothing(planted):
    none = {"validation": np.array([], int), "validation_delta": np.empty((0, OUTPUTS))}
    free = planted.fit(**none)
    # Validation changes that run against those of training: the start, one effect of all genes, is best.
    reverse = planted.fit(validation_delta=-planted.measured[planted.validation])
    size = planted.membership.sum(axis=1)
    changes = planted.measured[planted.train]
    common = np.linalg.lstsq(size[planted.train][:, None], changes, rcond=None)[0]
    _, _, basis = np.linalg.svd(changes, full_matrices=False)
    common = np.outer(size, common @ basis[:32].T @ basis[:32])
    np.testing.assert_allclose(reverse, common, atol=1e-9)
    # As long as the best step is the same one, the changes themselves leave no trace.
    grown = [planted.fit(validation_delta=scale * planted.truth[planted.validation]) for scale in (50, 99)]
    np.testing.assert_array_equal(*grown)
    assert not np.allclose(free, grown[0])
    nothing = planted.fit(**none, settings=NetworkSettings(steps_without_validation=0))
    np.testing.assert_allclose(nothing, common, atol=1e-9)


def test_the_weights_kept_are_those_that_validated_best_and_not_the_last(planted):
    def error(steps: int) -> float:
        settings = NetworkSettings(steps=steps, evaluate_every=1, patience=steps + 1)
        delta = planted.fit(validation_delta=shifted, settings=settings)[planted.validation]
        return float(((delta - shifted) ** 2).sum())

    # Changes of half the size are passed on the way to the training changes.
    shifted = 0.5 * planted.truth[planted.validation]
    errors = [error(steps) for steps in (0, 5, 20, 80, 320)]
    assert errors == sorted(errors, reverse=True), "more steps can only find a better one"
    assert errors[-1] == errors[-2] < errors[0], "beyond the best one they change nothing"


def test_the_baseline_beats_the_mean_and_reads_no_cell_of_a_test_perturbation():
    case = KnownEffects(seed=0)
    assert not case.pairs.n_cells[case.test].any()
    fitted = fit_baselines(case.pairs, ["mean", "mlp"])
    errors = {
        name: float(((prediction.delta[case.test] - case.test_effect) ** 2).mean())
        for name, prediction in fitted.items()
    }
    assert errors["mlp"] < 0.5 * errors["mean"]


def test_a_fold_without_validation_cells_or_codes_is_fitted_too():
    rng = np.random.default_rng(0)
    labels = [CONTROL] * 6 + ["A"] * 3 + ["B"] * 3 + ["A+B"] * 3
    pairs = pairs_of(
        rng.uniform(1, 2, (len(labels), 5)),
        labels,
        {"A": "train", "B": "train", "A+B": "train", "C": "test"},
    )
    delta = fit_baselines(pairs, ["mlp"])["mlp"].delta
    assert np.isfinite(delta).all() and delta.any(axis=1).all()
    other = fit_baselines(replace(pairs, sets=("train",) * 3 + ("val",)), ["mlp"])["mlp"].delta
    np.testing.assert_array_equal(delta, other)  # a validation label without cells cannot validate
