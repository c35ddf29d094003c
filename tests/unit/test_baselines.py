"""Claims about the simple models, on folds small enough to do by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.sparse.linalg import svds
from sklearn.linear_model import RidgeCV
from training_case import KnownEffects, pairs_of

from biojepa.baselines import BASELINES, PENALTIES, TrainingData, fit_baselines, fit_linear_branch
from biojepa.contracts import SIMPLE_MODELS, WITHOUT_TARGET
from biojepa.other_screen import OtherScreen

# Expression of genes A, B, M. Controls at (1, 1, 1); Δ is what is added below.
DELTA = {
    "A": (-1.0, 0.0, 2.0),
    "B": (0.0, -0.5, 4.0),
    "A+B": (-1.0, -0.5, 9.0),
    "D": (1.0, 1.0, 1.0),
}
SETS = {
    **dict.fromkeys(DELTA, "train"),
    "V": "val",
    "A+C": "test",
    "B+D": "test",
    "C": "test",
    "C+E": "test",
}


def by_hand(codes=None):
    """Perturbations of 1 to 4 cells each, so that means weighted by cells would differ."""
    labels = ["control"] * 2 + [label for i, label in enumerate(DELTA) for _ in range(i + 1)] + ["V"]
    rows = [np.ones(3) + DELTA.get(label, (0, 0, 0)) for label in labels]
    return pairs_of(np.array(rows), labels, SETS, codes, genes=["A", "B", "M"])


def predicted(name: str, pairs=None) -> dict[str, np.ndarray]:
    pairs = pairs or by_hand()
    return dict(zip(pairs.labels, fit_baselines(pairs, [name])[name].delta, strict=True))


def test_every_baseline_that_the_config_may_name_exists():
    assert set(BASELINES) == set(SIMPLE_MODELS)


def test_training_data_are_the_changes_against_control_by_hand():
    data = TrainingData.of(by_hand())
    names = [data.pairs.labels[row] for row in data.train]
    assert sorted(names) == sorted(DELTA)
    np.testing.assert_allclose(data.delta, [DELTA[name] for name in names], atol=1e-6)


def test_no_change_is_zero_and_mean_weighs_perturbations_and_not_cells():
    assert all(not delta.any() for delta in predicted("no_change").values())
    for delta in predicted("mean").values():
        np.testing.assert_allclose(delta, np.mean(list(DELTA.values()), axis=0), atol=1e-6)


def test_target_only_changes_measured_targets_by_their_average_change_in_training():
    delta = predicted("target_only")
    average = np.mean([-1.0, -0.5, -1.0, -0.5])  # A, B, and both of A+B; D is not measured
    np.testing.assert_allclose(delta["A+C"], [average, 0, 0], atol=1e-6)
    np.testing.assert_allclose(delta["B+D"], [0, average, 0], atol=1e-6)
    np.testing.assert_allclose(delta["C"], [0, 0, 0])


def test_additive_adds_up_the_singles_of_training():
    delta = predicted("additive")
    np.testing.assert_allclose(delta["B+D"], np.add(DELTA["B"], DELTA["D"]), atol=1e-6)
    np.testing.assert_allclose(delta["A+C"], DELTA["A"], atol=1e-6)
    np.testing.assert_allclose(delta["C+E"], np.mean(list(DELTA.values()), axis=0), atol=1e-6)
    np.testing.assert_allclose(delta["A"], DELTA["A"], atol=1e-6)


def test_matching_mean_averages_the_training_perturbations_that_share_a_gene():
    delta = predicted("matching_mean")
    np.testing.assert_allclose(delta["A+C"], np.mean([DELTA["A"], DELTA["A+B"]], axis=0), atol=1e-6)
    shared = [DELTA["B"], DELTA["A+B"], DELTA["D"]]
    np.testing.assert_allclose(delta["B+D"], np.mean(shared, axis=0), atol=1e-6)
    np.testing.assert_allclose(delta["C"], np.mean(list(DELTA.values()), axis=0), atol=1e-6)


def test_linear_gives_labels_without_a_measured_target_the_mean():
    delta = predicted("linear")
    np.testing.assert_allclose(delta["C"], np.mean(list(DELTA.values()), axis=0), atol=1e-6)
    np.testing.assert_allclose(delta["A+C"], delta["A"], atol=1e-9)  # C adds nothing


@pytest.mark.parametrize("name", ["multihot", "ridge"])
def test_ridge_baselines_agree_with_sklearn_and_its_leave_one_out(name):
    pairs = KnownEffects(seed=2, cells_per_label=10, n_controls=40).pairs
    data = TrainingData.of(pairs)
    features = pairs.membership if name == "multihot" else pairs.membership @ pairs.codes["network"]
    X = features[data.train]
    unit = ((X - X.mean(axis=0)) ** 2).sum(axis=1).mean()
    # The penalty of `ridge` is relative to its features, so scaling them changes nothing.
    model = RidgeCV(alphas=np.array(PENALTIES) * unit).fit(X, data.delta)
    np.testing.assert_allclose(fit_baselines(pairs, [name])[name].delta, model.predict(features), atol=1e-5)


def test_every_source_weighs_the_same_in_the_features_whatever_its_scale():
    codes = {
        "loud": {"A": [100.0, 0], "B": [0, 300.0], "C": [50.0, 50.0]},
        "quiet": {"A": [0.01], "D": [0.02]},
    }
    features = TrainingData.of(by_hand(codes)).features()
    assert features.shape == (9, 3)
    np.testing.assert_allclose((features[:, :2] ** 2).sum(axis=1).mean(), 1, rtol=1e-6)
    np.testing.assert_allclose((features[:, 2:] ** 2).sum(axis=1).mean(), 1, rtol=1e-6)


def test_knn_averages_the_perturbations_of_similar_codes():
    codes = {"net": {"A": [1, 0], "B": [0, 1], "D": [-1, 0], "C": [1, 0.1]}}
    pairs = by_hand(codes)
    delta = dict(zip(pairs.labels, fit_baselines(pairs, ["knn"], neighbours=2)["knn"].delta, strict=True))
    np.testing.assert_allclose(delta["C"], np.mean([DELTA["A"], DELTA["A+B"]], axis=0), atol=1e-6)
    np.testing.assert_allclose(delta["V"], np.mean(list(DELTA.values()), axis=0), atol=1e-6)  # no code


def test_linear_names_the_labels_without_a_measured_target():
    # Of the genes A to E, V, only A and B are measured.
    pairs = by_hand()
    fitted = fit_baselines(pairs, ["linear", "mean"])
    assert sorted(fitted["linear"].facts[WITHOUT_TARGET]) == ["C", "C+E", "D", "V"]
    assert fitted["mean"].facts == {}


def test_kernel_ridge_is_the_linear_branch():
    pairs = KnownEffects(seed=2, cells_per_label=10, n_controls=40).pairs
    data = TrainingData.of(pairs)
    branch = fit_linear_branch(pairs, data.train, data.delta)
    everything = np.arange(len(pairs.labels))
    fitted = fit_baselines(pairs, ["kernel_ridge"])["kernel_ridge"]
    np.testing.assert_array_equal(fitted.delta, branch.predict(everything))
    np.testing.assert_array_equal(fitted.sd, branch.standard_deviation(everything))


def error(case: KnownEffects, name: str) -> float:
    delta = fit_baselines(case.pairs, [name])[name].delta[case.test]
    return float(((delta - case.test_effect) ** 2).mean())


def test_models_that_use_codes_find_a_known_effect_and_their_negative_controls_do_not():
    case = KnownEffects(seed=0)
    mean = error(case, "mean")
    for name in ("ridge", "kernel_ridge"):
        assert error(case, name) < 0.3 * mean
    for name in ("random_codes", "shuffled_labels"):
        assert error(case, name) > 0.7 * mean


def test_random_codes_ignore_the_priors_and_follow_the_seed():
    pairs = KnownEffects(seed=1, cells_per_label=10, n_controls=40).pairs
    without = replace(pairs, codes={})
    first, bare = (fit_baselines(p, ["random_codes"], seed=3)["random_codes"].delta for p in (pairs, without))
    np.testing.assert_array_equal(first, bare)
    assert not np.allclose(first, fit_baselines(pairs, ["random_codes"], seed=4)["random_codes"].delta)


def test_shuffled_labels_follow_the_seed_and_repeat():
    pairs = KnownEffects(seed=1, cells_per_label=10, n_controls=40).pairs
    name = "shuffled_labels"
    first, again, other = (fit_baselines(pairs, [name], seed=s)[name].delta for s in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)


@pytest.mark.parametrize("name", SIMPLE_MODELS)
def test_every_baseline_predicts_every_label_without_priors_too(name):
    pairs = by_hand()
    screens = {"other": OtherScreen(["A"], ["M"], np.ones((1, 1)))}
    delta = fit_baselines(pairs, [name], screens=screens)[name].delta
    assert delta.shape == (9, 3) and np.isfinite(delta).all()


def test_without_priors_models_of_codes_predict_the_mean():
    for name in ("ridge", "knn"):
        for delta in predicted(name).values():
            np.testing.assert_allclose(delta, np.mean(list(DELTA.values()), axis=0), atol=1e-6)


def test_targets_and_singles_are_those_of_the_genes_also_in_a_held_out_context():
    labels = ["control"] * 2 + list(DELTA)
    rows = [np.ones(3) + DELTA.get(label, (0, 0, 0)) for label in labels]
    sets = dict.fromkeys(DELTA, "train") | {"A @ K562": "test", "B+D @ K562": "test"}
    pairs = pairs_of(np.array(rows), labels, sets, genes=["A", "B", "M"])
    np.testing.assert_allclose(predicted("additive", pairs)["A @ K562"], DELTA["A"], atol=1e-6)
    summed = np.add(DELTA["B"], DELTA["D"])
    np.testing.assert_allclose(predicted("additive", pairs)["B+D @ K562"], summed, atol=1e-6)
    target = predicted("target_only", pairs)["A @ K562"]
    np.testing.assert_allclose(target, [np.mean([-1.0, -0.5, -1.0, -0.5]), 0, 0], atol=1e-6)


def test_linear_is_the_published_formula_on_row_centred_changes():
    case = KnownEffects(seed=4, cells_per_label=10, n_controls=40)
    # Genes that are perturbed and measured, as the model needs them.
    pairs = replace(case.pairs, genes=tuple([f"P{i:02d}" for i in range(24)] + [f"X{i}" for i in range(6)]))
    data = TrainingData.of(pairs)
    Y = data.delta.T - data.delta.T.mean(axis=1, keepdims=True)
    left, singular, _ = svds(Y, 10)
    G = left * singular
    P = np.zeros((10, len(pairs.labels)))
    for column, label in enumerate(pairs.labels):
        for gene in label.split("+"):
            P[:, column] += G[pairs.genes.index(gene)]
    trained = P[:, data.train]
    eye = 0.1 * np.eye(10)
    W = np.linalg.inv(G.T @ G + eye) @ G.T @ Y @ trained.T @ np.linalg.inv(trained @ trained.T + eye)
    expected = (G @ W @ P).T + data.delta.mean(axis=0)
    np.testing.assert_allclose(fit_baselines(pairs, ["linear"])["linear"].delta, expected, atol=1e-8)


def test_an_unknown_baseline_is_refused_with_those_that_exist():
    with pytest.raises(ValueError, match=r"unknown baselines \['median'\]; there are \['additive', "):
        fit_baselines(by_hand(), ["mean", "median"])
