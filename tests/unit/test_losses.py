"""Claims about VICReg and the masks, against hand-written loops and published values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from biojepa.model import VICRegLoss, gene_mask


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_hand(branches: list[np.ndarray], flatten: bool, gamma: float = 1.0) -> tuple[float, float]:
    """Variance and covariance terms with loops over positions and dimensions."""
    var = cov = 0.0
    for z in branches:
        clouds = [z.reshape(-1, z.shape[2])] if flatten else [z[:, t] for t in range(z.shape[1])]
        for cloud in clouds:
            C = np.cov(cloud.T)
            D = len(C)
            hinges = [max(0.0, gamma - np.sqrt(C[d, d] + 1e-4)) for d in range(D)]
            var += sum(hinges) / D / len(clouds)
            cov += sum(C[i, j] ** 2 for i in range(D) for j in range(D) if i != j) / D / len(clouds)
    return var, cov


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("n_regularized", [0, 1, 2])
def test_parts_and_total_agree_with_a_hand_written_loop(flatten, n_regularized):
    predicted, target = 0.8 * normal(20, 3, 5) + 1, 0.7 * normal(20, 3, 5, seed=1)
    regularized = [0.5 * normal(20, 3, 5, seed=2), 1.2 * normal(20, 3, 5, seed=3)][:n_regularized]
    total, parts = VICRegLoss(10.0, 7.0, 2.0, gamma=0.9, flatten=flatten)(predicted, target, *regularized)
    branches = [z.double().numpy() for z in regularized or (predicted, target)]
    var, cov = by_hand(branches, flatten, gamma=0.9)
    inv = float(((predicted.double() - target.double()) ** 2).mean())
    np.testing.assert_allclose([float(parts[k]) for k in ("inv", "var", "cov")], [inv, var, cov], rtol=1e-5)
    assert float(total) == pytest.approx(10 * inv + 7 * var + 2 * cov, rel=1e-5)


def test_the_gradient_is_exact():
    predicted, target, context = (
        (0.5 * normal(6, 2, 3, seed=s)).double().requires_grad_() for s in (0, 1, 2)
    )
    for flatten in (False, True):
        loss = VICRegLoss(flatten=flatten)
        assert torch.autograd.gradcheck(lambda p, t, c, f=loss: f(p, t, c)[0], (predicted, target, context))


def test_a_perfect_prediction_costs_only_what_regularization_costs():
    z = normal(30, 2, 4)
    total, parts = VICRegLoss()(z, z)
    assert float(parts["inv"]) == 0
    assert float(total) == pytest.approx(float(25 * parts["var"] + parts["cov"]), rel=1e-6)
    free, _ = VICRegLoss(variance=0, covariance=0)(z, z)
    assert float(free) == 0


def test_regularization_is_near_its_floor_on_standard_normal_tokens():
    N, D = 4096, 16
    _, parts = VICRegLoss()(torch.zeros(N, 4, D), torch.zeros(N, 4, D), normal(N, 4, D))
    # The sample covariance of independent dimensions has variance 1 / (N - 1).
    assert float(parts["cov"]) == pytest.approx((D - 1) / (N - 1), rel=0.15)
    # A sample deviation scatters by 1/sqrt(2N) around 1, and the hinge keeps the lower half of it.
    assert float(parts["var"]) == pytest.approx(1 / np.sqrt(2 * N) / np.sqrt(2 * np.pi), rel=0.5)


def collapsed(cells: int, T: int, D: int) -> torch.Tensor:
    """Every cell at the same distinct tokens."""
    return normal(1, T, D).expand(cells, T, D)


def test_tokens_that_depend_on_their_position_alone_are_punished_per_token():
    z = collapsed(64, 8, 16)
    _, parts = VICRegLoss()(z, z, z)
    assert float(parts["var"]) == pytest.approx(1 - np.sqrt(1e-4), rel=1e-4)  # the most that there can be
    assert float(parts["cov"]) == pytest.approx(0, abs=1e-9)


def test_the_trap_flattened_regularization_prefers_a_collapsed_encoder_to_a_healthy_one():
    # At the size of the reference model: 64 tokens of 256 dimensions, and no more cells than that.
    dead = collapsed(64, 64, 256)
    target = normal(64, 64, 256, seed=1)
    predicted = target / 2 + np.sqrt(0.75) * normal(64, 64, 256, seed=2)  # correlates 0.5
    flat, per_token = VICRegLoss(flatten=True), VICRegLoss()
    assert 6 < float(flat(dead, dead)[0]) < 12
    assert float(flat(predicted, target)[0]) > 20
    # Per token, a batch of 64 has a covariance floor of 255/63; the order is right nevertheless.
    assert float(per_token(dead, dead)[0]) > 49
    assert float(per_token(predicted, target)[0]) < float(per_token(dead, dead)[0])


def test_a_regularized_branch_under_a_stop_gradient_trains_nothing():
    weight = torch.full((4,), 0.3, requires_grad=True)
    branch = weight * normal(16, 2, 4)
    zero = torch.zeros(16, 2, 4)
    stopped, parts = VICRegLoss()(zero, zero, branch.detach())
    assert float(stopped) > 1 and not stopped.requires_grad
    VICRegLoss()(zero, zero, branch)[0].backward()
    assert (weight.grad < 0).all()  # wants to be wider
    assert not any(part.requires_grad for part in parts.values())


def test_the_order_of_cells_and_of_positions_changes_nothing():
    a, b = 0.6 * normal(12, 3, 4), normal(12, 3, 4, seed=1)
    cells, positions = torch.tensor([5, 3, 11, 0, 1, 2, 4, 6, 7, 8, 9, 10]), torch.tensor([2, 0, 1])
    expected = VICRegLoss()(a, b)[0]
    torch.testing.assert_close(VICRegLoss()(a[cells], b[cells])[0], expected)
    torch.testing.assert_close(VICRegLoss()(a[:, positions], b[:, positions])[0], expected)


def test_shapes_that_do_not_fit_and_single_cells_are_refused():
    with pytest.raises(ValueError, match=r"predicted has shape \(4, 2, 3\), target \(4, 3, 3\)"):
        VICRegLoss()(normal(4, 2, 3), normal(4, 3, 3))
    with pytest.raises(ValueError, match=r"variance over 1 cell\(s\) is not defined; use a larger batch"):
        VICRegLoss()(normal(1, 2, 3), normal(1, 2, 3))


def test_each_cell_hides_its_own_share_of_genes_uniform_between_the_bounds():
    torch.manual_seed(0)
    mask = gene_mask(2000, 3000, 0.3, 0.6)
    assert mask.shape == (2000, 3000) and mask.dtype == torch.bool
    share = mask.double().mean(dim=1).numpy()
    scatter = 5 * np.sqrt(0.25 / 3000)
    assert share.min() > 0.3 - scatter and share.max() < 0.6 + scatter
    assert stats.kstest(share, stats.uniform(0.3, 0.3).cdf).pvalue > 1e-3
    assert abs(mask.double().mean(dim=0).numpy() - 0.45).max() < 5 * np.sqrt(0.25 / 2000)


def test_equal_bounds_fix_the_share_and_zero_hides_nothing():
    torch.manual_seed(0)
    assert not gene_mask(10, 50, 0, 0).any()
    assert float(gene_mask(500, 500, 0.25, 0.25).double().mean()) == pytest.approx(0.25, abs=0.005)


@pytest.mark.parametrize(("low", "high"), [(-0.1, 0.5), (0.6, 0.3), (0.5, 1.0)])
def test_impossible_shares_are_refused(low, high):
    with pytest.raises(ValueError, match=f"masked shares are {low} to {high}; expected 0 <= low <= high < 1"):
        gene_mask(2, 2, low, high)
