"""Claims about reading expression out of embeddings, and about when to believe a latent prediction."""

from __future__ import annotations

import numpy as np
import pytest
import statsmodels.api as sm
import torch
from sklearn.linear_model import Ridge

from biojepa.readout import Readout, calibrate_scale, fit_readout, gate


def cells(seed: int = 0, n: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (cells, 3, 4) and expression (cells, 6) that depends on them."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(n, 3, 4, generator=generator) + 1
    loading = torch.randn(12, 6, generator=torch.Generator().manual_seed(9))
    return tokens, tokens.flatten(1) @ loading + torch.randn(n, 6, generator=generator) + 2


def sklearn_ridge(tokens: torch.Tensor, expression: torch.Tensor, penalty: float) -> Ridge:
    X = tokens.flatten(1).double().numpy()
    alpha = penalty * len(X) * X.var(axis=0).mean()
    return Ridge(alpha=alpha).fit(X, expression.double().numpy())


@pytest.mark.parametrize("penalty", [1e-4, 0.1, 10.0])
def test_readout_agrees_with_sklearn_however_the_cells_are_cut_into_batches(penalty):
    tokens, expression = cells()
    model = sklearn_ridge(tokens, expression, penalty)
    new, _ = cells(seed=5, n=7)
    for size in (200, 37):
        batches = lambda size=size: zip(tokens.split(size), expression.split(size), strict=True)  # noqa: E731
        readout, chosen = fit_readout(batches, tokens[:0], expression[:0], [penalty])
        assert chosen == penalty
        np.testing.assert_allclose(readout(new), model.predict(new.flatten(1).numpy()), atol=1e-4)


def test_validation_perturbations_choose_the_penalty():
    penalties = [1e-4, 1e-2, 1.0, 10.0]
    chosen = set()
    for seed, noise in ((1, 0.0), (2, 5.0)):
        tokens, expression = cells(seed, n=20)
        check_tokens, check_expression = cells(seed=100 + seed, n=6)
        expression = expression + noise * torch.randn(20, 6, generator=torch.Generator().manual_seed(seed))
        errors = [
            (
                (
                    sklearn_ridge(tokens, expression, p).predict(check_tokens.flatten(1))
                    - check_expression.numpy()
                )
                ** 2
            ).mean()
            for p in penalties
        ]
        _, penalty = fit_readout(
            lambda t=tokens, e=expression: [(t, e)], check_tokens, check_expression, penalties
        )
        assert penalty == penalties[int(np.argmin(errors))]
        chosen.add(penalty)
    assert len(chosen) == 2


def test_a_change_read_out_is_the_difference_of_two_readouts():
    tokens, expression = cells()
    readout, _ = fit_readout(lambda: [(tokens, expression)], tokens[:0], expression[:0])
    difference = readout(tokens[:5]) - readout(tokens[5:10])
    torch.testing.assert_close(readout.change(tokens[:5] - tokens[5:10]), difference, atol=1e-4, rtol=1e-4)
    assert not Readout(readout.weight, readout.bias).change(torch.zeros(1, 3, 4)).any()


def test_reading_out_a_mean_is_the_mean_of_readouts():
    tokens, expression = cells()
    readout, _ = fit_readout(lambda: [(tokens, expression)], tokens[:0], expression[:0])
    torch.testing.assert_close(readout(tokens.mean(dim=0, keepdim=True))[0], readout(tokens).mean(dim=0))


def test_a_perfect_addition_is_believed_wholly_and_one_of_half_the_size_is_not_doubled():
    addition = np.random.default_rng(0).standard_normal((8, 30))
    weight, t = gate(addition, addition)
    assert weight == pytest.approx(1.0) and t > 1e6
    assert gate(0.5 * addition, addition)[0] == 1.0
    assert gate(2 * addition, addition)[0] == pytest.approx(0.5)


def test_an_addition_that_points_the_wrong_way_is_switched_off():
    addition = np.random.default_rng(0).standard_normal((8, 30))
    weight, t = gate(addition, -addition)
    assert weight == 0.0 and t < 0


@pytest.mark.parametrize("n", [0, 1, 2])
def test_two_validation_perturbations_cannot_open_the_gate(n):
    addition = np.ones((n, 5))
    assert gate(addition, addition) == (0.0, 0.0)


def test_an_addition_of_nothing_is_switched_off():
    assert gate(np.zeros((5, 4)), np.ones((5, 4))) == (0.0, 0.0)


def test_the_gate_is_the_shrunken_slope_of_a_clustered_regression():
    rng = np.random.default_rng(3)
    addition = rng.standard_normal((9, 40))
    residual = 0.4 * addition + rng.standard_normal((9, 1)) * rng.standard_normal((9, 40))
    groups = np.repeat(np.arange(9), 40)
    fitted = sm.OLS(residual.ravel(), addition.ravel()[:, None]).fit(
        cov_type="cluster", cov_kwds={"groups": groups, "use_correction": False}
    )
    slope, t = fitted.params[0], fitted.params[0] / (fitted.bse[0] * np.sqrt(9 / 8))
    weight, seen = gate(addition, residual)
    assert seen == pytest.approx(t, rel=1e-9) and t > 2
    assert weight == pytest.approx(slope * (1 - 1 / t**2), rel=1e-9)


def test_an_addition_without_relation_is_mostly_ignored():
    rng = np.random.default_rng(4)
    weights = [gate(rng.standard_normal((8, 20)), rng.standard_normal((8, 20)))[0] for _ in range(300)]
    assert np.mean(np.array(weights) == 0) > 0.75 and np.mean(weights) < 0.02


def test_the_scale_is_the_least_squares_factor_within_zero_and_two():
    rng = np.random.default_rng(5)
    prediction = rng.standard_normal((4, 25))
    observed = 1.3 * prediction + 0.5 * rng.standard_normal((4, 25))
    expected = np.linalg.lstsq(prediction.reshape(-1, 1), observed.ravel(), rcond=None)[0][0]
    assert calibrate_scale(prediction, observed) == pytest.approx(expected)
    assert calibrate_scale(prediction, 9 * prediction) == 2.0
    assert calibrate_scale(prediction, -prediction) == 0.0
    assert calibrate_scale(np.zeros((0, 5)), np.zeros((0, 5))) == 1.0


def test_without_validation_perturbations_the_middle_penalty_is_taken():
    tokens, expression = cells()
    batches = lambda: iter([(tokens, expression)])  # noqa: E731
    readout, chosen = fit_readout(batches, tokens[:0], expression[:0], [1.0, 1e-4, 1e-2])
    assert chosen == 1e-2
    alone, _ = fit_readout(batches, tokens[:0], expression[:0], [1e-2])
    assert torch.equal(readout.weight, alone.weight)
