"""Claims about the linear probes, against scikit-learn and cases with a known answer."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge
from sklearn.metrics import balanced_accuracy_score, r2_score

from biojepa import probes
from biojepa.probes import linear_probes

T, D = 4, 5


def made(cells=600, signal=1.0, seed=0):
    """Tokens in which class, batch and library size are linear, in unequal classes, plus noise."""
    rng = np.random.default_rng(seed)
    classes = rng.choice([-1, 0, 1, 2, 3], size=cells, p=[0.3, 0.4, 0.1, 0.1, 0.1])
    batch, library = rng.integers(2, size=cells), rng.normal(9, 0.4, cells)
    z = rng.standard_normal((cells, T * D))
    z += signal * rng.standard_normal((5, T * D))[classes] + signal * rng.standard_normal((2, T * D))[batch]
    z += 2 * signal * np.outer(library - 9, rng.standard_normal(T * D))
    tensors = (torch.from_numpy(x) for x in (classes, batch, library))
    return torch.from_numpy(z).float().view(cells, T, D), *tensors


def test_accuracies_are_those_of_a_shrunken_discriminant_with_equal_priors():
    tokens, classes, batch, library = made()
    found = linear_probes(tokens, classes, batch, library)
    z = tokens.flatten(1).double().numpy()
    for name, labels, used in (
        ("perturbation", classes.numpy(), classes.numpy() >= 0),
        ("batch", batch.numpy(), np.ones(len(z), bool)),
    ):
        x, y = z[used] - z[::2].mean(axis=0), labels[used]
        names = np.unique(y)
        means = np.stack([x[::2][y[::2] == name].mean(axis=0) for name in names])
        residual = x[::2] - means[np.searchsorted(names, y[::2])]
        within = residual.T @ residual / len(residual)
        within += 0.1 * np.trace(within) / len(within) * np.eye(len(within))
        distance = [((x[1::2] - m) @ np.linalg.inv(within) * (x[1::2] - m)).sum(axis=1) for m in means]
        expected = balanced_accuracy_score(y[1::2], names[np.argmin(distance, axis=0)])
        assert found[name] == pytest.approx(expected, abs=1e-9)
        assert found[f"{name}_chance"] == pytest.approx(1 / len(names))
        # And near an unshrunken one by another hand.
        plain = LinearDiscriminantAnalysis(priors=np.full(len(names), 1 / len(names)))
        judged = balanced_accuracy_score(y[1::2], plain.fit(x[::2], y[::2]).predict(x[1::2]))
        assert found[name] == pytest.approx(judged, abs=0.05)
    assert found["perturbation"] > 0.8 and found["batch"] > 0.9


def test_r2_is_that_of_the_best_ridge_by_generalized_cross_validation():
    tokens, classes, batch, library = made(signal=0.3)
    z, y = tokens.flatten(1).double().numpy(), library.numpy()
    centred = z[::2] - z[::2].mean(axis=0)
    scores = {}
    for penalty in probes.PENALTIES:
        alpha = penalty * (np.linalg.svd(centred, compute_uv=False) ** 2).mean()
        hat = centred @ np.linalg.solve(centred.T @ centred + alpha * np.eye(20), centred.T)
        model = Ridge(alpha=alpha).fit(z[::2], y[::2])
        error = ((y[::2] - model.predict(z[::2])) ** 2).sum()
        scores[error / (len(centred) - 1 - np.trace(hat)) ** 2] = r2_score(y[1::2], model.predict(z[1::2]))
    found = linear_probes(tokens, classes, batch, library)["log_library_r2"]
    assert found == pytest.approx(scores[min(scores)], abs=1e-6)
    assert 0.2 < found < 1


def test_nothing_is_read_out_of_noise():
    tokens, classes, batch, library = made(2000, signal=0.0)
    found = linear_probes(tokens, classes, batch, library)
    assert found["perturbation"] == pytest.approx(0.25, abs=0.06)
    assert found["batch"] == pytest.approx(0.5, abs=0.06)
    assert abs(found["log_library_r2"]) < 0.05


def test_a_collapsed_embedding_is_at_chance():
    _, classes, batch, library = made()
    collapsed = torch.randn(1, T, D).expand(len(classes), T, D)
    found = linear_probes(collapsed, classes, batch, library)
    assert found["perturbation"] == pytest.approx(found["perturbation_chance"])
    assert found["batch"] == pytest.approx(0.5)
    assert found["log_library_r2"] == pytest.approx(0, abs=0.02)


def test_rotating_or_shifting_the_embedding_changes_nothing():
    tokens, classes, batch, library = made(signal=0.5)
    rotation = torch.linalg.qr(torch.randn(T * D, T * D, generator=torch.Generator().manual_seed(1)))[0]
    turned = (tokens.flatten(1) @ rotation + 3).view_as(tokens)
    ours, theirs = (linear_probes(z, classes, batch, library) for z in (tokens, turned))
    for name in ours:
        assert theirs[name] == pytest.approx(ours[name], abs=5e-3)


def test_components_are_the_leading_ones_of_the_fitting_half_whichever_side_is_longer():
    rng = np.random.default_rng(2)
    x = torch.from_numpy(rng.standard_normal((60, 90)) * np.linspace(3, 0.1, 90))
    centred = (x - x[::2].mean(dim=0)).numpy()
    _, _, right = np.linalg.svd(centred[::2], full_matrices=False)
    for data in (x, torch.cat([x, x, x, x])):
        got = probes._leading(data, 7).numpy()[:60]
        wanted = centred @ right[:7].T
        np.testing.assert_allclose(np.abs(got), np.abs(wanted), atol=1e-8)


def test_principal_components_of_the_expression_are_judged_alike():
    tokens, classes, batch, library = made()
    found = linear_probes(tokens, classes, batch, library, tokens.flatten(1))
    assert found["perturbation_pca"] == pytest.approx(found["perturbation"])


def test_what_cannot_be_told_apart_is_none():
    tokens, classes, batch, _ = made(50)
    found = linear_probes(tokens, torch.full_like(classes, -1), torch.zeros_like(batch), torch.ones(50))
    assert set(found.values()) == {None}


def test_other_shapes_are_refused():
    tokens, classes, batch, library = made(20)
    with pytest.raises(ValueError, match=r"tokens have shape \(20, 20\); expected \(cells, T, D\)"):
        linear_probes(tokens.flatten(1), classes, batch, library)
    with pytest.raises(ValueError, match=r"batch has shape \(19,\); expected \(20,\)"):
        linear_probes(tokens, classes, batch[1:], library)


def test_a_large_embedding_of_many_cells_takes_seconds():
    tokens = torch.randn(5000, 64, 64)
    rng = np.random.default_rng(0)
    classes, batch = (torch.from_numpy(rng.integers(n, size=5000)) for n in (100, 4))
    started = time.process_time()
    linear_probes(tokens, classes, batch, torch.randn(5000))
    assert time.process_time() - started < 15  # about 2 s of one core; the limit is for a busy machine
