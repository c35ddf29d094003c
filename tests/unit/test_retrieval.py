"""Claims about retrieval of cells of the same perturbation, against scikit-learn and enumeration."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score
from sklearn.metrics.pairwise import cosine_similarity

from biojepa.retrieval import (
    ACTIVITY,
    DISTINCTIVENESS,
    Retrieval,
    average_precisions,
    expected_average_precision,
    retrieve,
)


def by_kind(z, labels, kind) -> dict[int, Retrieval]:
    return {found.label: found for found in retrieve(z, labels) if found.kind == kind}


def test_average_precision_by_hand():
    # Ranked: right, wrong, right, wrong. Precision 1 at the first, 2/3 at the second.
    found = average_precisions(np.array([[0.9, 0.5]]), np.array([[0.7, 0.1]]))
    assert found == pytest.approx([(1 + 2 / 3) / 2])


@pytest.mark.parametrize("decimals", [9, 1])
def test_average_precision_is_that_of_sklearn_with_and_without_ties(decimals):
    rng = np.random.default_rng(0)
    positive, negative = rng.normal(0.3, 0.5, (40, 7)).round(decimals), rng.normal(0, 0.5, (40, 23))
    negative = negative.round(decimals)
    truth = np.r_[np.ones(7), np.zeros(23)]
    expected = [average_precision_score(truth, np.r_[p, n]) for p, n in zip(positive, negative, strict=True)]
    np.testing.assert_allclose(average_precisions(positive, negative), expected, atol=1e-12)


@pytest.mark.parametrize(("k", "m"), [(1, 4), (2, 3), (3, 5), (4, 1)])
def test_chance_is_the_mean_over_all_orders(k, m):
    values = []
    for places in combinations(range(k + m), k):
        positive = -np.array([places], dtype=float)
        negative = -np.array([sorted(set(range(k + m)) - set(places))], dtype=float)
        values.append(average_precisions(positive, negative)[0])
    assert expected_average_precision(k, m) == pytest.approx(np.mean(values))


def test_chance_without_anything_to_find_or_to_confuse():
    assert np.isnan(expected_average_precision(0, 5))
    assert expected_average_precision(5, 0) == 1


def test_retrieval_is_a_loop_over_cells_by_another_hand():
    rng = np.random.default_rng(1)
    labels = rng.permutation(np.repeat([-1, 0, 1, 2, 5], [9, 6, 4, 1, 7]))  # perturbation 2 has one cell
    z = rng.standard_normal((len(labels), 6)) + 0.8 * rng.standard_normal((6, 6))[labels]
    similarity = cosine_similarity(z)
    for kind in (ACTIVITY, DISTINCTIVENESS):
        found = by_kind(z, labels, kind)
        assert list(found) == [0, 1, 5]
        for label, result in found.items():
            scores, sizes = [], []
            for cell in np.flatnonzero(labels == label):
                used = labels == label
                used = used | (labels == -1) if kind == ACTIVITY else labels >= 0
                used[cell] = False
                scores.append(average_precision_score(labels[used] == label, similarity[cell, used]))
                sizes.append(int(used.sum()))
            assert result.value == pytest.approx(np.mean(scores), abs=1e-12)
            k = int((labels == label).sum()) - 1
            assert result.chance == pytest.approx(expected_average_precision(k, sizes[0] - k))


def test_clusters_apart_are_found_and_noise_is_not():
    rng = np.random.default_rng(2)
    labels = np.repeat([-1, 0, 1, 2], 40)
    apart = np.eye(4)[labels] + 1e-3 * rng.standard_normal((160, 4))
    noise = rng.standard_normal((160, 20))
    for kind in (ACTIVITY, DISTINCTIVENESS):
        assert [found.value for found in by_kind(apart, labels, kind).values()] == pytest.approx([1, 1, 1])
        lost = by_kind(noise, labels, kind).values()
        assert np.mean([found.value - found.chance for found in lost]) == pytest.approx(0, abs=0.03)


def test_an_embedding_of_one_point_finds_as_many_as_there_are():
    labels = np.repeat([-1, 0, 1], [10, 5, 8])
    found = by_kind(np.zeros((23, 3)), labels, ACTIVITY)
    assert found[0].value == pytest.approx(4 / 14)
    assert found[1].value == pytest.approx(7 / 17)


def test_nothing_is_said_where_there_is_nothing_to_tell_from():
    z = np.random.default_rng(3).standard_normal((6, 3))
    assert by_kind(z, np.zeros(6, int), ACTIVITY) == by_kind(z, np.zeros(6, int), DISTINCTIVENESS) == {}
