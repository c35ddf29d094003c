"""Claims about the linear models, each against a second formula or a library."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import optimize, stats
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.model_selection import LeaveOneOut
from sklearn.neighbors import NearestNeighbors

from biojepa import linear
from biojepa.linear import (
    JITTER,
    MAX_LOG_WEIGHT,
    AdditiveKernelRidge,
    Components,
    bilinear,
    nearest_neighbours,
    ridge,
)

LABELS = ["A", "B", "C", "D", "E", "F", "A+B", "C+D", "A+Z", "Z", "control"]
GENES = ["A", "B", "C", "D", "E", "F", "Z"]
TRAIN = np.arange(8)
N_CELLS = np.array([40, 80, 20, 60, 10, 100, 50, 30])


def membership() -> np.ndarray:
    return np.array([[gene in label.split("+") for gene in GENES] for label in LABELS], dtype=float)


def case(seed: int = 0, outputs: int = 25) -> tuple[AdditiveKernelRidge, np.ndarray, dict[str, np.ndarray]]:
    """A fitted model, its targets and the gene codes."""
    rng = np.random.default_rng(seed)
    codes = {"net": rng.standard_normal((7, 3)), "sets": rng.standard_normal((7, 2))}
    effects = codes["net"] @ rng.standard_normal((3, outputs)) + 0.5 * rng.standard_normal((7, outputs))
    targets = membership()[TRAIN] @ effects + 0.2 * rng.standard_normal((8, outputs))
    return (
        AdditiveKernelRidge(Components.of(membership(), codes)).fit(TRAIN, targets, N_CELLS),
        targets,
        codes,
    )


def kernel(model: AdditiveKernelRidge, rows: np.ndarray, columns: np.ndarray, codes: dict) -> np.ndarray:
    """The kernel entry by entry, from the definition as a sum over pairs of genes."""
    M, w = membership(), model.weights
    out = np.zeros((len(rows), len(columns)))
    for i, a in enumerate(rows):
        for j, b in enumerate(columns):
            value = w["shared"] * float(M[a].any() and M[b].any())
            for g in np.flatnonzero(M[a]):
                for h in np.flatnonzero(M[b]):
                    alike = np.mean([c[g] @ c[h] for c in codes.values()]) if codes else 0.0
                    value += w["mean"] + w["gene"] * (g == h) + w.get("prior", 0.0) * alike
            out[i, j] = value
    return out


def noisy_kernel(model: AdditiveKernelRidge, targets: np.ndarray, codes: dict) -> np.ndarray:
    noise = model.noise * np.median(N_CELLS) / N_CELLS + JITTER * (targets**2).mean()
    return kernel(model, TRAIN, TRAIN, codes) + np.diag(noise)


def test_prediction_is_the_mean_of_a_gaussian_process():
    model, targets, codes = case()
    everything = np.arange(len(LABELS))
    cross = kernel(model, everything, TRAIN, codes)
    expected = cross @ np.linalg.solve(noisy_kernel(model, targets, codes), targets)
    np.testing.assert_allclose(model.predict(everything), expected, atol=1e-8)


def test_uncertainty_is_that_of_a_gaussian_process_scaled_by_each_outputs_residuals():
    model, targets, codes = case()
    everything = np.arange(len(LABELS))
    K = noisy_kernel(model, targets, codes)
    cross = kernel(model, everything, TRAIN, codes)
    variance = np.diag(kernel(model, everything, everything, codes) - cross @ np.linalg.solve(K, cross.T))
    inverse = np.linalg.inv(K)
    scale = ((inverse @ targets) ** 2 / np.diag(inverse)[:, None]).mean(axis=0)
    expected = np.sqrt(np.outer(np.maximum(variance, 0), scale))
    np.testing.assert_allclose(model.standard_deviation(everything), expected, atol=1e-7)
    sd = dict(zip(LABELS, model.standard_deviation(everything).mean(axis=1), strict=True))
    assert sd["Z"] > sd["A"] and sd["control"] == 0


def test_control_is_predicted_as_exactly_no_change():
    model, _, _ = case()
    assert not model.predict(np.array([LABELS.index("control")])).any()


def test_leave_one_out_equals_leaving_out_with_the_weights_kept():
    model, targets, codes = case()
    K = noisy_kernel(model, targets, codes)
    for i in range(len(TRAIN)):
        rest = np.delete(TRAIN, i)
        expected = K[i, rest] @ np.linalg.solve(K[np.ix_(rest, rest)], targets[rest])
        np.testing.assert_allclose(model.leave_one_out()[i], expected, atol=1e-8)


def test_weights_maximize_the_likelihood_and_their_weak_prior():
    model, targets, codes = case()
    M = membership()[TRAIN]
    size = (targets**2).mean()
    parts = {
        "mean": np.outer(M.sum(axis=1), M.sum(axis=1)),
        "shared": np.ones((8, 8)),
        "gene": M @ M.T,
        "prior": sum((M @ c) @ (M @ c).T for c in codes.values()) / 2,
    }
    units = np.array([np.diag(part).mean() for part in parts.values()])
    relative = np.median(N_CELLS) / N_CELLS

    def objective(log_weights: np.ndarray) -> float:
        """Negative log density per output, by scipy, of weights in the units of the data."""
        weights = np.exp(log_weights[:-1]) * size / units
        K = sum(w * part for w, part in zip(weights, parts.values(), strict=True))
        K = K + np.diag(np.exp(log_weights[-1]) * size * relative + JITTER * size)
        density = stats.multivariate_normal(np.zeros(8), K).logpdf(targets.T).mean()
        return -density + 0.01 * ((log_weights + 1) ** 2).sum()

    fitted = np.log([*(np.array([model.weights[n] for n in parts]) * units / size), model.noise / size])
    best = optimize.minimize(objective, fitted, method="Nelder-Mead", options={"xatol": 1e-4, "fatol": 1e-9})
    assert objective(fitted) - best.fun < 1e-4
    assert objective(fitted) < objective(np.full(5, -1.0)) - 0.1


@pytest.mark.parametrize("kept", [("gene",), ("gene", "mean", "prior")])
def test_effects_of_genes_add_up_without_the_shared_component(kept):
    _, targets, codes = case()
    components = Components.of(membership(), codes)
    additive = Components({name: components.features[name] for name in kept})
    model = AdditiveKernelRidge(additive).fit(TRAIN, targets, N_CELLS)
    single_a, single_b, both = (model.predict(np.array([LABELS.index(x)])) for x in ("A", "B", "A+B"))
    np.testing.assert_allclose(both, single_a + single_b, atol=1e-10)
    a, z, together = (model.predict(np.array([LABELS.index(x)])) for x in ("A", "Z", "A+Z"))
    np.testing.assert_allclose(together, a + z, atol=1e-10)


def test_the_shared_component_is_counted_once_in_a_combination():
    model, targets, codes = case()
    a, b, both = (model.predict(np.array([LABELS.index(x)])) for x in ("A", "B", "A+B"))
    dual = np.linalg.solve(noisy_kernel(model, targets, codes), targets)
    intercept = model.weights["shared"] * dual.sum(axis=0)
    np.testing.assert_allclose(both[0], (a + b)[0] - intercept, atol=1e-8)


def test_a_gene_of_no_source_and_no_training_cell_gets_what_all_genes_share():
    _, targets, codes = case()
    codes = {name: np.where(np.arange(7)[:, None] == 6, 0.0, values) for name, values in codes.items()}
    model = AdditiveKernelRidge(Components.of(membership(), codes)).fit(TRAIN, targets, N_CELLS)
    dual = np.linalg.solve(noisy_kernel(model, targets, codes), targets)
    size = membership()[TRAIN].sum(axis=1)
    expected = (model.weights["mean"] * size + model.weights["shared"]) @ dual
    np.testing.assert_allclose(model.predict(np.array([LABELS.index("Z")]))[0], expected, atol=1e-8)


def test_a_perturbation_of_few_cells_is_shrunken_more():
    targets = np.repeat(np.random.default_rng(1).standard_normal((1, 30)), 2, axis=0)
    components = Components({"gene": np.eye(2)})
    model = AdditiveKernelRidge(components).fit(np.arange(2), targets, np.array([5, 500]))
    few, many = np.linalg.norm(model.predict(np.arange(2)), axis=1)
    assert few < 0.9 * many and many < np.linalg.norm(targets[0])


def test_without_sources_there_is_no_prior_component():
    assert set(Components.of(membership(), {}).features) == {"mean", "shared", "gene"}


def test_fitting_refuses_lengths_that_do_not_fit():
    with pytest.raises(ValueError, match="8 labels, 7 targets, 8 cell counts"):
        AdditiveKernelRidge(Components.of(membership(), {})).fit(TRAIN, np.zeros((7, 2)), N_CELLS)


def test_the_gradient_of_the_likelihood_is_its_slope():
    rng = np.random.default_rng(3)
    roots = rng.standard_normal((3, 9, 4))
    likelihood = linear._Likelihood(
        torch.from_numpy(roots @ roots.transpose(0, 2, 1)),
        torch.from_numpy(rng.uniform(0.5, 2, 9)),
        torch.from_numpy(rng.standard_normal((9, 2))),
    )
    for at in (np.array([-1.0, 0.5, -2.0, 0.3]), np.array([0.0, MAX_LOG_WEIGHT + 1, -1.0, -1.0])):
        _, found = likelihood.loss(torch.from_numpy(at))
        slope = optimize.approx_fprime(at, lambda x: float(likelihood.loss(torch.from_numpy(x))[0]), 1e-6)
        np.testing.assert_allclose(found, slope, rtol=1e-4, atol=1e-4)


def test_more_outputs_than_perturbations_have_the_same_likelihood_as_their_products():
    """Weights are a function of Y Yᵀ: turning the outputs changes nothing, and neither do columns of 0."""
    model, targets, codes = case()
    turned = targets @ stats.ortho_group.rvs(25, random_state=0)
    wide = np.hstack([targets, np.zeros((8, 25))]) * np.sqrt(2)
    components = Components.of(membership(), codes)
    for other in (turned, wide):
        again = AdditiveKernelRidge(components).fit(TRAIN, other, N_CELLS)
        np.testing.assert_allclose(again.log_weights, model.log_weights, atol=1e-3)


def many(n: int, seed: int = 0) -> tuple[Components, np.ndarray, np.ndarray]:
    """Kernels, targets and cells of single genes whose effects a code explains in part."""
    rng = np.random.default_rng(seed)
    codes = rng.standard_normal((n, 5))
    cells = rng.integers(20, 200, n)
    effects = codes @ rng.standard_normal((5, 40)) + rng.standard_normal((n, 40))
    targets = effects + rng.standard_normal((n, 40)) * np.sqrt(50 / cells)[:, None]
    return Components.of(np.eye(n), {"net": codes}), targets, cells


def test_a_random_part_of_many_perturbations_says_the_weights_and_all_are_conditioned_on(monkeypatch):
    components, targets, cells = many(400)
    every = np.arange(400)
    whole = AdditiveKernelRidge(components).fit(every[:390], targets[:390], cells[:390])
    monkeypatch.setattr(linear, "SEARCHED", 150)
    monkeypatch.setattr(linear, "ASKED_AT_A_TIME", 7)
    part = AdditiveKernelRidge(components).fit(every[:390], targets[:390], cells[:390])
    assert (part.log_weights != whole.log_weights).all()
    # The codes explain as much as is left to the genes; a mean over genes is next to nothing.
    for name in ("gene", "prior"):
        assert part.weights[name] == pytest.approx(whole.weights[name], rel=0.15)
    assert part.noise == pytest.approx(whole.noise, rel=0.15)
    kernel = sum(w * components.features[n] @ components.features[n].T for n, w in part.weights.items())
    noisy = kernel[:390, :390] + np.diag(part.noise_variance)
    expected = kernel[:, :390] @ np.linalg.solve(noisy, targets[:390])
    np.testing.assert_allclose(part.predict(every), expected, atol=1e-8)
    variance = np.diag(kernel - kernel[:, :390] @ np.linalg.solve(noisy, kernel[:390]))
    expected = np.sqrt(np.outer(np.maximum(variance, 0), part.output_variance))
    np.testing.assert_allclose(part.standard_deviation(every), expected, atol=1e-6)
    error = [((model.predict(every[390:]) - targets[390:]) ** 2).mean() for model in (whole, part)]
    assert error[1] == pytest.approx(error[0], rel=0.02)
    assert part.predict(every[:0]).shape == part.standard_deviation(every[:0]).shape == (0, 40)


def test_a_source_that_covers_no_searched_label_has_no_weight(monkeypatch):
    """Its scale would be that of nothing, and its few labels would not be shrunken at all."""
    components, targets, cells = many(60)
    train = np.arange(50)
    monkeypatch.setattr(linear, "SEARCHED", 20)
    searched = np.sort(np.random.default_rng(0).permutation(train)[:20])
    left_out = np.setdiff1d(train, searched)[:2]
    rare = np.zeros((60, 1))
    rare[left_out] = 1.0
    with_rare = Components({**components.features, "prior_rare": rare})
    model = AdditiveKernelRidge(with_rare).fit(train, targets[:50], cells[:50])
    assert model.weights["prior_rare"] == 0 and min(model.weights[name] for name in components.features) > 0
    without = AdditiveKernelRidge(components).fit(train, targets[:50], cells[:50])
    np.testing.assert_allclose(model.predict(train), without.predict(train), atol=1e-6)


def test_a_kernel_that_rounding_left_indefinite_gets_the_least_jitter_that_helps(caplog):
    features = np.array([[1.0, 1.0], [1.0, 1.0], [2.0, 1.0]])
    components, every = Components({"gene": features}), np.arange(3)
    noise = np.array([0.0, -2e-8, 0.0])
    factor = linear.noisy_factor(components, {"gene": 1.0}, every, noise).numpy()
    kernel = features @ features.T + np.diag(noise)
    added = factor @ factor.T - kernel
    unit = np.diag(kernel).mean()
    np.testing.assert_allclose(added, np.diag(np.diag(added)), atol=1e-12)
    np.testing.assert_allclose(np.diag(added), 1e-8 * unit, rtol=0.1)
    assert "kernel of 3 labels: 1e-08 of its diagonal" in caplog.text
    caplog.clear()
    plain = linear.noisy_factor(components, {"gene": 1.0}, every, np.ones(3)).numpy()
    assert not caplog.text
    np.testing.assert_allclose(plain @ plain.T, features @ features.T + np.eye(3), atol=1e-14)
    with pytest.raises(
        np.linalg.LinAlgError, match="kernel of 3 training perturbations is not positive definite"
    ):
        linear.noisy_factor(components, {"gene": np.nan}, every, noise)


@pytest.mark.parametrize("turned", [False, True])
def test_products_of_multi_hot_codes_leave_out_zeros_and_nothing_else(monkeypatch, turned):
    rng = np.random.default_rng(0)
    code = (rng.random((60, 90)) < 0.02) * rng.uniform(1, 2, (60, 90))
    code = code.T if turned else code
    values = rng.standard_normal((code.shape[1], 4))
    made, make = [], torch.sparse_coo_tensor
    monkeypatch.setattr(
        torch, "sparse_coo_tensor", lambda *args, **how: made.append(args) or make(*args, **how)
    )
    for many, sparse, skipped in ((1, 1, True), (1, 1000, False), (10**6, 1, False)):
        monkeypatch.setattr(linear, "MANY", many)
        monkeypatch.setattr(linear, "SPARSE", sparse)
        made.clear()
        linear.product(code, values)
        assert bool(made) is skipped
        for given in (values, np.asfortranarray(values), values[:, :0], values[:, 1:3]):
            np.testing.assert_allclose(linear.product(code, given), code @ given, atol=1e-12)


def regression(seed: int = 0, n: int = 18, p: int = 6) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, p)) + 2
    return X, X @ rng.standard_normal((p, 5)) + rng.standard_normal((n, 5)) + 3, rng.standard_normal((4, p))


def unit_of(X: np.ndarray) -> float:
    return ((X - X.mean(axis=0)) ** 2).sum(axis=1).mean()


@pytest.mark.parametrize("penalty", [0.001, 0.3, 100.0])
def test_ridge_agrees_with_sklearn(penalty):
    X, Y, new = regression()
    expected = Ridge(alpha=penalty * unit_of(X)).fit(X, Y).predict(new)
    np.testing.assert_allclose(ridge(X, Y, new, [penalty]), expected, atol=1e-9)


def test_ridge_chooses_the_penalty_that_leaving_out_one_by_one_chooses():
    penalties = np.logspace(-3, 2, 11)
    chosen = set()
    for seed in range(6):
        X, Y, new = regression(seed, n=12, p=10)
        errors = []
        for penalty in penalties:
            alpha, error = penalty * unit_of(X), 0.0
            for rest, out in LeaveOneOut().split(X):
                error += ((Ridge(alpha=alpha).fit(X[rest], Y[rest]).predict(X[out]) - Y[out]) ** 2).sum()
            errors.append(error)
        best = penalties[int(np.argmin(errors))]
        chosen.add(float(best))
        expected = Ridge(alpha=best * unit_of(X)).fit(X, Y).predict(new)
        np.testing.assert_allclose(ridge(X, Y, new, penalties), expected, atol=1e-8)
    assert len(chosen) > 1  # the choice is a real one


def test_ridge_on_constant_features_predicts_the_mean():
    Y = np.arange(12.0).reshape(4, 3)
    np.testing.assert_allclose(ridge(np.ones((4, 2)), Y, np.full((1, 2), 9.0), [0.1]), [Y.mean(axis=0)])


def test_nearest_neighbours_agree_with_sklearn_and_fall_back_on_the_mean():
    rng = np.random.default_rng(4)
    X, Y, new = rng.standard_normal((15, 4)), rng.standard_normal((15, 3)), rng.standard_normal((6, 4))
    new[2] = 0
    predicted = nearest_neighbours(X, Y, new, k=3)
    known = np.delete(np.arange(6), 2)
    _, index = NearestNeighbors(n_neighbors=3, metric="cosine").fit(X).kneighbors(new[known])
    np.testing.assert_allclose(predicted[known], Y[index].mean(axis=1))
    np.testing.assert_allclose(predicted[2], Y.mean(axis=0))
    np.testing.assert_allclose(nearest_neighbours(X, Y, new, k=99)[0], Y.mean(axis=0))


def test_the_bilinear_model_is_the_published_formula():
    rng = np.random.default_rng(5)
    means = rng.standard_normal((9, 12))
    targets = [[0], [1], [2, 3], [4], [], [5], [6], [7], [0, 1]]
    new_targets = [[8], [2, 9], []]
    predicted, n_without = bilinear(means, targets, new_targets, n_components=4, penalty=0.1)
    assert n_without == 1
    # Scores of the genes by sklearn: the columns of Y, centred per gene, are the samples.
    Y = means.T - means.mean(axis=0)[:, None]
    G = PCA(4).fit(means).components_.T * np.linalg.svd(Y, compute_uv=False)[:4]
    P = np.stack([G[rows].sum(axis=0) if rows else np.zeros(4) for rows in targets], axis=1)
    new_P = np.stack([G[rows].sum(axis=0) if rows else np.zeros(4) for rows in new_targets], axis=1)
    I = 0.1 * np.eye(4)  # noqa: E741
    W = np.linalg.inv(G.T @ G + I) @ G.T @ Y @ P.T @ np.linalg.inv(P @ P.T + I)
    expected = (G @ W @ new_P).T + means.mean(axis=0)
    np.testing.assert_allclose(predicted, expected, atol=1e-9)
    np.testing.assert_allclose(predicted[2], means.mean(axis=0))
