"""Claims about ridge and nearest neighbours on a frozen embedding."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cosine
from training_case import KnownEffects, tiny_settings

from biojepa.heads import fit_heads, head_features, predict_change, token_change
from biojepa.models import HEAD_MODELS
from biojepa.pairs import trainable_labels
from biojepa.splits import LeakageError
from biojepa.training import train_model

PENALTY = 0.3


@pytest.fixture(scope="module")
def case():
    return KnownEffects()


@pytest.fixture(scope="module")
def models(case):
    """PCA keeps all components: there are 30 genes, and 64 are asked for. The predictor does not matter."""
    short = {"steps": 1, "evaluate_every": 1}
    return {
        f"{kind}_predictor": train_model(
            case.pairs, tiny_settings(embedding=kind, linear_branch=False, predictor=short)
        )[0]
        for kind in ("pca", "untrained")
    }


@pytest.fixture(scope="module")
def pca_heads(case, models):
    names = [name for name, head in HEAD_MODELS.items() if head.embedding == "pca"]
    return fit_heads(models, case.pairs, names, neighbours=3, seed=5, penalties=[PENALTY])


def delta_of_training(pairs):
    means, control = pairs.pseudobulk()
    train = trainable_labels(pairs)
    return train, means[train] - control, control


def closed_form_ridge(features, train, targets, penalty):
    """Textbook ridge with an unpenalized intercept, by the normal equations."""
    X, Y = features[train], targets
    centred = X - X.mean(axis=0)
    unit = (centred**2).sum() / len(X)
    gram = centred.T @ centred + penalty * unit * np.eye(X.shape[1])
    weights = np.linalg.solve(gram, centred.T @ (Y - Y.mean(axis=0)))
    return Y.mean(axis=0) + (features - X.mean(axis=0)) @ weights


def test_features_are_two_blocks_of_equal_size_by_hand():
    # Labels A, B, A+B, C; the first three are trained, so that C has no column of its own.
    membership = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=float)
    codes = {"first": np.array([[3.0], [0.0], [6.0]]), "second": np.array([[0.0], [1.0], [0.0]])}
    features = head_features(membership, codes, np.array([0, 1, 2]))
    multi_hot = membership[:, :2] / np.sqrt((1 + 1 + 2) / 3)
    # Summed over genes: 3, 0, 3, 6 and 0, 1, 1, 0. Root mean squares over training: √6 and √(2/3).
    priors = np.array([[3, 0], [0, 1], [3, 1], [6, 0]]) / [np.sqrt(6), np.sqrt(2 / 3)] / np.sqrt(2)
    np.testing.assert_allclose(features, np.hstack([multi_hot, priors]))
    assert not head_features(membership, {}, np.array([0, 1, 2]))[3].any()


def test_a_source_that_covers_no_training_gene_adds_nothing():
    membership = np.eye(3)
    features = head_features(membership, {"odd": np.array([[0.0], [0.0], [9.0]])}, np.array([0, 1]))
    np.testing.assert_array_equal(features[:, -1], 0)
    assert np.isfinite(features).all()


def test_neighbours_are_the_most_similar_labels_by_hand():
    features = np.array([[1, 0], [1, 0.1], [0, 1], [-1, 0], [1, 0.2], [0.1, 1], [0, 0]], dtype=float)
    change = np.array([[1.0], [3.0], [10.0], [100.0]])
    predicted = predict_change("knn", features, np.arange(4), change, neighbours=2)
    # Label 4 lies by 1 and 0, label 5 by 2 and 1; label 2 has 1 beside itself, for 0 and 3 are at 0.
    assert predicted[4, 0] == pytest.approx((1 + 3) / 2)
    assert predicted[5, 0] == pytest.approx((10 + 3) / 2)
    assert predicted[2, 0] == pytest.approx((10 + 3) / 2)
    # Label 3 has nothing in common with anyone, so it is averaged over itself alone.
    assert predicted[3, 0] == pytest.approx(100)
    assert predicted[6, 0] == pytest.approx(change.mean())


def test_a_label_that_resembles_no_training_label_gets_the_mean_of_training():
    features = np.array([[1.0, 0.0], [0.5, 0.0], [-1.0, 0.0]])
    predicted = predict_change("knn", features, np.array([0, 1]), np.array([[2.0], [4.0]]), neighbours=1)
    assert predicted[2, 0] == pytest.approx(3)


def test_the_penalty_of_the_ridge_has_the_least_error_when_each_label_is_left_out_in_turn():
    rng = np.random.default_rng(0)
    features, train = rng.standard_normal((14, 6)), np.arange(10)
    change = features[:10] @ rng.standard_normal((6, 3)) + 1.5 * rng.standard_normal((10, 3))
    candidates = [1e-3, 0.1, 1.0, 30.0]
    errors = []
    for penalty in candidates:
        # The penalty is in units of the whole training set's features, also where one label is left out.
        centred = features[train] - features[train].mean(axis=0)
        unit = (centred**2).sum() / len(train)
        error = 0.0
        for out in train:
            rest = np.setdiff1d(train, [out])
            own = features[rest] - features[rest].mean(axis=0)
            relative = penalty * unit / ((own**2).sum() / len(rest))
            prediction = closed_form_ridge(features, rest, change[rest], relative)[out]
            error += ((prediction - change[out]) ** 2).sum()
        errors.append(error)
    best = candidates[int(np.argmin(errors))]
    assert best not in (candidates[0], candidates[-1]), "a case that tells the candidates apart"
    np.testing.assert_allclose(
        predict_change("ridge", features, train, change, penalties=candidates),
        closed_form_ridge(features, train, change, best),
        atol=1e-10,
    )


def test_token_changes_are_means_over_the_cells_of_a_label(case, models):
    model, pairs = models["untrained_predictor"], case.pairs
    train = trainable_labels(pairs)
    change = token_change(model, pairs, train)
    x, library = torch.from_numpy(pairs.dense(np.arange(len(pairs.perturbation)))), pairs.log_library_size
    with torch.no_grad():
        tokens = model.embedding(x, torch.from_numpy(library)).flatten(1).numpy()
    control = tokens[pairs.perturbation == -1].mean(axis=0)
    expected = [tokens[pairs.perturbation == label].mean(axis=0) - control for label in train]
    np.testing.assert_allclose(change, expected, atol=1e-4)


def test_ridge_on_all_principal_components_is_ridge_on_expression(case, pca_heads):
    pairs = case.pairs
    train, delta, control = delta_of_training(pairs)
    for name, codes in (("pca_ridge", pairs.codes), ("pca_ridge_noprior", {})):
        features = head_features(pairs.membership, codes, train)
        expected = closed_form_ridge(features, train, delta, PENALTY)
        expected[~features.any(axis=1)] = delta.mean(axis=0)
        # The readout is a slightly shrunken inverse of the components, and inputs are clipped.
        error = pca_heads[name].expression - np.maximum(control + expected, 0)
        assert np.sqrt((error**2).mean()) < 0.02 * delta.std(), name
        assert np.corrcoef(expected[case.test].ravel(), case.test_effect.ravel())[0, 1] > (
            0.8 if codes else 0.2
        )


def test_neighbours_on_all_principal_components_are_neighbours_on_expression(case, pca_heads):
    pairs = case.pairs
    train, delta, control = delta_of_training(pairs)
    features = head_features(pairs.membership, pairs.codes, train)
    for label in [*case.test, *train[:4]]:
        similar = [1 - cosine(features[label], features[other]) for other in train]
        nearest = sorted(range(len(train)), key=lambda i: -similar[i])[:3]
        expected = np.maximum(control + delta[nearest].mean(axis=0), 0)
        error = pca_heads["pca_knn"].expression[label] - expected
        assert np.sqrt((error**2).mean()) < 0.02 * delta.std(), pairs.labels[label]


@pytest.mark.parametrize("head", ["ridge", "knn"])
def test_without_priors_an_unseen_gene_changes_like_the_mean_of_training(case, models, pca_heads, head):
    model = models["pca_predictor"]
    train = trainable_labels(case.pairs)
    mean = torch.from_numpy(token_change(model, case.pairs, train).mean(axis=0)).float().view(1, 8, 8)
    expected = (model.control_expression + model.readout.change(mean)).clamp(min=0)[0].numpy()
    unseen = [case.pairs.labels.index(name) for name in ("P20", "P21", "P22", "P23")]
    seen_partner = case.pairs.labels.index("P04+P20")
    without = pca_heads[f"pca_{head}_noprior"].expression
    np.testing.assert_allclose(without[unseen], np.tile(expected, (4, 1)), atol=1e-4)
    assert np.abs(without[seen_partner] - expected).max() > 0.05, "P04 was trained"
    assert np.abs(pca_heads[f"pca_{head}"].expression[unseen] - expected).max() > 0.05, "the priors know it"


@pytest.mark.parametrize("head", ["ridge", "knn"])
def test_shuffled_priors_are_the_same_codes_on_other_genes(case, models, pca_heads, head):
    pairs = case.pairs
    permuted = {}
    rng = np.random.default_rng(5)
    for name, values in pairs.codes.items():
        covered = np.flatnonzero(values.any(axis=1))
        permuted[name] = values.copy()
        permuted[name][covered] = values[rng.permutation(covered)]
    name = f"pca_{head}"
    given = fit_heads(
        models, replace(pairs, codes=permuted), [name], neighbours=3, seed=0, penalties=[PENALTY]
    )[name].expression
    shuffled = pca_heads[f"{name}_shuffled"].expression
    np.testing.assert_allclose(shuffled, given, atol=1e-6)
    assert np.abs(shuffled - pca_heads[name].expression)[case.test].max() > 0.1
    other_seed = fit_heads(models, pairs, [f"{name}_shuffled"], 3, seed=6, penalties=[PENALTY])
    assert np.abs(shuffled - other_seed[f"{name}_shuffled"].expression)[case.test].max() > 0.1


def test_every_head_reads_the_embedding_of_its_own_source(case, models, pca_heads):
    both = fit_heads(models, case.pairs, ["untrained_ridge", "pca_ridge"], penalties=[PENALTY])
    assert list(both) == ["untrained_ridge", "pca_ridge"]
    np.testing.assert_array_equal(both["pca_ridge"].expression, pca_heads["pca_ridge"].expression)
    assert both["untrained_ridge"].tokens.shape == (len(case.pairs.labels), 4, 16)
    assert np.abs(both["untrained_ridge"].expression - both["pca_ridge"].expression).max() > 0.01


def test_expression_is_the_readout_of_the_predicted_tokens_and_never_negative(case, models, pca_heads):
    model, prediction = models["pca_predictor"], pca_heads["pca_knn"]
    change = torch.from_numpy(prediction.tokens) - model.control_tokens
    expected = model.control_expression.numpy() + change.flatten(1).numpy() @ model.readout.weight.numpy()
    np.testing.assert_allclose(prediction.expression, expected.clip(min=0), atol=1e-4)
    low = replace(model, control_expression=model.control_expression - 10)
    floored = fit_heads({"pca_predictor": low}, case.pairs, ["pca_knn"])["pca_knn"].expression
    assert floored.min() == 0.0


def test_cells_of_validation_perturbations_do_not_move_a_prediction(case, models, pca_heads):
    pairs = case.pairs
    of_validation = np.isin(pairs.perturbation, pairs.labels_of("val"))
    data = np.where(np.repeat(of_validation, np.diff(pairs.indptr)), 7.0, pairs.data).astype(np.float32)
    assert np.any(data != pairs.data)
    assert not pairs.n_cells[pairs.labels_of("test")].any(), "no cell of a test perturbation is there at all"
    again = fit_heads(models, replace(pairs, data=data), list(pca_heads), 3, seed=5, penalties=[PENALTY])
    for name, prediction in again.items():
        np.testing.assert_array_equal(prediction.expression, pca_heads[name].expression, err_msg=name)


def test_what_cannot_be_fitted_is_refused_by_name(case, models):
    pairs = case.pairs
    with pytest.raises(ValueError, match=r"unknown heads \['pca_predictor'\]"):
        fit_heads(models, pairs, ["pca_predictor"])
    with pytest.raises(ValueError, match=r"need the trained models \['biojepa'\]"):
        fit_heads(models, pairs, ["biojepa_knn"])
    with pytest.raises(ValueError, match="another split or other genes"):
        fit_heads(models, replace(pairs, facts={**pairs.facts, "split_sha256": "1"}), ["pca_knn"])
    with pytest.raises(ValueError, match="head is 'mlp'"):
        predict_change("mlp", np.eye(2), np.arange(2), np.eye(2))
    with pytest.raises(ValueError, match=r"2 training labels and changes of shape \(3, 3\)"):
        predict_change("knn", np.eye(3), np.arange(2), np.eye(3))
    leaked = replace(pairs, sets=tuple("test" if s == "train" else s for s in pairs.sets))
    with pytest.raises(LeakageError, match="test perturbation"):
        fit_heads(models, leaked, ["pca_knn"])
