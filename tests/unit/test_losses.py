"""Claims about VICReg and SIGReg, against hand-written loops, closed forms and published values."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from scipy import integrate

from biojepa.model import SIGRegLoss, VICRegLoss

LOSSES = {"vicreg": VICRegLoss, "sigreg": SIGRegLoss}
# N times the squared distance of the characteristic functions, in expectation on standard normal samples.
FLOOR = np.sqrt(2 * np.pi) * (1 - 1 / np.sqrt(3))


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


@pytest.mark.parametrize(
    "loss",
    [VICRegLoss(), VICRegLoss(flatten=True), SIGRegLoss(0.3, num_slices=5)],
    ids=["vicreg", "vicreg_flat", "sigreg"],
)
def test_the_gradient_is_that_of_finite_differences(loss):
    predicted, target, context = (
        (0.5 * normal(6, 2, 3, seed=s)).double().requires_grad_() for s in (0, 1, 2)
    )

    def total(p: torch.Tensor, t: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)  # the same random vectors each time
        return loss(p, t, c)[0]

    assert torch.autograd.gradcheck(total, (predicted, target, context))


def test_the_gradient_of_vicreg_is_the_derived_one():
    N, T, D = 9, 2, 4
    predicted, target, z = (normal(N, T, D, seed=s).double().requires_grad_() for s in (0, 1, 2))
    with torch.no_grad():
        z.mul_(torch.tensor([0.3, 0.9, 1.4, 0.5]).double())  # on both sides of the hinge
    VICRegLoss(10.0, 7.0, 2.0)(predicted, target, z)[0].backward()
    difference = (predicted - target).detach().numpy()
    np.testing.assert_allclose(predicted.grad, 20 * difference / difference.size)
    np.testing.assert_allclose(target.grad, -20 * difference / difference.size)
    for t in range(T):
        centred = z[:, t].detach().numpy() - z[:, t].detach().numpy().mean(axis=0)
        C = centred.T @ centred / (N - 1)
        deviation = np.sqrt(np.diag(C) + 1e-4)
        hinge = np.where(deviation < 1, -1 / deviation, 0) * centred / (N - 1) / D
        covariance = 4 / (D * (N - 1)) * centred @ (C - np.diag(np.diag(C)))
        np.testing.assert_allclose(z.grad[:, t], (7 * hinge + 2 * covariance) / T, rtol=1e-9)
        assert 0 < (deviation < 1).sum() < D


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


def test_both_branches_are_added_up():
    a, b = 0.6 * normal(20, 3, 4), 0.8 * normal(20, 3, 4, seed=1)
    both, one, other = (VICRegLoss()(a, b, *branches)[1] for branches in ((a, b), (a,), (b,)))
    for part in ("var", "cov"):
        torch.testing.assert_close(both[part], one[part] + other[part])


def test_a_batch_smaller_than_the_dimension_is_warned_of_once():
    loss, z = VICRegLoss(), normal(5, 2, 9)
    with pytest.warns(
        UserWarning, match="covariance of 9 dimensions is estimated from 5 samples.*below 2"
    ) as w:
        loss(z, z)
        loss(z, z)
    assert len(w) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        VICRegLoss()(normal(9, 2, 9), normal(9, 2, 9))
        VICRegLoss(flatten=True)(z, z)  # pooled, there are 10 samples
        VICRegLoss(covariance=0)(z, z)


@pytest.mark.parametrize(
    ("predicted", "target", "message"),
    [
        (normal(4, 2, 3), normal(4, 3, 3), "predicted has shape (4, 2, 3), target (4, 3, 3)"),
        (normal(4, 3), normal(4, 3), "predicted has shape (4, 3); expected (cells, tokens, dim)"),
        (
            normal(4, 2, 3).long(),
            normal(4, 2, 3),
            "predicted has dtype torch.int64; expected a floating dtype such as torch.float32",
        ),
        (
            normal(4, 2, 3),
            normal(4, 2, 3).int(),
            "target has dtype torch.int32; expected a floating dtype such as torch.float32",
        ),
    ],
)
@pytest.mark.parametrize("name", LOSSES)
def test_shapes_and_dtypes_that_do_not_fit_are_refused_with_both(name, predicted, target, message):
    with pytest.raises(ValueError) as caught:
        LOSSES[name]()(predicted, target)
    assert str(caught.value) == message


@pytest.mark.parametrize("name", LOSSES)
def test_single_cells_are_refused(name):
    with pytest.raises(ValueError, match=r"(of|over) 1 cell\(s\) is not defined; use a larger batch"):
        LOSSES[name]()(normal(1, 2, 3), normal(1, 2, 3))


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_summed_in_single_precision_also_under_autocast(name):
    a, b = 0.6 * normal(64, 3, 4), normal(64, 3, 4, seed=1)
    coarse, fine = a.bfloat16(), a.bfloat16().float()
    torch.manual_seed(0)
    expected = LOSSES[name]()(fine, b)[0]
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(LOSSES[name]()(coarse, b)[0], expected)


def epps_pulley(x: np.ndarray) -> float:
    """The statistic against N(0, 1), its integral done in closed form; cross-checked below."""
    pairs = np.exp(-((x[:, None] - x[None]) ** 2) / 2).mean()
    return len(x) * np.sqrt(2 * np.pi) * (pairs - np.sqrt(2) * np.exp(-(x**2) / 4).mean() + 1 / np.sqrt(3))


def epps_pulley_by_quadrature(x: np.ndarray) -> float:
    """The statistic as its definition has it, with a complex exponential and adaptive quadrature."""

    def integrand(t: float) -> float:
        return abs(np.exp(1j * t * x).mean() - np.exp(-(t**2) / 2)) ** 2 * np.exp(-(t**2) / 2)

    return len(x) * integrate.quad(integrand, -np.inf, np.inf, limit=200)[0]


SAMPLES = {
    "normal": normal(40, 1, 1),
    "shifted": normal(40, 1, 1) + 2,
    "narrow": 0.1 * normal(40, 1, 1),
    "wide": 2.5 * normal(40, 1, 1),
    "two_points": torch.tensor([-1.0, 1.0]).repeat(20)[:, None, None],
}


@pytest.mark.parametrize("name", SAMPLES)
def test_sigreg_in_one_dimension_is_the_epps_pulley_statistic(name):
    z = SAMPLES[name].double()
    expected = epps_pulley_by_quadrature(z.numpy().ravel())
    assert epps_pulley(z.numpy().ravel()) == pytest.approx(expected, rel=1e-6)
    # In one dimension every unit vector is 1 or -1, and the statistic is the same for both.
    _, parts = SIGRegLoss(num_slices=3)(z, z, z)
    assert float(parts["sigreg"]) == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_sigreg_is_the_mean_over_unit_vectors_positions_and_branches():
    a, b = normal(30, 3, 4).double(), 0.5 * normal(30, 3, 4, seed=1).double()
    torch.manual_seed(5)
    total, parts = SIGRegLoss(0.2, num_slices=7)(a, b)
    torch.manual_seed(5)
    vectors = torch.randn(4, 7, dtype=torch.float64).numpy()
    vectors /= np.sqrt((vectors**2).sum(axis=0))
    statistics = []
    for z in (a.numpy(), b.numpy()):
        for t in range(3):
            statistics += [epps_pulley(z[:, t] @ vector) for vector in vectors.T]
    inv = float((a - b).square().mean())
    assert float(parts["sigreg"]) == pytest.approx(np.mean(statistics), rel=1e-4)
    assert float(parts["inv"]) == pytest.approx(inv)
    assert float(total) == pytest.approx(0.8 * inv + 0.2 * np.mean(statistics), rel=1e-4)
    assert not any(part.requires_grad for part in parts.values())


def test_the_gradient_of_sigreg_is_the_derived_one():
    x = (0.7 * normal(12, 1, 1)).double().requires_grad_()
    SIGRegLoss(weight=1.0, num_slices=2)(x, x, x)[0].backward()
    value = x.detach().numpy().ravel()
    difference = value[:, None] - value[None]
    pairs = -2 / len(value) * (difference * np.exp(-(difference**2) / 2)).sum(axis=1)
    expected = np.sqrt(2 * np.pi) * (pairs + value * np.exp(-(value**2) / 4) / np.sqrt(2))
    np.testing.assert_allclose(x.grad.numpy().ravel(), expected, rtol=1e-3, atol=1e-4)


def test_each_call_draws_its_vectors_from_the_random_state():
    z, loss = 2 * normal(30, 2, 4), SIGRegLoss(num_slices=4)
    torch.manual_seed(3)
    first, second = loss(z, z)[0], loss(z, z)[0]
    torch.manual_seed(3)
    assert torch.equal(loss(z, z)[0], first) and not torch.equal(first, second)


def sigreg(z: torch.Tensor) -> float:
    torch.manual_seed(0)
    return float(SIGRegLoss(num_slices=128)(z, z, z)[1]["sigreg"])


@pytest.mark.parametrize("cells", [64, 1024])
def test_sigreg_is_at_its_floor_on_standard_normal_tokens_whatever_the_batch(cells):
    assert sigreg(normal(cells, 8, 16)) == pytest.approx(FLOOR, rel=0.15)


@pytest.mark.parametrize(
    ("z", "at_least"),
    [
        # A single point x costs N √(2π) (1 - √2 exp(-x²/4) + 1/√3); x = 0 is the cheapest.
        (torch.zeros(512, 1, 16), 0.9 * 512 * 0.4089),
        (normal(1, 1, 16).expand(512, 1, 16), 512 * 0.4089),
        (normal(512, 1, 16) * torch.tensor([3.0] * 4 + [0.1] * 12), 5 * FLOOR),
        # Cauchy samples, each dimension scaled to the quartiles of a normal one.
        (normal(512, 1, 1) / normal(512, 1, 1, seed=1) * 0.6745, 3 * FLOOR),
        (normal(512, 1, 2).sign(), 3 * FLOOR),
    ],
    ids=["at_zero", "at_a_point", "anisotropic", "heavy_tailed", "discrete"],
)
def test_sigreg_punishes_what_is_not_isotropic_normal(z, at_least):
    assert sigreg(z) > at_least


def test_sigreg_moves_collapsed_cells_apart():
    start = 0.05 * normal(128, 2, 4)
    z = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([z], lr=0.05)
    loss = SIGRegLoss(weight=1.0, num_slices=32)
    torch.manual_seed(0)
    for _ in range(60):
        optimizer.zero_grad()
        loss(z, z, z)[0].backward()
        optimizer.step()
    assert float(start.std(dim=0).mean()) < 0.06
    assert 0.7 < float(z.detach().std(dim=0).mean()) < 1.3


def test_sigreg_refuses_a_weight_that_is_no_share():
    with pytest.raises(ValueError, match=r"the weight is 1\.5; expected a number between 0 and 1"):
        SIGRegLoss(weight=1.5)
