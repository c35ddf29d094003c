"""Predicted against observed cells: by scipy, by hand, and what the definitions promise on average."""

from __future__ import annotations

from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from evaluation_case import GENES, Screen
from scipy import sparse, stats
from scipy.spatial.distance import cdist, pdist

from biojepa.evaluation import distribution
from biojepa.evaluation.distribution import (
    DISTRIBUTION_METRICS,
    distribution_scores,
    energy_distance,
    mean_distance_within,
    moved_controls,
    observed_cells,
    variance_ratio,
)
from biojepa.evaluation.evaluate import evaluate
from biojepa.evaluation.predictions import Prediction, predicts_cells, read_prediction
from biojepa.evaluation.settings import DistributionSettings, EvaluationSettings
from biojepa.evaluation.truth import assemble_fold, collect_moments
from biojepa.halves import half_b

SETTINGS = DistributionSettings(max_cells=10)


@pytest.fixture(scope="module")
def clouds():
    rng = np.random.default_rng(0)
    return rng.gamma(1.0, 1.0, (30, 12)), rng.gamma(1.0, 1.0, (21, 12)) + 0.4


@pytest.fixture(scope="module")
def screen(tmp_path_factory) -> Screen:
    return Screen(tmp_path_factory.mktemp("distribution"), seed=3)


@pytest.fixture(scope="module")
def fold(screen):
    moments = collect_moments(screen.cells, pd.Index(GENES))
    return screen.splits[0], assemble_fold(moments, screen.splits[0], pd.Index(GENES))


def test_the_energy_distance_is_that_of_scipys_pairwise_distances(clouds):
    x, y = clouds
    expected = 2 * cdist(x, y).mean() - pdist(x).mean() - pdist(y).mean()
    assert energy_distance(x, y) == pytest.approx(expected, abs=1e-10)
    assert energy_distance(x, y, pdist(y).mean()) == pytest.approx(expected, abs=1e-10)
    assert mean_distance_within(x) == pytest.approx(pdist(x).mean(), abs=1e-10)


def test_in_one_dimension_it_is_scipys_but_for_the_pairs_of_a_cell_with_itself():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=40), rng.normal(0.7, 1.3, size=25)
    # scipy gives the square root, and lets every value be compared with itself at distance 0.
    plugged_in = stats.energy_distance(x, y) ** 2
    own = pdist(x[:, None]).mean() / len(x) + pdist(y[:, None]).mean() / len(y)
    assert energy_distance(x[:, None], y[:, None]) == pytest.approx(plugged_in - own, abs=1e-10)


def test_the_energy_distance_by_hand():
    x, y = np.array([[0.0, 0.0], [3.0, 4.0]]), np.array([[0.0, 1.0], [0.0, 3.0]])
    between = (1 + 3 + np.hypot(3, 3) + np.hypot(3, 1)) / 4
    assert energy_distance(x, y) == pytest.approx(2 * between - 5 - 2)


def test_the_energy_distance_is_unbiased_and_the_plugged_in_one_is_not():
    rng = np.random.default_rng(2)
    values, plugged_in = [], []
    for _ in range(400):
        x, y = rng.normal(size=(8, 5)), rng.normal(size=(6, 5))
        values.append(energy_distance(x, y))
        plugged_in.append(2 * cdist(x, y).mean() - cdist(x, x).mean() - cdist(y, y).mean())
    error = np.std(values) / np.sqrt(len(values))
    assert abs(np.mean(values)) < 3.5 * error
    assert np.mean(plugged_in) > 20 * error


def test_cell_evals_distance_to_control_follows_from_the_same_function():
    """Its metric of a like name correlates distances to control, of predicted and of real cells."""
    from cell_eval._types import PerturbationAnndataPair
    from cell_eval.metrics._anndata import edistance

    rng = np.random.default_rng(4)
    labels = np.repeat(["control", "A", "B", "C", "D"], 9)
    shift = dict(zip(["control", "A", "B", "C", "D"], (0, 0.3, 0.6, 0.2, 1.1), strict=True))
    obs = pd.DataFrame({"perturbation": labels}, index=[f"c{i}" for i in range(len(labels))])
    made = [
        rng.normal(2, 1, (len(labels), 7)) + np.array([shift[name] for name in labels])[:, None] * scale
        for scale in (1.0, 0.8)
    ]
    real, predicted = (ad.AnnData(X.astype(np.float32), obs=obs.copy()) for X in made)
    pair = PerturbationAnndataPair(real=real, pred=predicted, pert_col="perturbation", control_pert="control")
    distances = []
    for cells in (real.X, predicted.X):
        control = cells[labels == "control"].astype(float)
        members = [cells[labels == name].astype(float) for name in "ABCD"]
        # Theirs lets a cell be compared with itself, which lowers the distances within a cloud.
        distances.append(
            [
                energy_distance(x, control) + (mean_distance_within(x) + mean_distance_within(control)) / 9
                for x in members
            ]
        )
    assert edistance(pair) == pytest.approx(stats.pearsonr(*distances).statistic, abs=1e-5)


def test_identical_clouds_and_single_cells():
    x = np.random.default_rng(5).normal(size=(12, 4))
    # The same cells, not new ones of the same distribution: below 0 by twice the mean distance over n.
    assert energy_distance(x, x) == pytest.approx(-2 * pdist(x).mean() / 12)
    assert np.isnan(energy_distance(x[:1], x))
    assert np.isnan(energy_distance(x, x[:1]))
    assert np.isnan(variance_ratio(x[:1], x))


def test_the_variance_ratio_is_the_median_over_the_genes_that_vary(clouds):
    x, y = clouds
    ratios = x.var(axis=0, ddof=1) / y.var(axis=0, ddof=1)
    assert variance_ratio(x, y) == pytest.approx(np.median(ratios))
    chosen = np.arange(12) < 7
    assert variance_ratio(x, y, chosen) == pytest.approx(np.median(ratios[:7]))
    still = y.copy()
    still[:, 0] = 2.0
    assert variance_ratio(x, still) == pytest.approx(np.median(ratios[1:]))
    assert np.isnan(variance_ratio(x, y, np.arange(12) < 4))
    assert variance_ratio(2 * y + 5, y) == pytest.approx(4.0)
    assert variance_ratio(np.tile(y.mean(axis=0), (9, 1)), y) == 0.0


def test_cells_of_the_same_distribution_get_the_best_values_and_others_do_not():
    rng = np.random.default_rng(6)
    draws = {"same": [], "narrow": [], "shifted": []}
    for _ in range(60):
        y = rng.gamma(2.0, 1.0, (40, 30))
        x = rng.gamma(2.0, 1.0, (40, 30))
        mean = x.mean(axis=0)
        for name, cells in (("same", x), ("narrow", mean + 0.3 * (x - mean)), ("shifted", x + 0.5)):
            draws[name].append((variance_ratio(cells, y), energy_distance(cells, y)))
    ratio, distance = (dict(zip(draws, column, strict=True)) for column in zip(
        *(np.mean(found, axis=0) for found in draws.values()), strict=True))  # fmt: skip
    best = DISTRIBUTION_METRICS["variance_ratio"].best
    assert ratio["same"] == pytest.approx(best, abs=0.05)
    assert ratio["narrow"] == pytest.approx(0.09, abs=0.01)
    assert abs(distance["same"]) < 0.02
    assert min(distance["narrow"], distance["shifted"]) > 0.3


def test_moved_controls_keep_their_spread_but_for_the_cut_at_zero():
    controls = np.array([[0.0, 2.0], [1.0, 4.0]])
    moved = moved_controls(controls, np.array([-0.5, 1.0]))
    np.testing.assert_array_equal(moved, [[0.0, 3.0], [0.5, 5.0]])


def test_observed_cells_are_the_halves_and_controls_of_the_file(screen, fold):
    _, truth = fold
    rows = [0, 3]
    cells = observed_cells(screen.cells, [fold], {0: rows}, DistributionSettings(max_cells=1000))[0]
    in_b = half_b(screen.names, 0, screen.labels)
    order = [GENES.index(gene) for gene in truth.genes]
    for row in rows:
        mine = screen.labels == truth.perturbations[row]
        for found, inside in ((cells.half_a[row], ~in_b), (cells.half_b[row], in_b)):
            np.testing.assert_array_equal(found.toarray(), screen.X[mine & inside][:, order])
        np.testing.assert_allclose(cells.half_b[row].toarray().mean(axis=0), truth.half_b[row], rtol=1e-5)
    np.testing.assert_array_equal(cells.controls.toarray(), screen.X[screen.labels == "control"][:, order])
    assert set(cells.half_b) == set(rows)


def test_the_sample_of_cells_is_bounded_and_does_not_depend_on_their_order(screen, fold, tmp_path):
    found = observed_cells(screen.cells, [fold], {0: [1]}, SETTINGS)[0]
    assert found.controls.shape[0] == 10
    assert found.half_a[1].shape[0] == found.half_b[1].shape[0] == 10
    stored = ad.read_h5ad(screen.cells)
    stored[::-1].copy().write_h5ad(tmp_path / "turned.h5ad")
    again = observed_cells(tmp_path / "turned.h5ad", [fold], {0: [1]}, SETTINGS)[0]
    as_set = lambda cells: {row.tobytes() for row in cells.toarray()}  # noqa: E731
    assert as_set(again.controls) == as_set(found.controls)
    assert as_set(again.half_b[1]) == as_set(found.half_b[1])
    other = observed_cells(screen.cells, [fold], {0: [1]}, replace(SETTINGS, seed=1))[0]
    assert as_set(other.controls) != as_set(found.controls)


def test_a_held_out_context_is_compared_with_its_own_controls(screen, fold, tmp_path):
    split, truth = fold
    stored = ad.read_h5ad(screen.cells)
    stored.obs["cell_type"] = np.where(np.arange(stored.n_obs) % 3 == 0, "K562", "RPE1")
    stored.write_h5ad(tmp_path / "cells.h5ad")
    label = truth.perturbations[0]
    info = {**split.info, "context_column": "cell_type", "context": "K562"}
    placed = replace(truth, perturbations=[f"{label} @ K562", *truth.perturbations[1:]])
    every = DistributionSettings(max_cells=1000)
    cells = observed_cells(tmp_path / "cells.h5ad", [(replace(split, info=info), placed)], {0: [0]}, every)[0]
    inside = (stored.obs["cell_type"] == "K562").to_numpy()
    np.testing.assert_array_equal(cells.controls.toarray(), screen.X[inside & (screen.labels == "control")])
    n = (inside & (screen.labels == label)).sum()
    assert (cells.half_a[0].shape[0], cells.half_b[0].shape[0]) == (n // 2, n - n // 2)


def test_each_kind_of_model_is_scored_by_its_cells(screen, fold):
    _, truth = fold
    cells = observed_cells(screen.cells, [fold], {0: [2]}, DistributionSettings(max_cells=1000))[0]
    # Some genes that hardly any control cell shows.
    shown = np.arange(len(GENES)) >= 15
    cells = replace(cells, controls=sparse.csr_matrix(cells.controls.toarray() * shown))
    seen, half_a = cells.half_b[2].toarray().astype(float), cells.half_a[2].toarray().astype(float)
    controls = cells.controls.toarray().astype(float)
    n = len(truth.perturbations)
    flat = Prediction(np.tile(truth.control_mean, (n, 1)))
    moved = Prediction(truth.half_a)
    rng = np.random.default_rng(0)
    made, owner = rng.gamma(1.0, 1.0, (5 * n, len(GENES))).astype(np.float32), np.repeat(np.arange(n), 5)
    own = Prediction(truth.half_a, None, sparse.csr_matrix(made), owner)
    models = {"no_change": flat, "duplicate": moved, "ridge": moved, "mine": own}
    table = distribution_scores(
        truth, cells, [(name, 0, lambda p=p: p) for name, p in models.items()], "duplicate", SETTINGS
    )
    values = table.set_index(["model", "metric"])["value"]
    change = truth.half_a[2] - truth.control_mean
    expected = {
        "no_change": controls,
        "duplicate": half_a,
        "ridge": np.maximum(controls + change, 0),
        "mine": made[owner == 2].astype(float),
    }
    detected = (controls > 0).mean(axis=0) >= 0.1
    assert 5 < detected.sum() <= shown.sum()
    for model, predicted in expected.items():
        assert values[model, "energy_distance"] == pytest.approx(energy_distance(predicted, seen), abs=1e-9)
        ratio = variance_ratio(predicted, seen, detected)
        assert values[model, "variance_ratio"] == pytest.approx(ratio, abs=1e-9)
    assert values["duplicate", "energy_distance"] < values["no_change", "energy_distance"]
    assert set(table["perturbation"]) == {truth.perturbations[2]}


def with_cells(spread, n=15):
    """Give a file single cells around the mean that it predicts, rows and genes turned round."""

    def edit(content):
        content = content[::-1, ::-1].copy()
        rng = np.random.default_rng(9)
        noise = rng.normal(0, spread, (n * content.n_obs, len(GENES)))
        cells = np.repeat(content.X, n, axis=0) + noise
        content.uns["predicted_cells"] = {
            "X": sparse.csr_matrix(np.maximum(cells, 0).astype(np.float32)),
            "row": np.repeat(np.arange(content.n_obs, dtype=np.int32), n),
        }
        return content

    return edit


def test_predicted_cells_are_read_for_the_rows_of_the_truth_where_they_are_asked_for(screen, fold):
    split, truth = fold
    file = screen.write_prediction("mine", 0, edit=with_cells(0.2))
    assert predicts_cells(file.path)
    assert read_prediction(file, truth, split).cells is None
    found = read_prediction(file, truth, split, with_cells=True)
    stored = ad.read_h5ad(file.path)
    for row, label in enumerate(truth.perturbations):
        place = stored.obs["perturbation"].tolist().index(label)
        expected = stored.uns["predicted_cells"]["X"][stored.uns["predicted_cells"]["row"] == place]
        np.testing.assert_array_equal(found.cells[found.owner == row].toarray(), expected.toarray()[:, ::-1])
    assert len(found.owner) == 15 * len(truth.perturbations)


def test_the_evaluation_compares_cells_of_the_models_that_matter(screen):
    names = ("mean", "no_change", "biojepa", "duplicate", "ridge", "knn")
    files = [screen.write_prediction(name, 0) for name in names]
    files.append(screen.write_prediction("mine", 0, edit=with_cells(0.4)))
    settings = EvaluationSettings(
        draws=100, min_perturbations=5, distribution=replace(SETTINGS, max_perturbations=6)
    )
    result = evaluate(screen.cells, screen.splits[:1], files, settings)
    table = result.metrics[result.metrics["metric"].isin(DISTRIBUTION_METRICS)]
    best = result.verdict["details"][0]["comparisons"][0]["best_baseline"]
    assert set(table["model"]) == {"mean", "no_change", "biojepa", "duplicate", "mine", best}
    assert {"ridge", "knn"} - set(table["model"])
    counts = table.groupby(["model", "metric"])["perturbation"].nunique()
    assert set(counts) == {6}
    pooled = result.summary[result.summary["category"] == "all"].set_index(["model", "metric"])["mean"]
    assert pooled["duplicate", "energy_distance"] < 0.1 < pooled["mean", "energy_distance"]
    assert pooled["mine", "energy_distance"] < pooled["mean", "energy_distance"]
    off = replace(settings, distribution=replace(SETTINGS, max_perturbations=0))
    none = evaluate(screen.cells, screen.splits[:1], files[:1], off)
    assert not set(none.metrics["metric"]) & set(DISTRIBUTION_METRICS)


def test_cells_are_read_from_a_matrix_of_many_blocks(screen, fold, monkeypatch):
    whole = observed_cells(screen.cells, [fold], {0: [0]}, SETTINGS)[0]
    read = distribution.rows_of_matrix
    monkeypatch.setattr(distribution, "rows_of_matrix", lambda matrix: read(matrix, block=7))
    parts = observed_cells(screen.cells, [fold], {0: [0]}, SETTINGS)[0]
    np.testing.assert_array_equal(parts.controls.toarray(), whole.controls.toarray())
    np.testing.assert_array_equal(parts.half_b[0].toarray(), whole.half_b[0].toarray())
