"""Claims about the statistics that see a collapse, against their published formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import linalg

from biojepa.collapse import (
    MIN_RANK,
    MIN_SHARE_OF_UNTRAINED,
    MIN_STD_OVER_CELLS,
    CollapseError,
    lidar,
    rankme,
    refuse_collapse,
    statistics,
    std_over_cells,
)
from biojepa.errors import StoppedRun

D = 12


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def crossed(n_classes: int, spread: float = 5.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Classes at ± axes of the first dimensions, each with the same isotropic scatter."""
    axes = torch.eye(D)
    scatter = torch.cat([axes, -axes])
    means = torch.cat([spread * axes[: n_classes // 2], -spread * axes[: n_classes // 2]])
    return (means[:, None] + scatter).reshape(-1, D), torch.arange(n_classes).repeat_interleave(2 * D)


def test_rank_of_an_isotropic_cloud_is_its_dimension():
    axes = torch.eye(D)
    assert rankme(torch.cat([axes, -axes])) == pytest.approx(D, rel=1e-6)
    assert rankme(normal(4000, D)) == pytest.approx(D, rel=0.01)


def test_rank_of_a_line_is_one_and_of_a_point_zero():
    line = normal(50, 1) @ normal(1, D, seed=1) + 3
    assert rankme(line) == pytest.approx(1, abs=1e-3)
    assert rankme(torch.full((50, D), 2.0)) == 0


def test_rounding_between_equal_cells_is_no_variation():
    nearly = 2.0 + 2e-7 * normal(60, D)
    assert nearly.std(dim=0).max() > 0
    assert rankme(nearly) == 0 and lidar(nearly, torch.arange(60) % 4) == 0


def test_rank_agrees_with_the_formula_and_ignores_the_mean():
    z = normal(100, D) * torch.linspace(0.1, 2, D)
    singular = np.linalg.svd(z.double().numpy() - z.double().numpy().mean(axis=0), compute_uv=False)
    p = singular / singular.sum()
    assert rankme(z) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-6)
    assert rankme(z + 100) == pytest.approx(rankme(z), rel=1e-3)


@pytest.mark.parametrize("n_axes", [2, 5, 10])
def test_lidar_counts_the_directions_that_distinguish_classes(n_axes):
    pooled, classes = crossed(2 * n_axes)
    assert lidar(pooled, classes) == pytest.approx(n_axes, rel=1e-3)


def test_lidar_is_blind_to_variance_within_classes():
    pooled, classes = crossed(6)
    stretched = pooled * torch.ones(D).index_fill(0, torch.arange(6, D), 20.0)
    assert rankme(stretched) > 6 > lidar(stretched, classes)
    assert lidar(stretched, classes) == pytest.approx(3, rel=0.01)


def test_lidar_agrees_with_the_generalized_eigenvalues():
    pooled, classes = normal(300, 6), torch.arange(300) % 7
    pooled = pooled + 2 * normal(7, 6, seed=3)[classes]
    z, names = pooled.double().numpy(), classes.numpy()
    means = np.stack([z[names == c].mean(axis=0) for c in range(7)])
    within = sum((z[names == c] - means[c]).T @ (z[names == c] - means[c]) for c in range(7)) / 300
    within += 1e-3 * np.diag(within).mean() * np.eye(6)
    values = linalg.eigh(np.cov(means.T), within, eigvals_only=True)
    p = values / values.sum()
    assert lidar(pooled, classes) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-6)


def test_lidar_of_classes_that_share_their_mean_is_zero_and_so_is_that_of_one_class():
    axes = torch.eye(D)
    pooled = torch.cat([axes, -axes]).repeat(3, 1)
    assert lidar(pooled, torch.arange(3).repeat_interleave(2 * D)) == 0
    assert lidar(normal(20, D), torch.zeros(20)) == 0


def test_a_collapse_onto_positions_is_seen_over_cells_and_hidden_by_flattening():
    collapsed = normal(1, 8, D).expand(64, 8, D)
    assert float(collapsed.reshape(-1, D).std(dim=0).mean()) > 0.7  # looks healthy
    assert std_over_cells(collapsed) == pytest.approx(0, abs=1e-6)
    measured = statistics(collapsed, torch.arange(64) % 4)
    assert measured["std_cells"] == pytest.approx(0, abs=1e-6) and measured["rankme"] == 0
    with pytest.raises(CollapseError, match="every cell gets the same tokens"):
        refuse_collapse(measured, {"std_cells": 1.0}, 40)


def test_statistics_by_value():
    tokens, classes = normal(90, 5, D), torch.arange(90) % 3
    measured = statistics(tokens, classes)
    array = tokens.double().numpy()
    assert measured["std_cells"] == pytest.approx(array.std(axis=0, ddof=1).mean(), rel=1e-5)
    assert measured["std_cells_pooled"] == pytest.approx(
        array.mean(axis=1).std(axis=0, ddof=1).mean(), rel=1e-5
    )
    assert measured["rankme"] == rankme(tokens.mean(dim=1))
    assert measured["lidar"] == lidar(tokens.mean(dim=1), classes)


UNTRAINED = {"std_cells": 0.8}


def test_a_healthy_embedding_passes_at_its_floors():
    healthy = {"std_cells": 1.0, "rankme": 10.0}
    refuse_collapse(healthy, UNTRAINED, 5)
    refuse_collapse({"std_cells": MIN_SHARE_OF_UNTRAINED * 0.8, "rankme": MIN_RANK}, UNTRAINED, 5)
    refuse_collapse({**healthy, "std_cells": MIN_STD_OVER_CELLS}, {"std_cells": MIN_STD_OVER_CELLS}, 5)


@pytest.mark.parametrize(
    ("measured", "message"),
    [
        ({"std_cells": 0.01}, r"standard deviation over cells is 0\.0100, below 0\.05; every cell gets"),
        (
            {"std_cells": 0.24},
            r"over cells fell from 0\.800 before training to 0\.240, which is 30%, below 50%",
        ),
        ({"rankme": 1.2}, r"rank \(RankMe\) is 1\.20, below 2\.0; cells differ along one direction"),
    ],
)
def test_the_message_says_what_fell_how_far_and_what_to_change(measured, message):
    with pytest.raises(CollapseError, match=message) as caught:
        refuse_collapse({"std_cells": 1.0, "rankme": 10.0, **measured}, UNTRAINED, 70)
    for part in ("by step 70", "regularizer: per_token", "train.encoder.variance", "learning_rate"):
        assert part in str(caught.value)
    assert isinstance(caught.value, StoppedRun) and "\n" not in str(caught.value)
