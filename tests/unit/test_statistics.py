"""Intervals, gaps and comparisons against scipy, statsmodels or a case by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from biojepa.contracts import SUMMARY_COLUMNS
from biojepa.evaluation.metrics import METRICS
from biojepa.evaluation.resampling import WholeModelScores, bootstrap_means, interval, make_scopes
from biojepa.evaluation.statistics import metric_tables, paired_difference, summarize, wilcoxon_p

CORRELATION, DISTANCE = "pearson_delta_perturbed_mean", "l2_top1000"
BASELINES = ("no_change", "ridge", "knn")


def long_table(scores, metric=CORRELATION, fold=0, seed=0, category="single"):
    """{model: {perturbation: value}} as rows of metrics.tsv."""
    rows = [
        (model, fold, seed, label, category, metric, value)
        for model, values in scores.items()
        for label, value in values.items()
    ]
    columns = ["model", "fold", "seed", "perturbation", "category", "metric", "value"]
    return pd.DataFrame(rows, columns=columns)


def tables_of(scores, draws=2000, seed=0, whole=None):
    tested = scores[["perturbation", "category"]]
    scopes = make_scopes(tested, draws, seed)
    return metric_tables(scores, whole or WholeModelScores(scopes), METRICS, scopes)


def numbered(values):
    return {f"P{i:02d}": value for i, value in enumerate(values)}


def summary_of(scores, baselines=BASELINES):
    return summarize(tables_of(scores), baselines, 0.95).set_index(["model", "category", "metric"])


@pytest.fixture
def values():
    return np.random.default_rng(0).gamma(2.0, 0.2, 30)


def test_bootstrap_means_equal_means_of_explicit_samples():
    rng = np.random.default_rng(1)
    values = rng.normal(size=(6, 2))
    values[2, 1] = np.nan
    counts = rng.multinomial(6, np.full(6, 1 / 6), size=50)
    expected = [np.nanmean(np.repeat(values, count, axis=0), axis=0) for count in counts]
    assert bootstrap_means(values, counts) == pytest.approx(np.array(expected))


def test_interval_agrees_with_scipy_bootstrap(values):
    table = tables_of(long_table({"ridge": numbered(values)}), draws=20_000)[0]
    low, high = interval(table.draws, 0.95)
    reference = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(5)
    ).confidence_interval
    # Two independent sets of 20,000 draws: percentiles agree within a few per cent of the width.
    width = reference.high - reference.low
    assert low[0] == pytest.approx(reference.low, abs=0.04 * width)
    assert high[0] == pytest.approx(reference.high, abs=0.04 * width)


def test_a_perturbation_tested_often_counts_once():
    """Folds and seeds are averaged within a perturbation before perturbations are averaged."""
    scores = pd.concat(
        [
            long_table({"ridge": {"A": 0.0, "B": 1.0}}, fold=0),
            long_table({"ridge": {"A": 0.6}}, fold=1),
            long_table({"ridge": {"A": 0.6}}, fold=1, seed=1),
        ]
    )
    row = summary_of(scores).loc[("ridge", "all", CORRELATION)]
    assert row["n"] == 2
    assert row["mean"] == pytest.approx((0.4 + 1.0) / 2)


def test_gap_closed_is_a_ratio_of_pooled_means_with_mean_at_0_and_duplicate_at_1(values):
    scores = {"mean": 0 * values, "duplicate": values, "biojepa": 0.25 * values, "ridge": values - 0.1}
    for metric, sign in ((CORRELATION, 1), (DISTANCE, -1)):
        table = long_table({model: numbered(1 + sign * v) for model, v in scores.items()}, metric)
        summary = summary_of(table).xs(("all", metric), level=["category", "metric"])
        gap = summary["gap_closed"]
        assert gap["mean"] == pytest.approx(0)
        assert gap["duplicate"] == pytest.approx(1)
        # A constant share has no uncertainty; a constant offset does, since the range varies.
        assert summary.loc["biojepa", ["gap_closed", "gap_ci_low", "gap_ci_high"]].tolist() == pytest.approx(
            [0.25] * 3
        )
        assert gap["ridge"] == pytest.approx((values - 0.1).mean() / values.mean())
        assert summary.loc["ridge", "gap_ci_low"] < gap["ridge"] < summary.loc["ridge", "gap_ci_high"]


def test_beyond_the_best_value_is_no_better_than_short_of_it(values):
    """A coverage of 0.95 is as far from 0.80 as one of 0.65 is."""
    n = len(values)
    scores = {"mean": 0.4, "duplicate": 0.8, "biojepa": 0.95, "ridge": 0.65, "knn": 0.8}
    table = long_table({model: numbered(np.full(n, value)) for model, value in scores.items()}, "coverage_80")
    gap = summary_of(table).xs(("all", "coverage_80"), level=["category", "metric"])["gap_closed"]
    assert gap["biojepa"] == pytest.approx(gap["ridge"]) == pytest.approx(1 - 0.15 / 0.4)
    assert gap["knn"] == pytest.approx(1)


def test_a_perturbation_in_several_contexts_is_one_unit():
    rng = np.random.default_rng(3)
    genes = [f"P{i:02d}" for i in range(12)]
    shared = dict(zip(genes, rng.normal(size=12), strict=True))
    places = ("K562", "RPE1", "HEK")
    labels = [f"{gene} @ {place}" for gene in genes for place in places]
    scores = {
        "biojepa": {label: shared[label.split(" ")[0]] for label in labels},
        "ridge": dict.fromkeys(labels, 0.1),
    }
    table = next(
        t
        for t in tables_of(long_table(scores, category="other_context"))
        if t.metric.name == CORRELATION and t.scope.name == "all"
    )
    alone = next(
        t
        for t in tables_of(long_table({"biojepa": shared, "ridge": dict.fromkeys(genes, 0.1)}))
        if t.metric.name == CORRELATION and t.scope.name == "all"
    )
    # Three copies of the same scores say no more than one.
    assert (table.scope.n_units, len(table.scope.perturbations)) == (12, 36)
    np.testing.assert_allclose(table.draws[:, 0], alone.draws[:, 0])
    gain = table.unit_differences("biojepa", "ridge")
    np.testing.assert_allclose(gain, [shared[gene] - 0.1 for gene in genes])
    assert wilcoxon_p(gain) == wilcoxon_p(alone.difference("biojepa", "ridge"))


def test_the_summary_tests_and_bounds_perturbations_and_not_their_contexts():
    rng = np.random.default_rng(5)
    genes, places = [f"P{i}" for i in range(9)], ("K562", "RPE1", "HEK")
    gain = {f"{gene} @ {place}": rng.normal(0.3, 1.0) for gene in genes for place in places}
    scores = {"biojepa": gain, "ridge": dict.fromkeys(gain, 0.0)}
    scores["mean"] = dict.fromkeys(gain, -1.0)
    scores["duplicate"] = dict.fromkeys(gain, 2.0)
    key = ("biojepa", "all", CORRELATION)
    row = summary_of(long_table(scores, category="other_context")).loc[key]
    means = [np.mean([gain[f"{gene} @ {place}"] for place in places]) for gene in genes]
    assert row["p_vs_best_baseline"] == pytest.approx(stats.wilcoxon(means, method="exact").pvalue)
    assert row["n"] == 27 and row["ci_low"] < row["mean"] < row["ci_high"]
    one = {
        model: {k: v for k, v in values.items() if k.startswith("P3 ")} for model, values in scores.items()
    }
    lone = summary_of(long_table(one, category="other_context")).loc[key]
    assert lone["n"] == 3 and lone["mean"] == pytest.approx(means[3])
    assert lone["gap_closed"] == pytest.approx((means[3] + 1) / 3)
    assert lone[["ci_low", "ci_high", "gap_ci_low", "gap_ci_high"]].isna().all()
    # Likewise of a model that was scored on one perturbation of many.
    scores["biojepa"] = {label: value if label == "P3 @ HEK" else np.nan for label, value in gain.items()}
    lone = summary_of(long_table(scores, category="other_context")).loc[key]
    assert lone["n"] == 1 and lone[["ci_low", "ci_high"]].isna().all()


def test_gap_is_missing_where_the_duplicate_is_not_better_than_the_mean(values):
    noise = values - values.mean()
    for duplicate in (noise, -values):
        scores = {"mean": 0 * values, "duplicate": duplicate, "biojepa": values}
        table = long_table({model: numbered(v) for model, v in scores.items()})
        summary = summary_of(table)
        assert summary[["gap_closed", "gap_ci_low", "gap_ci_high"]].isna().all().all()
        assert tables_of(table)[0].dynamic_range(0.95)[1] <= 0


def test_gap_uses_only_perturbations_where_all_three_are_defined():
    scores = {
        "mean": {"A": 0.0, "B": 0.0, "C": 0.0},
        "duplicate": {"A": 1.0, "B": 1.0, "C": 1.0},
        "biojepa": {"A": 0.2, "B": 0.4, "C": np.nan},
    }
    row = summary_of(long_table(scores)).loc[("biojepa", "all", CORRELATION)]
    assert row["gap_closed"] == pytest.approx(0.3)
    assert row["n"] == 2


def test_best_baseline_has_the_best_mean_in_the_direction_of_the_metric():
    scores = {"no_change": numbered([0.1] * 8), "ridge": numbered([0.3] * 8), "knn": numbered([0.2] * 8)}
    scores |= {"biojepa": numbered([0.9] * 8)}
    assert set(summary_of(long_table(scores))["best_baseline"]) == {"ridge"}
    assert set(summary_of(long_table(scores, DISTANCE))["best_baseline"]) == {"no_change"}


def test_a_baseline_scored_on_fewer_perturbations_is_not_the_best():
    scores = {"ridge": numbered([0.3] * 8), "knn": {"P00": 0.99}, "biojepa": numbered([0.5] * 8)}
    assert set(summary_of(long_table(scores))["best_baseline"]) == {"ridge"}


def test_win_and_harm_rates_count_better_and_worse_perturbations():
    base = {"ridge": numbered([0.5] * 10)}
    # A difference of float32 rounding is neither.
    ours = {"biojepa": numbered([0.6] * 5 + [0.5, 0.5 + 1e-7] + [0.4] * 3)}
    for metric, win, harm in ((CORRELATION, 0.5, 0.3), (DISTANCE, 0.3, 0.5)):
        row = summary_of(long_table(base | ours, metric)).loc[("biojepa", "all", metric)]
        assert (row["win_rate"], row["harm_rate"]) == (win, harm)
    best = summary_of(long_table(base | ours)).loc[("ridge", "all", CORRELATION)]
    assert best[["p_vs_best_baseline", "win_rate", "harm_rate"]].isna().all()


def test_p_value_is_the_paired_wilcoxon_test(values):
    other = values + np.random.default_rng(3).normal(0.05, 0.1, 30)
    table = long_table({"ridge": numbered(values), "biojepa": numbered(other)})
    row = summary_of(table, ("ridge",)).loc[("biojepa", "all", CORRELATION)]
    assert row["p_vs_best_baseline"] == pytest.approx(stats.wilcoxon(other, values).pvalue)
    assert wilcoxon_p(np.zeros(5)) == 1.0
    # Eleven equal gains: the exact sign test says 2 / 2**11 = 0.00098; the approximation is near it.
    assert wilcoxon_p(np.full(11, 0.1)) == pytest.approx(2 / 2**11, abs=1e-3)
    assert wilcoxon_p(np.array([0.1, 0.2, 0.3, 0.4, 0.5])) == pytest.approx(2 / 2**5)
    assert np.isnan(wilcoxon_p(np.array([0.3])))


def test_q_values_are_benjamini_hochberg_over_models_and_metrics_without_positive_controls(values):
    """Headline and secondary metrics are one family, legacy ones another."""
    from statsmodels.stats import multitest

    rng = np.random.default_rng(4)
    parts = []
    for metric in (CORRELATION, "rank_l2", "direction_match", "mse", DISTANCE):
        models = {name: numbered(values + rng.normal(0.03, 0.1, 30)) for name in ("biojepa", "a", "b")}
        models |= {"ridge": numbered(values), "duplicate": numbered(values + 5), "mean": numbered(0 * values)}
        parts.append(long_table(models, metric))
    summary = summarize(tables_of(pd.concat(parts)), ("ridge",), 0.95)
    for family, size in (((CORRELATION, "rank_l2", "direction_match"), 12), (("mse", DISTANCE), 8)):
        for category in ("all", "single"):
            inside = summary[(summary["category"] == category) & summary["metric"].isin(family)]
            tested = inside[inside["p_vs_best_baseline"].notna() & (inside["model"] != "duplicate")]
            assert len(tested) == size
            expected = multitest.multipletests(tested["p_vs_best_baseline"], method="fdr_bh")[1]
            assert tested["q_vs_best_baseline"].to_numpy() == pytest.approx(expected)
            assert inside.loc[inside["model"] == "duplicate", "q_vs_best_baseline"].isna().all()


def test_summary_has_the_columns_of_the_contract_and_a_block_per_category():
    scores = pd.concat(
        [
            long_table({"ridge": numbered([0.1] * 3)}),
            long_table({"ridge": {"A+B": 0.4}}, category="combo_seen2"),
        ]
    )
    summary = summarize(tables_of(scores), BASELINES, 0.95)
    assert tuple(summary.columns) == SUMMARY_COLUMNS
    means = summary.set_index("category")["mean"]
    assert means["single"] == means["unseen genes"] == pytest.approx(0.1)
    assert means["combo_seen2"] == means["seen genes"] == pytest.approx(0.4)
    assert means["all"] == pytest.approx(0.175)


def test_one_perturbation_gives_no_interval():
    row = summary_of(long_table({"ridge": {"A": 0.4}})).loc[("ridge", "all", CORRELATION)]
    assert row["mean"] == pytest.approx(0.4)
    assert np.isnan(row["ci_low"])
    assert np.isnan(row["ci_high"])


def test_draws_of_a_group_do_not_depend_on_other_groups_and_follow_the_seed():
    tested = pd.DataFrame({"perturbation": list("ABCD"), "category": ["single"] * 3 + ["combo_seen0"]})
    both, alone = make_scopes(tested, 50, 0), make_scopes(tested[:3], 50, 0)
    assert (both["single"].counts == alone["single"].counts).all()
    assert not (both["single"].counts == make_scopes(tested, 50, 1)["single"].counts).all()
    assert (both["all"].counts.sum(axis=1) == 4).all()


def test_whole_model_scores_are_pooled_over_folds_and_share_the_draws():
    tested = pd.DataFrame({"perturbation": [f"P{i}" for i in range(12)], "category": "single"})
    whole = WholeModelScores(make_scopes(tested, 100, 0))
    first, second = ([f"P{i}" for i in range(start, start + 6)] for start in (0, 6))
    weights = whole.weights(first, np.array(["single"] * 6))["all"]
    assert (weights[0] == 1).all()
    rows = whole.scopes["all"].perturbations.get_indexer(first)
    assert (weights[1:] == whole.scopes["all"].counts[:, rows]).all()
    for fold, (labels, value) in enumerate([(first, 0.2), (second, 0.6)]):
        values = np.full(101, value)
        whole.add("ridge", "effect_slope", "all", values, (fold, 0), labels[fold:])
        assert "all" in whole.weights(labels, np.array(["single"] * 6))
    assert whole.pooled("ridge", "effect_slope", whole.scopes["all"]) == pytest.approx(np.full(101, 0.4))
    # The second fold's score rests on all but one of its perturbations.
    assert whole.n("effect_slope", whole.scopes["all"]) == 11
    assert whole.n("effect_slope", whole.scopes["single"]) == 0
    assert whole.weights(first[:4], np.array(["single"] * 4)) == {}


def test_paired_difference_is_positive_for_the_better_model_whatever_the_direction(values):
    offset = np.random.default_rng(6).normal(0.2, 0.05, 30)
    scores = {"ridge": numbered(values), "biojepa": numbered(values + offset)}
    for metric, sign in ((CORRELATION, 1), (DISTANCE, -1)):
        table = tables_of(long_table(scores, metric), draws=20_000)[0]
        mean, low, high = paired_difference(table, "biojepa", "ridge", 0.95)
        assert mean == pytest.approx(sign * offset.mean())
        reference = stats.bootstrap(
            (sign * offset,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
        ).confidence_interval
        assert (low, high) == pytest.approx(tuple(reference), abs=0.002)


# --- several seeds ------------------------------------------------------------------------------


def seeded_table(offsets, values, folds=1, model="biojepa", metric=CORRELATION):
    """Scores of one model whose seeds differ by an offset that all of a fold's perturbations share."""
    parts = []
    for fold in range(folds):
        own = {label: v for i, (label, v) in enumerate(numbered(values).items()) if i % folds == fold}
        for seed, offset in enumerate(np.atleast_2d(offsets)[fold % np.atleast_2d(offsets).shape[0]]):
            moved = {model: {label: v + offset for label, v in own.items()}}
            parts.append(long_table(moved, metric, fold=fold, seed=10 * seed))
    return pd.concat(parts)


def test_seeds_are_resampled_within_every_sample_of_perturbations(values):
    """Against explicit samples: perturbations and seeds drawn out by hand from the same counts."""
    rng = np.random.default_rng(8)
    scores = seeded_table(rng.normal(0, 0.3, (2, 3)), values, folds=2)
    table = tables_of(scores, draws=200)[0]
    by_seed = scores.pivot(index="perturbation", columns=["fold", "seed"], values="value")
    trainings = list(by_seed.columns)
    drawn = table.scope.training_counts(trainings).astype(int)
    assert all((drawn[:, [t[0] == fold for t in trainings]].sum(axis=1) == 3).all() for fold in (0, 1))
    assert not (drawn[:, :3] == drawn[:, 3:]).all()  # folds are trained apart, so drawn apart
    for draw in range(200):
        columns = np.repeat(np.arange(6), drawn[draw])
        means = np.nanmean(by_seed.to_numpy()[:, columns], axis=1)
        sample = np.repeat(means, table.scope.counts[draw].astype(int))
        assert table.draws[draw, 0] == pytest.approx(sample.mean())


def test_intervals_widen_with_what_seeds_share_and_the_point_estimate_stays(values):
    """n perturbations that all move with the seed: the spread of the seeds does not shrink with n."""
    offsets = np.array([-0.3, 0.0, 0.3])
    alone = tables_of(long_table({"biojepa": numbered(values)}), draws=4000)[0]
    several = tables_of(seeded_table(offsets, values), draws=4000)[0]
    assert several.mean == pytest.approx(alone.mean)
    assert several.values == pytest.approx(alone.values)
    # Means of three draws from three seeds have variance Var(seed) / 3, on top of the perturbations'.
    expected = alone.draws.var() + offsets.var() / 3
    assert several.draws.var() == pytest.approx(expected, rel=0.1)


def test_one_seed_gives_the_same_numbers_whether_or_not_other_models_have_more(values):
    models = {"ridge": values, "mean": 0 * values, "duplicate": 1 + values}
    one = long_table({name: numbered(scores) for name, scores in models.items()})
    more = seeded_table([0.0, 0.1], values + 0.2)
    # More models make a larger family of tests.
    alone, beside = (
        summary_of(table).drop(columns="q_vs_best_baseline") for table in (one, pd.concat([one, more]))
    )
    pd.testing.assert_frame_equal(alone, beside.loc[alone.index], rtol=1e-13)


def test_models_with_as_many_seeds_share_the_draws_so_that_their_difference_is_paired(values):
    offsets = [-0.3, 0.0, 0.3]
    better = seeded_table(offsets, values + 0.1, folds=2)
    other = seeded_table(offsets, values, folds=2, model="ridge")
    table = tables_of(pd.concat([better, other]))[0]
    mean, low, high = paired_difference(table, "biojepa", "ridge", 0.95)
    assert (mean, low, high) == pytest.approx((0.1, 0.1, 0.1))
    assert table.draws[:, 0] - table.draws[:, 1] == pytest.approx(np.full(2000, 0.1))


def test_paired_difference_and_gap_follow_the_seeds_drawn(values):
    offsets = np.array([-0.2, 0.2])
    rest = {"ridge": numbered(values), "mean": numbered(0 * values), "duplicate": numbered(1 + 0 * values)}
    scores = pd.concat([seeded_table(offsets, values), long_table(rest)])
    table = tables_of(scores)[0]
    drawn = table.scope.training_counts([(0, 0), (0, 10)]) @ offsets / 2
    assert set(np.round(drawn, 6)) == {-0.2, 0.0, 0.2}
    # Against the same values without seeds, a sample's difference is the mean offset of its seeds.
    assert table.gain_draws("biojepa", "ridge") == pytest.approx(drawn)
    mean, low, high = paired_difference(table, "biojepa", "ridge", 0.95)
    assert (mean, low, high) == pytest.approx((0.0, -0.2, 0.2), abs=1e-12)
    # From 0 to 1, a share of the gap is the score itself.
    gap, gap_low, gap_high = table.gap_closed(0.95)
    assert gap[0] == pytest.approx(values.mean())
    assert (gap_low[0], gap_high[0]) == pytest.approx([bound[0] for bound in interval(table.draws, 0.95)])


def test_whole_model_scores_weigh_the_trainings_that_a_sample_drew():
    tested = pd.DataFrame({"perturbation": [f"P{i}" for i in range(6)], "category": "single"})
    whole = WholeModelScores(make_scopes(tested, 100, 0))
    trainings = [(0, 0), (0, 1), (1, 0), (1, 1)]
    for number, training in enumerate(trainings):
        whole.add("ridge", "effect_slope", "all", np.full(101, float(number)), training)
    scope = whole.scopes["all"]
    pooled = whole.pooled("ridge", "effect_slope", scope)
    assert pooled[0] == 1.5
    assert pooled[1:] == pytest.approx(scope.training_counts(trainings) @ np.arange(4.0) / 4)
    assert len(set(pooled[1:])) > 2
