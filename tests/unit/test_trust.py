"""Claims about expected accuracy: it never sees what it is compared with, finds what is there and no more."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from biojepa.contracts import METRICS_COLUMNS, TRUST_COLUMNS
from biojepa.evaluation import trust
from biojepa.evaluation.settings import EvaluationSettings
from biojepa.evaluation.trust import (
    METRIC,
    PENALTIES,
    Expectation,
    TrustModel,
    cross_fit,
    effect_size_sds,
    effect_sizes,
    judge_trust,
    trust_table,
)

SETTINGS = EvaluationSettings(draws=400, seed=1)


def made(n=40, relation=0.0, kind=0.0, noise=0.15, seed=0) -> pd.DataFrame:
    """Perturbations of two kinds, whose accuracy may follow from similarity and from the kind."""
    rng = np.random.default_rng(seed)
    similarity, seen = rng.uniform(0, 1, n), rng.integers(0, 2, n)
    observed = 0.3 + relation * (similarity - 0.5) + kind * (seen - 0.5) + noise * rng.standard_normal(n)
    table = pd.DataFrame(
        {
            "perturbation": [f"P{place:03d}" for place in range(n)],
            "category": np.where(seen, "single_in_combo", "single"), "n_genes_seen": seen,
            "nearest_training_gene": "A", "nearest_similarity": similarity,
            "prior_coverage": rng.integers(0, 4, n) / 3, "predicted_effect": rng.gamma(2, 1, n),
            "predicted_effect_sd": rng.gamma(2, 0.1, n), "observed": np.clip(observed, -1, 1),
        }
    )  # fmt: skip
    return table.reindex(columns=list(TRUST_COLUMNS))


def standardized(table: pd.DataFrame) -> np.ndarray:
    """Kinds centred, features standardized: written down here once more, without the module."""
    kinds = np.column_stack([table["category"] == name for name in ("single", "single_in_combo")]).astype(
        float
    )
    sd = table["predicted_effect_sd"] / table["predicted_effect"]
    values = np.column_stack(
        [table["nearest_similarity"], table["prior_coverage"], np.log1p(table["predicted_effect"]), sd]
    )
    return np.hstack([kinds - kinds.mean(axis=0), (values - values.mean(axis=0)) / values.std(axis=0)])


@pytest.mark.parametrize("relation", [0.0, 0.5])
def test_the_fit_is_the_ridge_of_least_leave_one_out_error(relation):
    table = made(relation=relation, noise=0.2)
    design, observed = standardized(table), table["observed"].to_numpy()
    centred, n = observed - observed.mean(), len(observed)
    errors, weights = [], []
    for penalty in PENALTIES:
        solve = np.zeros((6, n)) if np.isinf(penalty) else np.linalg.solve(
            design.T @ design + penalty * np.eye(6), design.T
        )  # fmt: skip
        hat = design @ solve + 1 / n
        errors.append((centred - design @ solve @ centred) / (1 - np.diagonal(hat)))
        weights.append(solve @ centred)
    best = int(np.argmin([np.mean(error**2) for error in errors]))
    model = TrustModel.fit(table)
    assert model.penalty == PENALTIES[best]
    np.testing.assert_allclose(model.weights, weights[best], atol=1e-10)
    np.testing.assert_allclose(model.expected(table), observed.mean() + design @ weights[best], atol=1e-10)
    # The ceil(0.8 · 41) = 33rd smallest of 40 errors.
    assert model.half_width == pytest.approx(np.sort(np.abs(errors[best]))[32])
    if relation:
        assert np.isfinite(model.penalty) and model.weights[2] > 0.08


def test_a_leave_one_out_error_is_that_of_a_fit_without_the_row():
    table = made(n=12, relation=0.5)
    design, observed = standardized(table), table["observed"].to_numpy()
    centred = observed - observed.mean()
    left_out = trust._ridge(design, centred)[2]
    penalty = trust._ridge(design, centred)[1]
    for row in range(12):
        rest = np.delete(np.arange(12), row)
        x, mean = design[rest] - design[rest].mean(axis=0), observed[rest].mean()
        weights = np.linalg.solve(x.T @ x + penalty * np.eye(6), x.T @ (observed[rest] - mean))
        expected = mean + (design[row] - design[rest].mean(axis=0)) @ weights
        assert left_out[row] == pytest.approx(observed[row] - expected, abs=1e-10)


def test_no_expectation_uses_the_score_that_it_is_compared_with():
    table = made(relation=0.6)
    before = cross_fit(table)
    changed = table.copy()
    changed.loc[7, "observed"] = -0.9
    after = cross_fit(changed)
    columns = ["expected", "low", "high", "guess"]
    pd.testing.assert_series_equal(after.loc[7, columns], before.loc[7, columns])
    others = before.index != 7
    assert (after.loc[others, "guess"] < before.loc[others, "guess"]).all()
    assert not np.allclose(after.loc[others, "expected"], before.loc[others, "expected"])


def test_every_held_out_expectation_is_that_of_a_fit_to_the_others():
    table = made(n=20, relation=0.6)
    filled = cross_fit(table)
    for row in (0, 13):
        others = TrustModel.fit(table.drop(index=row))
        expected = others.expected(table.loc[[row]])
        assert filled.loc[row, "expected"] == pytest.approx(expected.item())
        assert filled.loc[row, ["low", "high"]].tolist() == pytest.approx(
            [max(expected.item() - others.half_width, -1), min(expected.item() + others.half_width, 1)]
        )
        assert filled.loc[row, "guess"] == pytest.approx(table.drop(index=row)["observed"].mean())


def test_contexts_and_kinds_of_one_perturbation_are_left_out_together():
    table = made(n=20, relation=0.6)
    table["perturbation"] = [f"G{place // 2} @ {'K562' if place % 2 else 'RPE1'}" for place in range(20)]
    before = cross_fit(table)
    changed = table.copy()
    changed.loc[5, "observed"] = -0.9
    after = cross_fit(changed)
    together = ["expected", "low", "high", "guess"]
    pd.testing.assert_frame_equal(after.loc[[4, 5], together], before.loc[[4, 5], together])
    assert after.loc[6, "guess"] != before.loc[6, "guess"]


def test_a_relation_is_found_and_its_intervals_hold_what_they_say():
    judged = judge_trust(cross_fit(made(n=300, relation=0.6, kind=0.2)), SETTINGS)
    assert judged["skill"] and judged["gain_ci_low"] > 0.03
    assert judged["correlation"] > 0.6
    assert judged["coverage"] == pytest.approx(0.8, abs=0.05)
    # Noise of 0.15 has a mean absolute error of 0.12, which no expectation can undercut by much.
    assert 0.11 < judged["mae"] < 0.135 < 0.17 < judged["mae_guess"]
    assert judged["sentence"].startswith(
        "What is known beforehand tells good from bad predictions of biojepa"
    )


def test_intervals_hold_their_share_of_small_screens_too():
    held = [
        judge_trust(cross_fit(made(n=25, relation=0.4, seed=seed)), SETTINGS)["coverage"]
        for seed in range(16)
    ]
    assert np.mean(held) == pytest.approx(0.8, abs=0.04)


def test_no_relation_is_not_claimed():
    judged = [judge_trust(cross_fit(made(n=30, seed=seed)), SETTINGS) for seed in range(14)]
    assert sum(one["skill"] for one in judged) <= 1
    assert np.mean([one["gain"] for one in judged]) < 0.005
    assert "does not tell good from bad predictions of biojepa here" in judged[0]["sentence"]
    assert judged[0]["sentence"].endswith("Expect of a new perturbation the mean of its kind.")


def test_the_verdict_on_the_expectation_is_computed_from_the_table():
    table = made(n=10).assign(
        observed=[0.1, 0.5, 0.3, 0.9, 0.2, 0.6, 0.4, 0.8, 0.0, 0.7],
        expected=[0.2, 0.5, 0.3, 0.6, 0.2, 0.6, 0.4, 0.7, 0.1, 0.7], guess=0.45, low=0.15, high=0.75,
    )  # fmt: skip
    judged = judge_trust(table, SETTINGS)
    assert judged["mae"] == pytest.approx((0.1 + 0.3 + 0.1 + 0.1) / 10)
    assert judged["mae_guess"] == pytest.approx(np.abs(table["observed"] - 0.45).mean())
    assert judged["gain"] == pytest.approx(judged["mae_guess"] - judged["mae"])
    assert judged["coverage"] == pytest.approx(6 / 10)
    assert judged["correlation"] == pytest.approx(np.corrcoef(table["expected"], table["observed"])[0, 1])
    gain = np.abs(table["observed"] - 0.45) - np.abs(table["observed"] - table["expected"])
    half = 1.96 * gain.std(ddof=0) / np.sqrt(10)
    assert judged["gain_ci_low"] == pytest.approx(gain.mean() - half, abs=0.3 * half)
    assert judged["skill"]
    assert (
        "misses the observed one by 0.06 on average, one guess for all by 0.25 (gain +0.19"
        in judged["sentence"]
    )
    assert "n = 10). Intervals of 80% held 60% of the held-out scores." in judged["sentence"]


def test_the_intervals_draw_the_contexts_of_a_perturbation_together():
    """In whatever order the rows come, and from the stream of this table alone."""
    table = cross_fit(made(n=12, relation=0.6))
    table["perturbation"] = [f"G{place % 4} @ C{place // 4}" for place in range(12)]
    table = table.sample(frac=1.0, random_state=3)
    judged = judge_trust(table, SETTINGS)
    assert judged["n"] == 4
    gain = (table["observed"] - table["guess"]).abs() - (table["observed"] - table["expected"]).abs()
    held = table["observed"].between(table["low"], table["high"]).astype(float)
    drawn = np.random.default_rng([1, 2000]).multinomial(4, [0.25] * 4, size=400)
    rows = [np.repeat(np.arange(12), [sample[int(name[1])] for name in table["perturbation"]])
            for sample in drawn]  # fmt: skip
    for name, values in (("gain", gain.to_numpy()), ("coverage", held.to_numpy())):
        ends = np.percentile([values[chosen].mean() for chosen in rows], [2.5, 97.5])
        assert [judged[f"{name}_ci_low"], judged[f"{name}_ci_high"]] == pytest.approx(ends.tolist())


def test_a_misleading_expectation_is_called_so():
    table = made(n=12).assign(observed=np.arange(12) / 12, expected=1 - np.arange(12) / 12, low=0.0, high=1.0,
                              guess=0.46)  # fmt: skip
    judged = judge_trust(table, SETTINGS)
    assert not judged["skill"] and judged["gain_ci_high"] < 0
    assert judged["sentence"].startswith("What is known beforehand misleads about the predictions of biojepa")


def test_a_guess_that_leaves_its_own_score_out_is_no_correlation():
    # Where nothing is fitted but the mean, that mean falls exactly where the observed accuracy rises.
    table = made(n=12)
    guess = (table["observed"].sum() - table["observed"]) / 11
    judged = judge_trust(table.assign(expected=guess, guess=guess, low=-1.0, high=1.0), SETTINGS)
    assert np.corrcoef(guess, table["observed"])[0, 1] == pytest.approx(-1)
    assert np.isnan(judged["correlation"]) and judged["gain"] == 0 and not judged["skill"]


def test_kinds_with_few_perturbations_are_drawn_to_the_mean_of_all():
    table = made(n=60, kind=0.6, noise=0.05)
    table.loc[0, ["category", "n_genes_seen", "observed"]] = ["combo_seen2", 2, 0.95]
    model = TrustModel.fit(table)
    assert np.isfinite(model.penalty)
    means = table.groupby("category")["observed"].mean()
    average = table.iloc[[0, 0, 0]].assign(nearest_similarity=np.nan, prior_coverage=np.nan,
                                           predicted_effect=np.nan)  # fmt: skip
    average["category"], average["n_genes_seen"] = ["combo_seen2", "single", "single_in_combo"], [2, 0, 1]
    lone, single, other = model.expected(average)
    overall = table["observed"].mean()
    shrunk = (lone - overall) / (means["combo_seen2"] - overall)
    assert 0 < shrunk < 0.95
    for value, name in ((single, "single"), (other, "single_in_combo")):
        assert (value - overall) / (means[name] - overall) > shrunk


def test_beyond_the_range_of_the_fit_nothing_is_extrapolated():
    table = made(n=80, relation=0.6).assign(nearest_similarity=lambda t: 0.2 + 0.5 * t["nearest_similarity"])
    table["observed"] = 0.3 + 0.6 * (table["nearest_similarity"] - 0.4)
    model = TrustModel.fit(table)
    ends = table["nearest_similarity"].agg(["min", "max"])
    rows = table.iloc[[0] * 4].assign(nearest_similarity=[-1.0, ends["min"], ends["max"], 1.0])
    expected = model.expected(rows)
    assert expected[0] == expected[1] < expected[2] == expected[3]


def test_what_is_unknown_or_the_same_for_all_changes_nothing():
    table = made(n=40, relation=0.5)
    without = table.assign(predicted_effect_sd=np.nan, prior_coverage=0.0)
    model = TrustModel.fit(without)
    again = without.assign(prior_coverage=1.0, predicted_effect_sd=3.0)
    np.testing.assert_array_equal(model.expected(again), model.expected(without))
    assert model.weights[-1] == 0 and model.weights[3] == 0
    lost = table.assign(nearest_similarity=table["nearest_similarity"].where(table.index > 5))
    centre = lost["nearest_similarity"].mean()
    filled = lost["nearest_similarity"].fillna(centre)
    fitted = TrustModel.fit(lost)
    np.testing.assert_allclose(
        fitted.expected(lost), fitted.expected(lost.assign(nearest_similarity=filled)), atol=1e-12
    )


def test_accuracy_stays_within_its_bounds():
    table = made(n=30, relation=3.0, noise=0.0)
    model = TrustModel.fit(table)
    expected = model.expected(table)
    low, high = model.bounds(expected)
    assert expected.max() == 1.0 and expected.min() >= -1 and high.max() == 1 and (low <= expected).all()


def test_lengths_and_their_uncertainty():
    change = np.array([[3.0, 4.0], [0.0, 0.0]])
    assert effect_sizes(change).tolist() == [5, 0]
    sds = effect_size_sds(change, np.array([[1.0, 0.5], [1.0, 1.0]]))
    assert sds[0] == pytest.approx(np.hypot(3, 2) / 5) and np.isnan(sds[1])


# --- from the tables of an evaluation -----------------------------------------------------------


def evaluated(n=12):
    """Properties, effects and scores of n perturbations: one fold each, two seeds."""
    rng = np.random.default_rng(4)
    names = [f"P{place:02d}" for place in range(n)]
    folds = np.arange(n) % 3
    properties = pd.DataFrame(
        {
            "perturbation": names, "fold": folds, "category": "single", "n_genes_seen": 0,
            "nearest_training_gene": "A", "nearest_similarity": rng.uniform(0, 1, n), "nearest_distance": 0.5,
            "prior_coverage": 1.0, "n_cells": 50, "n_significant": 3, "effect_size": 1.0,
        }
    )  # fmt: skip
    effects, scores = [], []
    for seed in (0, 1):
        effects += [
            (name, fold, 1.0 + seed + place, 0.1)
            for place, (name, fold) in enumerate(zip(names, folds, strict=True))
        ]
        scores += [
            (model, fold, seed, name, "single", metric, value)
            for model, shift in (("biojepa", 0.0), ("ridge", 0.9))
            for metric in (METRIC, "mse")
            for name, fold, value in zip(names, folds, shift + rng.uniform(0, 0.5, n), strict=True)
        ]
    columns = ["perturbation", "fold", "predicted_effect", "predicted_effect_sd"]
    return (
        properties,
        pd.DataFrame(effects, columns=columns),
        pd.DataFrame(scores, columns=list(METRICS_COLUMNS)),
    )


def test_the_table_holds_the_mean_over_seeds_of_the_model_under_test():
    properties, effects, scores = evaluated()
    table = trust_table(properties, effects, scores, SETTINGS).set_index("perturbation")
    own = scores[(scores["model"] == "biojepa") & (scores["metric"] == METRIC)]
    assert table["observed"].to_dict() == pytest.approx(own.groupby("perturbation")["value"].mean().to_dict())
    assert table.loc["P03", "predicted_effect"] == pytest.approx(4.5)
    assert table["nearest_similarity"].to_dict() == pytest.approx(
        properties.set_index("perturbation")["nearest_similarity"].to_dict()
    )
    assert table[["expected", "low", "high", "guess"]].notna().all().all()


def test_nothing_is_fitted_to_few_perturbations_or_to_none():
    properties, effects, scores = evaluated(7)
    table = trust_table(properties, effects, scores, SETTINGS)
    assert len(table) == 7 and table["expected"].isna().all() and table["observed"].notna().all()
    judged = judge_trust(table, SETTINGS)
    assert judged["sentence"] == (
        "7 held-out perturbations are too few to learn what to expect of biojepa: at least 8 are asked for."
    )
    assert Expectation.of(table, SETTINGS) is None
    none = trust_table(properties, effects, scores[scores["model"] == "ridge"], SETTINGS)
    assert tuple(none.columns) == TRUST_COLUMNS and none.empty
    assert judge_trust(none, SETTINGS)["sentence"].startswith(
        "No held-out perturbation of biojepa was scored"
    )


# --- what predict makes of it -------------------------------------------------------------------


def test_with_skill_new_perturbations_get_what_the_fit_to_all_expects():
    table = cross_fit(made(n=80, relation=0.6))
    expectation = Expectation.of(table, SETTINGS)
    assert expectation is not None and expectation.source == "features"
    asked = made(n=80, relation=0.6, seed=9)
    columns = expectation.columns(asked)
    model = TrustModel.fit(table)
    np.testing.assert_allclose(columns["expected"], model.expected(asked))
    np.testing.assert_allclose(columns["high"] - columns["expected"], model.half_width)
    error = (columns["expected"] - asked["observed"]).abs()
    assert error.mean() < 0.75 * (asked["observed"] - table["observed"].mean()).abs().mean()
    assert ((asked["observed"] >= columns["low"]) & (asked["observed"] <= columns["high"])).mean() > 0.7


def test_without_skill_they_get_the_mean_of_their_kind_and_untested_kinds_nothing():
    table = cross_fit(made(n=30, seed=3))
    expectation = Expectation.of(table, SETTINGS)
    assert expectation is not None and expectation.source == "kind"
    asked = made(n=6, seed=5)
    asked.loc[5, ["category", "n_genes_seen"]] = ["combo_seen0", 0]
    columns = expectation.columns(asked)
    means = table.groupby("category")["observed"].mean()
    assert columns["expected"][:5].tolist() == pytest.approx(means[asked["category"][:5]].tolist())
    assert columns.loc[5].isna().all()
    # Errors are those of the mean of the others of the kind.
    errors = [
        abs(row["observed"] - table.drop(index=place).query("category == @row.category")["observed"].mean())
        for place, row in table.iterrows()
    ]
    assert (columns["high"] - columns["expected"])[0] == pytest.approx(
        np.sort(errors)[int(np.ceil(31 * 0.8)) - 1]
    )
