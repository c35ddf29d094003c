"""Every metric against a second computation: scipy, scikit-learn, cell-eval or a case by hand."""

from __future__ import annotations

from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from evaluation_case import random_truth
from scipy import integrate, stats
from sklearn.metrics import average_precision_score, mean_squared_error, r2_score

from biojepa.evaluation.differential import average_precision_rows
from biojepa.evaluation.headline import share_farther
from biojepa.evaluation.metrics import METRICS, all_metrics
from biojepa.evaluation.registry import pearson_rows, scored_elsewhere

PER_PERTURBATION = [name for name, metric in METRICS.items() if metric.unit == "perturbation"]
POINT = [name for name in PER_PERTURBATION if not METRICS[name].needs_sd]


def score(name, predicted, truth, *more):
    return METRICS[name].score(predicted, truth, *more)


def whole(name, predicted, truth, weights=None):
    weights = np.ones((1, len(predicted))) if weights is None else weights
    return METRICS[name].score(predicted, truth, weights)


@pytest.fixture
def truth():
    return random_truth()


@pytest.fixture
def guess(truth):
    noise = np.random.default_rng(1).normal(0, 0.15, truth.half_b.shape)
    return truth.perturbed_mean + 0.6 * truth.delta + noise


def test_registry_holds_the_named_metrics_with_formula_and_best_value():
    names = [
        "pearson_delta_perturbed_mean",
        "weighted_r2_delta",
        "rank_l2",
        "rank_cosine",
        "effect_slope",
        "effect_cosine",
        "spread_ratio",
        "additive_l2_difference",
        "interaction_tpr",
        "direction_match",
        "spearman_lfc",
        "pr_auc",
        "overlap_at_n",
        "coverage_50",
        "coverage_80",
        "coverage_95",
        "crps",
        "pearson_delta_control",
        "pearson_delta_control_top20",
        "l2_top1000",
        "mse",
        "pathway_correlation",
        "variance_ratio",
        "energy_distance",
    ]
    assert list(all_metrics()) == names
    for metric in all_metrics().values():
        assert metric.description
        assert metric.formula
        assert metric.best in ("max", "min") or 0 < metric.best <= 1
    assert all_metrics()["coverage_80"].goodness(np.array([0.7, 0.8])).tolist() == pytest.approx([-0.1, 0])


def test_what_is_no_function_of_means_is_pooled_and_never_called():
    elsewhere = [name for name, metric in all_metrics().items() if metric.score is scored_elsewhere]
    assert elsewhere == ["pathway_correlation", "variance_ratio", "energy_distance"]
    assert not set(elsewhere) & set(METRICS), "these are called for every prediction"
    with pytest.raises(NotImplementedError):
        all_metrics()["energy_distance"].score(np.zeros((1, 2)), np.zeros((1, 2)))


def test_correlations_equal_scipy(truth, guess):
    for name, reference, observed in (
        ("pearson_delta_perturbed_mean", truth.perturbed_mean, truth.half_b),
        ("pearson_delta_control", truth.control_mean, truth.all_cells),
    ):
        expected = [
            stats.pearsonr(g - reference, x - reference).statistic
            for g, x in zip(guess, observed, strict=True)
        ]
        assert score(name, guess, truth) == pytest.approx(expected, abs=1e-12)


def test_top20_correlation_uses_the_genes_of_largest_welch_t(truth, guess):
    for row in range(len(guess)):
        error = np.sqrt(np.maximum(truth.var_all[row], truth.control_var) / 24 + truth.control_var / 60)
        t = (truth.all_cells[row] - truth.control_mean) / error
        top = sorted(range(30), key=lambda gene: -abs(t[gene]))[:20]
        expected = stats.pearsonr(
            (guess[row] - truth.control_mean)[top], (truth.all_cells[row] - truth.control_mean)[top]
        ).statistic
        assert score("pearson_delta_control_top20", guess, truth)[row] == pytest.approx(expected, abs=1e-12)


def test_weighted_r2_equals_its_formula_and_scikit_learn_at_equal_weights(truth, guess):
    for row, value in enumerate(score("weighted_r2_delta", guess, truth)):
        t = stats.ttest_ind_from_stats(
            truth.half_a[row], np.sqrt(np.maximum(truth.var_a[row], truth.control_var)), 12,
            truth.control_mean, np.sqrt(truth.control_var), 60, equal_var=False,
        ).statistic  # fmt: skip
        weights = t**2 / (t**2).sum()
        delta, predicted = truth.delta[row], guess[row] - truth.perturbed_mean
        expected = 1 - (weights * (predicted - delta) ** 2).sum() / (weights * delta**2).sum()
        assert value == pytest.approx(expected, abs=1e-10)
    # With equal weights and a Δ that sums to 0, R² against 0 is the usual R² against the mean.
    flat = replace(truth, half_b=truth.perturbed_mean + truth.delta - truth.delta.mean(axis=1, keepdims=True))
    vars(flat)["weights"] = np.full(flat.half_b.shape, 1 / 30)
    usual = [r2_score(x, g) for x, g in zip(flat.delta, guess - flat.perturbed_mean, strict=True)]
    assert score("weighted_r2_delta", guess, flat) == pytest.approx(usual, abs=1e-10)


def test_change_below_the_zero_norm_correlates_zero():
    direction = np.array([[3.0, -1.0, 2.0]])
    tiny = 0.9e-6 * direction / np.linalg.norm(direction)
    assert pearson_rows(tiny, direction, 1e-6).tolist() == [0.0]
    assert pearson_rows(2 * tiny, direction, 1e-6) == pytest.approx([1.0])
    assert pearson_rows(np.ones((1, 3)), direction, 1e-6).tolist() == [0.0]


def test_rank_counts_ties_half_and_excludes_the_own_truth():
    # Row 0: own distance 1; others 2, 1, 0.5 → one farther, one tied, one nearer.
    distances = np.array([[1, 2, 1, 0.5], [9, 1, 9, 9], [0, 0, 1, 0], [5, 5, 5, 5]], dtype=float)
    assert share_farther(distances, np.zeros(4)).tolist() == [0.5, 1.0, 0.0, 0.5]
    assert np.isnan(share_farther(np.zeros((1, 1)), np.zeros(1))).all()


def test_rank_equals_a_loop_over_distances_without_the_target_genes(truth, guess):
    named = replace(truth, perturbations=["G0", "G1+G2", "absent", "G3+absent", *truth.perturbations[4:]])
    for name, distance in (("rank_l2", "l2"), ("rank_cosine", "cosine")):
        values = score(name, guess, named)
        for row, label in enumerate(named.perturbations):
            keep = ~truth.genes.isin(label.split("+"))
            p = (guess - truth.perturbed_mean)[row, keep]
            far = []
            for x in truth.delta[:, keep]:
                cosine = p @ x / np.linalg.norm(p) / np.linalg.norm(x)
                far.append(np.linalg.norm(p - x) if distance == "l2" else 1 - cosine)
            expected = np.mean([far[other] > far[row] for other in range(9) if other != row])
            assert values[row] == pytest.approx(expected), (name, label)


def test_target_gene_does_not_help_the_rank():
    """A prediction right about nothing but its own target gene is at chance."""
    truth = random_truth(n=6)
    truth = replace(truth, perturbations=[f"G{i}" for i in range(6)])
    truth.half_b[np.arange(6), np.arange(6)] -= 50.0
    only_target = np.tile(truth.perturbed_mean, (6, 1))
    only_target[np.arange(6), np.arange(6)] -= 50.0
    assert (score("rank_cosine", only_target, truth) == 0.5).all()


def _cell_eval_pair(real, predicted, control, labels, genes):
    from cell_eval import _types as cell_eval

    obs = pd.DataFrame({"target": [*labels, "ctrl"]}, index=[*labels, "ctrl"])
    make = lambda rows: ad.AnnData(np.vstack([rows, control]), obs=obs, var=pd.DataFrame(index=genes))  # noqa: E731
    return cell_eval.PerturbationAnndataPair(make(real), make(predicted), "target", "ctrl")


def test_ranks_and_errors_agree_with_cell_eval(truth, guess):
    """Our rank counts n − 1 others, cell-eval n truths: its value is 1 − (1 − rank)(n − 1)/n."""
    from cell_eval.metrics import _anndata as module

    labels = [f"G{i}" for i in range(9)]
    truth = replace(truth, perturbations=labels)
    # cell-eval measures effects against control; with the control at the perturbed mean ours are the same.
    pair = _cell_eval_pair(truth.half_b, guess, truth.perturbed_mean, labels, truth.genes)
    for name, metric in (("rank_l2", "l2"), ("rank_cosine", "cosine")):
        theirs = module.discrimination_score(pair, metric=metric)
        ours = dict(zip(labels, 1 - (1 - score(name, guess, truth)) * 8 / 9, strict=True))
        assert ours == pytest.approx(theirs)
    pair = _cell_eval_pair(truth.all_cells, guess, truth.control_mean, labels, truth.genes)
    for ours, theirs in (("pearson_delta_control", module.pearson_delta), ("mse", module.mse)):
        assert dict(zip(labels, score(ours, guess, truth), strict=True)) == pytest.approx(theirs(pair))


def test_gene_metrics_agree_with_cell_eval(truth, guess):
    """Given the same significant genes and ranking, recovery metrics equal cell-eval's."""
    import polars
    from cell_eval._types import _de as types
    from cell_eval.metrics import _de as module

    truth = replace(truth, fdr=0.5)  # lenient, so that most perturbations have several significant genes
    rows = [(p, g) for p in range(9) for g in range(30)]
    change = guess - truth.control_mean

    def table(lfc, fdr):
        return polars.DataFrame(
            {
                "target": [truth.perturbations[p] for p, _ in rows],
                "feature": [truth.genes[g] for _, g in rows],
                "log2_fold_change": [lfc[p, g] for p, g in rows],
                "p_value": [0.01] * len(rows),
                "fdr": [float(fdr[p, g]) for p, g in rows],
            }
        )

    real = table(truth.delta_control, np.where(truth.significant, 0.01, 0.5))
    # cell-eval ranks by predicted FDR: one that falls as our score rises gives the same ranking.
    predicted = table(change, 0.049 * 10 ** (-np.abs(change)))
    data = types.initialize_de_comparison(real, predicted)
    ours = {name: dict(zip(truth.perturbations, score(name, guess, truth), strict=True)) for name in POINT}
    for name, theirs in (
        ("direction_match", module.DEDirectionMatch()(data)),
        ("spearman_lfc", module.DESpearmanLFC()(data)),
        ("pr_auc", module.compute_pr_auc(data)),
        ("overlap_at_n", module.de_overlap_metric(data, k=None)),
    ):
        defined = {label: value for label, value in ours[name].items() if np.isfinite(value)}
        assert len(defined) >= 5
        assert defined == pytest.approx({label: theirs[label] for label in defined}, abs=1e-6), name


def test_significant_genes_equal_welch_tests_with_benjamini_hochberg():
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    truth = random_truth(seed=4)
    for row in range(9):
        p_values = [
            stats.ttest_ind_from_stats(
                truth.half_b[row, g], max(truth.var_b[row, g], truth.control_var[g]) ** 0.5, 12,
                truth.control_mean[g], truth.control_var[g] ** 0.5, 60, equal_var=False,
            ).pvalue
            for g in range(30)
        ]  # fmt: skip
        expected = multitest.multipletests(p_values, 0.05, method="fdr_bh")[0]
        assert (truth.significant[row] == expected).all()
    assert truth.significant.any()


def test_a_gene_that_half_a_misses_by_chance_carries_no_weight():
    """Zero variance of the perturbed cells must not turn a tiny difference into a huge t."""
    quiet = random_truth(seed=4)
    var_a = quiet.var_a.copy()
    var_a[:, 0] = 0
    truth = replace(quiet, var_a=var_a, half_a=np.tile(quiet.control_mean, (9, 1)) + np.eye(30)[1])
    truth.half_a[:, 0] -= 0.01
    expected = (0.01**2 / truth.control_var[0]) / (
        0.01**2 / truth.control_var[0]
        + 1
        / (np.maximum(truth.var_a[:, 1], truth.control_var[1]) / 12 + truth.control_var[1] / 60)
        * (1 / 12 + 1 / 60)
    )
    assert truth.weights[:, 0] == pytest.approx(expected)
    assert (truth.weights[:, 0] < 0.01).all()


def test_genes_that_never_vary_are_neither_significant_nor_weighted():
    truth = random_truth(control_var=np.zeros(30), var_b=np.zeros((9, 30)), var_a=np.zeros((9, 30)))
    assert not truth.significant.any()
    assert (truth.weights == 0).all()
    assert np.isnan(score("weighted_r2_delta", truth.half_a, truth)).all()
    for name in ("direction_match", "spearman_lfc", "pr_auc", "overlap_at_n"):
        assert np.isnan(score(name, truth.half_a, truth)).all()


def test_average_precision_equals_scikit_learn_with_ties():
    rng = np.random.default_rng(2)
    scores, positives = rng.integers(0, 5, (20, 50)).astype(float), rng.random((20, 50)) < 0.3
    expected = [average_precision_score(y, s) for y, s in zip(positives, scores, strict=True)]
    assert average_precision_rows(scores, positives) == pytest.approx(expected)
    assert np.isnan(average_precision_rows(scores[:1], np.ones((1, 50), bool))).all()


def test_ties_at_rank_n_count_in_part():
    truth = random_truth(n=1, genes=4)
    vars(truth)["significant"] = np.array([[True, True, False, False]])
    # Gene 0 leads; genes 1 and 2 tie for the second of two places, so gene 1 is in half of the time.
    guess = truth.control_mean + np.array([[3.0, 1.0, 1.0, 0.0]])
    guess[0, 2] = truth.control_mean[2] - (guess[0, 1] - truth.control_mean[1])
    assert score("overlap_at_n", guess, truth) == pytest.approx([0.75])
    unchanged = truth.control_mean.astype(np.float32).astype(float)[None]
    assert score("overlap_at_n", unchanged, truth) == pytest.approx([0.5])
    assert score("pr_auc", unchanged, truth) == pytest.approx([0.5])


def test_effect_slope_equals_linear_regression_and_its_weights_repeat_perturbations(truth, guess):
    norms = np.linalg.norm(truth.delta, axis=1), np.linalg.norm(guess - truth.perturbed_mean, axis=1)
    counts = np.array([[1.0] * 9, [2, 0, 1, 1, 0, 3, 1, 1, 0]])
    drawn = np.repeat(np.arange(9), counts[1].astype(int))
    expected = [stats.linregress(norms[0][rows], norms[1][rows]).slope for rows in (np.arange(9), drawn)]
    assert whole("effect_slope", guess, truth, counts) == pytest.approx(expected)
    spreads = [
        np.sqrt(guess[rows].var(axis=0).sum() / truth.half_b[rows].var(axis=0).sum())
        for rows in (np.arange(9), drawn)
    ]
    assert whole("spread_ratio", guess, truth, counts) == pytest.approx(spreads)


def test_collapsed_predictions_have_no_spread(truth):
    collapsed = np.tile(truth.half_b.mean(axis=0), (9, 1))
    assert whole("spread_ratio", collapsed, truth) == pytest.approx(0, abs=1e-6)
    assert whole("spread_ratio", truth.perturbed_mean + 0.5 * truth.delta, truth) == pytest.approx(0.5)


def test_additive_difference_is_defined_for_combinations_with_trained_singles_only(truth, guess):
    additive = np.full(truth.half_b.shape, np.nan)
    additive[2] = truth.half_b[2] + 0.2
    values = score("additive_l2_difference", guess, replace(truth, additive=additive))
    assert np.flatnonzero(np.isfinite(values)).tolist() == [2]
    assert values[2] == pytest.approx(np.linalg.norm(guess[2] - truth.half_b[2]) - 0.2 * np.sqrt(30))


def test_legacy_errors_equal_scikit_learn_on_all_cells(truth, guess, monkeypatch):
    assert score("mse", guess, truth).mean() == pytest.approx(mean_squared_error(truth.all_cells, guess))
    monkeypatch.setattr("biojepa.evaluation.legacy.EXPRESSED_GENES", 7)
    top = sorted(range(30), key=lambda gene: -truth.control_mean[gene])[:7]
    expected = [np.sqrt(((g - x)[top] ** 2).sum()) for g, x in zip(guess, truth.all_cells, strict=True)]
    assert score("l2_top1000", guess, truth) == pytest.approx(expected)


def test_crps_equals_the_integral_of_its_definition():
    truth = random_truth(n=1, genes=2)
    guess, sd = truth.half_b + np.array([[0.3, -0.1]]), np.array([[0.2, 0.05]])
    expected = []
    for gene in range(2):
        total = np.sqrt(sd[0, gene] ** 2 + truth.var_b[0, gene] / 12)
        observed = truth.half_b[0, gene]
        square = lambda y, g=gene, s=total, x=observed: (stats.norm.cdf(y, guess[0, g], s) - (y >= x)) ** 2  # noqa: E731
        low = integrate.quad(square, observed - 12 * total, observed)[0]
        expected.append(low + integrate.quad(square, observed, observed + 12 * total)[0])
    assert score("crps", guess, truth, sd) == pytest.approx([np.mean(expected)], rel=1e-6)
    certain = replace(truth, var_b=np.zeros((1, 2)))
    assert score("crps", guess, certain, 0 * sd) == pytest.approx([0.2])


@pytest.mark.parametrize("level", [50, 80, 95])
def test_intervals_of_a_calibrated_model_cover_what_they_say(level):
    """Truth drawn from the stated distribution, sampling error of half B included."""
    rng = np.random.default_rng(level)
    truth = random_truth(n=4, genes=5000)
    sd = rng.uniform(0.05, 0.3, truth.half_b.shape)
    guess = truth.half_b + rng.normal(size=sd.shape) * np.sqrt(sd**2 + truth.var_b / 12)
    # 20,000 draws: standard error at most 0.0036.
    assert score(f"coverage_{level}", guess, truth, sd).mean() == pytest.approx(level / 100, abs=0.015)
