"""The effect of a perturbation whose cells lie in other batches than the controls do."""

import numpy as np
import pandas as pd
import pytest

from biojepa.preprocess.batch_effects import BatchCentred, control_weights
from biojepa.preprocess.effects import energy_distance, energy_of_splits, energy_test


class KnownScores:
    """Scores of all cells of a made-up screen."""

    def __init__(self, points):
        self.rows, self._points = np.arange(len(points)), points

    def of(self, rows):
        return self._points[rows]


def uneven(rng, shift=0.0, per_batch=(45, 5), control=(20, 80)):
    """Return test of 50 cells against 100 controls in two batches four standard deviations apart."""
    batch = np.repeat([0, 1, 0, 1], [*per_batch, *control])
    points = rng.normal(size=(len(batch), 10)) + 4 * batch[:, None]
    points[: sum(per_batch)] += shift
    return points, batch, np.arange(sum(per_batch)), np.arange(sum(per_batch), len(batch))


def compare(points, batch, rows, control, permutations=99, adjusted=True):
    centred = BatchCentred(KnownScores(points), pd.Series(batch.astype(str)), control)
    if not adjusted:
        return energy_test(points[rows], points[control], permutations, np.random.default_rng(1))
    strata = centred.strata_with_control(rows, control)
    x, y = centred.of(rows), centred.of(control)
    return energy_test(x, y, permutations, np.random.default_rng(1), strata)


def test_batches_are_no_effect_and_an_effect_is_found_in_spite_of_them():
    """The controls that are compared say where a batch lies, too: this must not make p small."""
    rng = np.random.default_rng(2)
    null = [compare(*uneven(rng)) for _ in range(300)]
    p = np.array([p for _, p in null])
    for level in (0.05, 0.3):
        assert abs(np.mean(p <= level) - level) < 3 * np.sqrt(level * (1 - level) / 300)
    # About 0 without an effect, as the distance without batches is.
    sizes = np.array([size for size, _ in null])
    assert abs(sizes.mean()) < 3.5 * sizes.std() / np.sqrt(300)
    assert compare(*uneven(rng), adjusted=False)[1] == 1 / 100
    # Twice the squared distance of the means: 2 * 10 * 0.8^2.
    size, p_value = compare(*uneven(rng, 0.8))
    assert p_value == 1 / 100 and size == pytest.approx(12.8, rel=0.3)


def test_controls_weigh_as_the_perturbed_cells_are_spread():
    points, batch, rows, control = uneven(np.random.default_rng(3), 0.5)
    weight = control_weights(batch, len(rows))
    np.testing.assert_allclose(weight[control], np.where(batch[control] == 0, 0.9 / 20, 0.1 / 80))
    member = np.isin(np.arange(len(batch)), rows).astype(float)[None]
    found = energy_of_splits(points, member, weight)[0]
    x, y, w = points[rows], points[control], weight[control]
    mean, error = w @ y, (w**2).sum()
    scatter = w @ ((y - mean) ** 2).sum(axis=1) / (1 - error)
    expected = 2 * (((x.mean(axis=0) - mean) ** 2).sum() - x.var(axis=0, ddof=1).sum() / 50 - scatter * error)
    assert found == pytest.approx(expected, rel=1e-10)
    # Weights that are all the same are none.
    same = energy_of_splits(points, member, np.full(len(batch), 1 / len(control)))[0]
    assert same == pytest.approx(energy_distance(x, y), rel=1e-10)
    assert control_weights(np.full(len(batch), 4), len(rows)) is None


def test_batches_with_few_controls_are_one_stratum():
    batch = np.repeat(list("aabbccdd"), [10, 15, 10, 9, 5, 4, 0, 3])
    rows = np.r_[0:10, 25:35, 44:49]
    control = np.setdiff1d(np.arange(len(batch)), rows)
    centred = BatchCentred(KnownScores(np.zeros((len(batch), 2))), pd.Series(batch), control)
    strata = centred.strata_with_control(rows, control)
    assert strata[: len(rows)].tolist() == [0] * 10 + [-1] * 15
    assert strata[len(rows) :].tolist() == [0] * 15 + [-1] * 16
    # Nine controls are too few for the rest, too.
    fewer = control[:24]
    assert not centred.strata_with_control(rows, fewer).any()
