"""What every metric must say of predictions whose score is known in advance.

A perfect prediction, a prediction that knows nothing, and a technical duplicate on Gaussian data. And what
every interval must do: cover the truth as often as it says.
"""

from __future__ import annotations

from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from evaluation_case import random_truth
from scipy import stats

from biojepa.evaluation.enrichment import enrichment_scores, enrichment_table, pathway_correlation
from biojepa.evaluation.metrics import METRICS, all_metrics
from biojepa.evaluation.resampling import WholeModelScores, interval, make_scopes
from biojepa.evaluation.settings import EnrichmentSettings
from biojepa.evaluation.statistics import metric_tables
from biojepa.evaluation.truth import FoldTruth

EVERY_METRIC = list(all_metrics())


def score(name, predicted, truth, sd=None):
    """One value per perturbation, or one of the whole model."""
    metric = METRICS[name]
    if metric.unit == "model":
        return metric.score(predicted, truth, np.ones((1, len(predicted))))
    return metric.score(predicted, truth, *([sd] if metric.needs_sd else []))


def with_combinations(seed=0, **changes):
    """A fold of combinations whose singles were trained, not additive in some genes."""
    truth = random_truth(seed, n=9, genes=60)
    rng = np.random.default_rng(seed + 100)
    off = rng.normal(0, 1.5, truth.half_b.shape) * (rng.random(truth.half_b.shape) < 0.4)
    return replace(
        truth, additive=truth.half_b - off, additive_var=np.full(off.shape, 0.002), **changes
    )  # fmt: skip


def even_errors(truth):
    """The same means with one standard error for all genes, so that size of change and significance agree."""
    same = np.full(truth.half_b.shape, 0.3)
    return replace(truth, var_a=same, var_b=same, var_all=same, control_var=same[0])


# --- a perfect prediction -----------------------------------------------------------------------

ONE, ZERO = 1.0, 0.0
# Of x̂ = x: the mean of half B, or of all cells for legacy metrics. None: see the tests named beside it.
PERFECT = {
    "pearson_delta_perturbed_mean": ONE,
    "weighted_r2_delta": ONE,
    "rank_l2": ONE,
    "rank_cosine": ONE,
    "effect_slope": ONE,
    "effect_cosine": ONE,
    "spread_ratio": ONE,
    "additive_l2_difference": None,  # test_a_perfect_prediction_leaves_the_whole_error_to_the_additive_model
    "interaction_tpr": None,  # test_ranking_by_size_is_perfect_where_all_genes_are_measured_equally_well
    "direction_match": ONE,
    "spearman_lfc": ONE,
    "pr_auc": None,
    "overlap_at_n": None,
    "coverage_50": None,  # test_a_perfect_distribution_covers_what_it_says_and_has_the_least_crps
    "coverage_80": None,
    "coverage_95": None,
    "crps": None,
    "pearson_delta_control": ONE,
    "pearson_delta_control_top20": ONE,
    "l2_top1000": ZERO,
    "mse": ZERO,
    "pathway_correlation": None,  # test_perfect_and_constant_predictions_of_pathways
}
SIZES = ("interaction_tpr", "pr_auc", "overlap_at_n")


def of_role_distribution(name):
    """Metrics of cells, which are not a function of two means; their answers are in test_distribution.py."""
    return all_metrics()[name].role == "distribution"


def test_every_metric_has_its_known_answer_here():
    assert [name for name in EVERY_METRIC if not of_role_distribution(name)] == list(PERFECT)


@pytest.mark.parametrize("name", [name for name, value in PERFECT.items() if value is not None])
def test_a_perfect_prediction_gets_the_best_value(name):
    for seed in range(3):
        truth = with_combinations(seed)
        perfect = truth.all_cells if METRICS[name].role == "legacy" else truth.half_b
        values = score(name, perfect, truth)
        assert np.isfinite(values).any()
        assert values[np.isfinite(values)] == pytest.approx(PERFECT[name], abs=1e-7)
        best = {"max": ONE, "min": ZERO}.get(METRICS[name].best, METRICS[name].best)
        assert PERFECT[name] == best


@pytest.mark.parametrize("name", SIZES)
def test_ranking_by_size_is_perfect_where_all_genes_are_measured_equally_well(name):
    """These rank genes by the size of the change, and truth is what is significant: the same, given equal
    errors. With unequal ones a large change of a noisy gene need not be significant, and even a perfect
    prediction stays below 1; how far below is what the duplicate shows.
    """
    truth = with_combinations(1)
    assert score(name, truth.half_b, even_errors(truth)) == pytest.approx(1.0)
    assert 0.5 < np.nanmean(score(name, truth.half_b, truth)) < 1.0


def test_a_perfect_prediction_leaves_the_whole_error_to_the_additive_model():
    truth = with_combinations()
    # The additive model's file is cut at 0, as all predictions are, and must gain nothing on itself.
    additive = truth.additive.clip(min=0)
    assert (truth.additive < 0).any()
    additive_error = np.linalg.norm(additive - truth.half_b, axis=1)
    assert score("additive_l2_difference", truth.half_b, truth) == pytest.approx(-additive_error)
    assert score("additive_l2_difference", additive, truth) == pytest.approx(np.zeros(9))


def test_a_perfect_distribution_covers_what_it_says_and_has_the_least_crps():
    """x̂ = μ without uncertainty; half B's mean is then normal around it with its own standard error s.

    Coverage is the level, and the expected CRPS of a normal forecast that is right is s / √π
    (Gneiting & Raftery 2007); any other mean or width has a larger one.
    """
    truth = random_truth(n=4, genes=5000)
    error = np.sqrt(truth.var_b / 12)
    mean = truth.half_b + np.random.default_rng(0).normal(size=error.shape) * error
    certain = np.zeros_like(error)
    for level in (50, 80, 95):
        covered = score(f"coverage_{level}", mean, truth, certain).mean()
        assert covered == pytest.approx(level / 100, abs=0.015)
        # A guess of the very mean of half B is inside each interval: better than a perfect model can be.
        assert (score(f"coverage_{level}", truth.half_b, truth, certain) == 1).all()
    least = score("crps", mean, truth, certain).mean()
    assert least == pytest.approx(error.mean() / np.sqrt(np.pi), rel=0.02)
    assert score("crps", mean + 0.5 * error, truth, certain).mean() > 1.05 * least
    # A forecast of variance 2s²: E|X − Y| − E|X − X'| / 2 of normal variables.
    wide = (np.sqrt(2 / np.pi) * np.sqrt(3) - np.sqrt(2 / np.pi)) * error.mean()
    assert score("crps", mean, truth, error).mean() == pytest.approx(wide, rel=0.02)
    assert wide > 1.03 * least
    # At z = 0: s (2 φ(0) − 1/√π).
    at_truth = (2 * stats.norm.pdf(0) - 1 / np.sqrt(np.pi)) * error.mean(axis=1)
    assert score("crps", truth.half_b, truth, certain) == pytest.approx(at_truth)


def test_perfect_and_constant_predictions_of_pathways():
    """The same change has the same enrichment; a prediction without change has none, and scores 0."""
    truth = random_truth(n=2, genes=60)
    rng = np.random.default_rng(3)
    sets = {f"S{k}": sorted(rng.choice(truth.genes, 12, replace=False)) for k in range(8)}
    settings = EnrichmentSettings(permutations=20)
    observed = enrichment_scores(truth.delta_control, truth.genes, sets, settings)
    for predicted, expected in ((truth.half_b, 1.0), (np.tile(truth.control_mean, (2, 1)), 0.0)):
        table = enrichment_table("any", 0, predicted, observed, truth, [0, 1], sets, settings)
        assert pathway_correlation(table)["value"].tolist() == pytest.approx([expected] * 2)


# --- predictions that know nothing of the perturbation ------------------------------------------


def test_the_mean_baseline_scores_what_it_must_even_when_stored_as_float32():
    truth = with_combinations()
    stored = np.tile(truth.perturbed_mean.astype(np.float32), (9, 1)).astype(float)
    for name in ("pearson_delta_perturbed_mean", "effect_cosine"):
        assert (score(name, stored, truth) == 0).all()
    assert (score("rank_cosine", stored, truth) == 0.5).all()
    assert score("weighted_r2_delta", stored, truth) == pytest.approx(0, abs=1e-5)
    # One order of distances for all, so each perturbation has another rank, and their mean is chance.
    assert sorted(score("rank_l2", stored, truth)) == pytest.approx(np.arange(9) / 8)
    assert score("effect_slope", stored, truth) == pytest.approx(0)
    assert score("spread_ratio", stored, truth) == pytest.approx(0, abs=1e-6)
    additive = truth.additive.clip(min=0)
    worse = np.linalg.norm(truth.delta, axis=1) - np.linalg.norm(additive - truth.half_b, axis=1)
    assert score("additive_l2_difference", stored, truth) == pytest.approx(worse, abs=1e-5)


def test_no_change_scores_what_it_must_even_when_stored_as_float32():
    truth = with_combinations()
    stored = np.tile(truth.control_mean.astype(np.float32), (9, 1)).astype(float)
    significant = truth.significant
    share = significant.mean(axis=1)
    defined = significant.any(axis=1)
    assert defined.sum() >= 5
    for name in ("pearson_delta_control", "pearson_delta_control_top20"):
        assert (score(name, stored, truth) == 0).all()
    assert (score("spearman_lfc", stored, truth)[significant.sum(axis=1) >= 3] == 0).all()
    # Without a predicted change all genes are tied: chance is the share of the significant ones.
    for name in ("pr_auc", "overlap_at_n"):
        assert score(name, stored, truth)[defined] == pytest.approx(share[defined])
    # Stored as float32, the sign of a change of 0 is that of the rounding; unrounded there is none.
    exact = np.tile(truth.control_mean, (9, 1))
    assert (score("direction_match", exact, truth)[defined] == 0).all()
    change = truth.all_cells - truth.control_mean
    assert score("mse", stored, truth) == pytest.approx((change**2).mean(axis=1), rel=1e-5)
    assert score("l2_top1000", stored, truth) == pytest.approx(np.linalg.norm(change, axis=1), rel=1e-5)


def test_a_random_order_of_genes_is_at_chance():
    truth = random_truth(n=40, genes=300)
    rng = np.random.default_rng(0)
    predicted = truth.control_mean + rng.normal(0, 1, truth.half_b.shape)
    chance = truth.significant.mean()
    for name, expected in (("direction_match", 0.5), ("overlap_at_n", chance), ("spearman_lfc", 0.0)):
        values = score(name, predicted, truth)
        error = np.nanstd(values) / np.sqrt(np.isfinite(values).sum())
        assert np.nanmean(values) == pytest.approx(expected, abs=4 * error), name


# --- a technical duplicate on Gaussian data -----------------------------------------------------

SIGNAL, NOISE = 0.4, 0.6  # standard deviations over genes of the true change, and of the error of a half


def gaussian_truth(n=200, genes=400, seed=0, signal=SIGNAL, noise=NOISE, cells=20):
    """Halves x = Δ + error around a control and perturbed mean of 2, as noisy as their variances say."""
    rng = np.random.default_rng(seed)
    delta = np.reshape(signal, (-1, 1)) * rng.standard_normal((n, genes))
    half_a, half_b = (2.0 + delta + noise * rng.standard_normal((n, genes)) for _ in "ab")
    variance = np.full((n, genes), cells * noise**2)
    truth = FoldTruth(
        fold=0, genes=pd.Index([f"G{i}" for i in range(genes)]), perturbations=[f"P{i}" for i in range(n)],
        categories=np.array(["single"] * n, dtype=object), n_genes_seen=np.zeros(n, dtype=int),
        n_a=np.full(n, cells), n_b=np.full(n, cells), half_a=half_a, half_b=half_b,
        all_cells=(half_a + half_b) / 2, var_a=variance, var_b=variance, var_all=variance,
        control_mean=np.full(genes, 2.0), control_var=variance[0], n_control=10**9,
        perturbed_mean=np.full(genes, 2.0), additive=np.full((n, genes), np.nan),
    )  # fmt: skip
    return truth, delta


def expected_of_duplicate(genes=400):
    """Expectations of a = Δ + e against b = Δ + f, Δ ~ N(0, τ²), e and f ~ N(0, s²), v = τ² + s².

    With r = τ² / v, the reliability of a half, and E over genes, whose number is large:
    Pearson and cosine r. Weights a²: E[a²b²] = v²(1 + 2r²), E[a²(a − b)²] = v²(4 − 6r + 2r²).
    Rank: ‖a − b'‖² − ‖a − b‖² has mean 2Gτ² and variance G(8v² + 4s⁴). Against all cells, (a + b) / 2:
    Pearson √((1 + r) / 2), squared error s² / 2. Error a − b has variance 2s², as the intervals say when
    sd is s, and a right normal forecast has a CRPS of its standard deviation / √π.
    """
    tau, s = SIGNAL**2, NOISE**2
    v = tau + s
    r = tau / v
    return {
        "pearson_delta_perturbed_mean": r,
        "effect_cosine": r,
        "weighted_r2_delta": 1 - (4 - 6 * r + 2 * r**2) / (1 + 2 * r**2),
        "rank_l2": stats.norm.cdf(2 * genes * tau / np.sqrt(genes * (8 * v**2 + 4 * s**2))),
        "spread_ratio": 1.0,
        "pearson_delta_control": np.sqrt((1 + r) / 2),
        "mse": s / 2,
        "l2_top1000": np.sqrt(genes * s / 2),
        "coverage_50": 0.5,
        "coverage_80": 0.8,
        "coverage_95": 0.95,
        "crps": np.sqrt(2 * s) / np.sqrt(np.pi),
    }


@pytest.mark.parametrize("name", list(expected_of_duplicate()))
def test_a_duplicate_scores_near_its_expectation(name):
    """Averages over 200 perturbations × 400 genes: within 1 % of the scale, or four standard errors."""
    truth, _ = gaussian_truth()
    values = score(name, truth.half_a, truth, np.full(truth.half_a.shape, NOISE))
    error = values.std() / np.sqrt(len(values))
    expected = expected_of_duplicate()[name]
    assert values.mean() == pytest.approx(expected, abs=max(4 * error, 0.01 * abs(expected)))


def test_rank_of_a_duplicate_follows_its_noise():
    """Few genes, so that ranks are far from 1: the normal approximation holds within 0.02."""
    truth, _ = gaussian_truth(n=400, genes=40)
    values = score("rank_l2", truth.half_a, truth)
    expected = expected_of_duplicate(40)["rank_l2"]
    assert 0.75 < expected < 0.9
    assert values.mean() == pytest.approx(expected, abs=0.02)


def test_effect_slope_of_a_duplicate_is_attenuated_by_the_noise_of_the_observed_norm():
    """Regression dilution: Var(N) / (Var(N) + E Var(‖b‖ | Δ)), N = √(‖Δ‖² + G s²).

    By the delta method Var(‖b‖ | Δ) ≈ s² (2‖Δ‖²/G + s²) / (2 (‖Δ‖²/G + s²)).
    """
    genes = 400
    signal = np.random.default_rng(2).uniform(0.1, 0.4, 3000)
    truth, delta = gaussian_truth(n=3000, genes=genes, signal=signal)
    squared, s = (delta**2).sum(axis=1), NOISE**2
    spread = np.sqrt(squared + genes * s).var()
    noise = (s * (2 * squared / genes + s) / (2 * (squared / genes + s))).mean()
    expected = spread / (spread + noise)
    assert 0.3 < expected < 0.9
    assert score("effect_slope", truth.half_a, truth)[0] == pytest.approx(expected, abs=0.05)


def test_direction_of_a_duplicate_follows_from_its_reliability():
    """Given b, a is normal around r·b with variance v(1 − r²): its sign is right with Φ(r|b| / √…)."""
    truth, _ = gaussian_truth(signal=SIGNAL)
    truth = replace(truth, fdr=0.5)  # lenient, so that many genes are looked at
    v = SIGNAL**2 + NOISE**2
    r = SIGNAL**2 / v
    chosen = truth.significant
    assert chosen.sum() > 300
    right = stats.norm.cdf(r * np.abs(truth.delta_control[chosen]) / np.sqrt(v * (1 - r**2)))
    hits = np.sign(truth.half_a - 2.0)[chosen] == np.sign(truth.delta_control)[chosen]
    per_perturbation = score("direction_match", truth.half_a, truth)
    count = chosen.sum(axis=1)
    pooled = np.nansum(per_perturbation * count) / count.sum()
    assert pooled == pytest.approx(hits.mean())
    assert pooled == pytest.approx(right.mean(), abs=4 * np.sqrt(0.25 / chosen.sum()))


def test_a_duplicate_lies_between_chance_and_the_perfect_prediction_where_no_formula_is_known():
    truth, _ = gaussian_truth(signal=1.0)
    share = truth.significant.mean()
    for name, floor in (("spearman_lfc", 0.0), ("pr_auc", share), ("overlap_at_n", share)):
        found = np.nanmean(score(name, truth.half_a, truth))
        assert floor + 0.1 < found < np.nanmean(score(name, truth.half_b, truth)) - 0.02


def test_additive_difference_of_a_duplicate_is_that_of_two_noises():
    """‖a − b‖ has variance 2s² per gene, the additive model's error s² + its own variance."""
    truth, delta = gaussian_truth()
    own = 0.3
    additive = 2.0 + delta + own * np.random.default_rng(5).standard_normal(delta.shape)
    values = score("additive_l2_difference", truth.half_a, replace(truth, additive=additive))
    expected = np.sqrt(400) * (np.sqrt(2) * NOISE - np.sqrt(NOISE**2 + own**2))
    assert values.mean() == pytest.approx(expected, rel=0.01)


# --- cell-eval where it breaks ties --------------------------------------------------------------


def test_ties_in_discrimination_are_the_mean_of_cell_evals_over_both_orders():
    """cell-eval breaks ties by the order of the perturbations; half of each order is what ours counts."""
    from cell_eval import _types as types
    from cell_eval.metrics import _anndata as module

    base = random_truth(n=6, genes=20)
    # Three perturbations with one truth tie for each other's prediction. Eighths make distances exact.
    eighths = lambda values: np.round(8 * values) / 8  # noqa: E731
    half_b = eighths(base.half_b[[0, 0, 0, 3, 4, 5]])
    truth = replace(base, half_b=half_b, perturbed_mean=eighths(base.perturbed_mean))
    guess = half_b + eighths(np.random.default_rng(1).normal(0, 0.4, half_b.shape))
    theirs = []
    for order in (range(6), range(5, -1, -1)):
        # cell-eval takes perturbations in the order of their names.
        names = [f"p{position}" for position in np.argsort(list(order))]
        obs = pd.DataFrame({"target": [*names, "ctrl"]}, index=[*names, "ctrl"])
        make = lambda rows, obs=obs: ad.AnnData(  # noqa: E731
            np.vstack([rows, truth.perturbed_mean]), obs=obs, var=pd.DataFrame(index=truth.genes)
        )
        pair = types.PerturbationAnndataPair(make(half_b), make(guess), "target", "ctrl")
        found = module.discrimination_score(pair, metric="l2")
        theirs.append([found[name] for name in names])
    assert theirs[0] != pytest.approx(theirs[1])
    ours = 1 - (1 - score("rank_l2", guess, truth)) * 5 / 6
    assert ours == pytest.approx(np.mean(theirs, axis=0), abs=1e-6)


# --- intervals cover the truth -------------------------------------------------------------------


def pooled_interval(values, n_seeds=1):
    """Interval of the mean score of one model from values (perturbations, seeds)."""
    rows = [
        ("biojepa", 0, seed, f"P{i:03d}", "single", "mse", value)
        for (i, seed), value in np.ndenumerate(values[:, :n_seeds])
    ]
    columns = ["model", "fold", "seed", "perturbation", "category", "metric", "value"]
    scores = pd.DataFrame(rows, columns=columns)
    scopes = {"all": make_scopes(scores[["perturbation", "category"]], 400, 0)["all"]}
    table = metric_tables(scores, WholeModelScores(scopes), {"mse": METRICS["mse"]}, scopes)[0]
    low, high = interval(table.draws, 0.95)
    return low[0], high[0]


@pytest.mark.slow
def test_the_interval_covers_the_truth_about_95_percent_of_the_time():
    """60 perturbations with skewed scores, 600 screens: coverage ± 0.018 (two standard errors).

    A percentile interval of 60 values is a little too short, by √(59/60) and normal for t quantiles.
    """
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(600):
        low, high = pooled_interval(rng.gamma(4.0, 0.25, (60, 1)))
        hits += low <= 1.0 <= high
    assert hits / 600 == pytest.approx(0.945, abs=0.025)


@pytest.mark.slow
def test_the_interval_over_seeds_covers_the_mean_over_all_trainings():
    """Each training shifts all scores by N(0, 0.3²), beside a spread of 1 over 60 perturbations.

    The bootstrap takes the variance of S seeds as (S − 1)/S of what it is, so few seeds give intervals
    that are too short: with 10, the variance of the mean is 0.0167 + 0.9 · 0.009, and the interval covers
    what a normal one of that width does. Without seeds in the draws it would cover 82 %.
    """
    rng = np.random.default_rng(1)
    n, n_seeds, shift = 60, 10, 0.3
    nested = flat = 0
    for _ in range(400):
        own = rng.normal(0, 1, (n, 1))
        values = own + rng.normal(0, shift, (1, n_seeds))
        low, high = pooled_interval(values, n_seeds)
        nested += low <= 0.0 <= high
        low, high = pooled_interval(values.mean(axis=1, keepdims=True))
        flat += low <= 0.0 <= high
    variance = 1 / n + shift**2 / n_seeds
    expected = [
        2 * stats.norm.cdf(1.96 * np.sqrt(taken / variance)) - 1
        for taken in (1 / n + 0.9 * shift**2 / n_seeds, 1 / n)
    ]
    assert nested / 400 == pytest.approx(expected[0], abs=0.035)
    assert flat / 400 == pytest.approx(expected[1], abs=0.045)
    assert nested > flat + 20
