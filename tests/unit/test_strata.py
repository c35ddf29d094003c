"""Claims about strata: where they are cut, what describes a perturbation, and what is scored in them."""

from __future__ import annotations

from dataclasses import replace

import h5py
import numpy as np
import pandas as pd
import pytest
from evaluation_case import random_truth
from scipy import stats

from biojepa.contracts import METRICS_COLUMNS, STRATA_COLUMNS
from biojepa.evaluation.metrics import METRICS
from biojepa.evaluation.resampling import WholeModelScores, make_scopes
from biojepa.evaluation.settings import EvaluationSettings
from biojepa.evaluation.statistics import metric_tables
from biojepa.evaluation.strata import perturbation_properties, strata_table, stratify
from biojepa.neighbours import PriorCodes, read_prior_codes

METRIC = "pearson_delta_perturbed_mean"
SETTINGS = EvaluationSettings(draws=500, min_perturbations=4, seed=2)


def cut(values, min_size=2, **more):
    """Strata of perturbations P00, P01, …: name, range and members."""
    table = pd.Series(values, index=[f"P{place:02d}" for place in range(len(values))], dtype=float)
    return [
        (stratum.name, stratum.lower, stratum.upper, [int(name[1:]) for name in stratum.members])
        for stratum in stratify(table, min_size, **more)
    ]


def test_strata_are_terciles_by_value_whatever_the_order():
    assert cut([5, 1, 3, 2, 6, 4]) == [
        ("low", 1, 2, [1, 3]),
        ("middle", 3, 4, [2, 5]),
        ("high", 5, 6, [0, 4]),
    ]


def test_equal_values_are_never_parted():
    # Borders are at 1|2 and 5|6; the terciles at 2 and 4 are nearer to these than to each other.
    assert cut([0, 7, 7, 7, 7, 9], min_size=1) == [
        ("low", 0, 0, [0]),
        ("middle", 7, 7, [1, 2, 3, 4]),
        ("high", 9, 9, [5]),
    ]
    # Too small a part makes fewer parts: the border at 1 and that at 5 are as near to the median.
    assert cut([0, 7, 7, 7, 7, 9], min_size=2) == []
    assert cut([0, 0, 7, 7, 7, 7, 9], min_size=2) == [("low", 0, 0, [0, 1]), ("high", 7, 9, [2, 3, 4, 5, 6])]


def test_few_perturbations_make_fewer_strata_and_one_value_none():
    assert [entry[0] for entry in cut(range(9), min_size=3)] == ["low", "middle", "high"]
    # Terciles of eight would hold 3, 2 and 3.
    assert [entry[3] for entry in cut(range(8), min_size=3)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert cut(range(5), min_size=3) == []
    assert cut([1] * 12) == []
    assert cut([]) == []


def test_perturbations_without_a_value_are_a_stratum_of_their_own():
    low, high, missing = cut([1, np.nan, 2, 3, 4], min_size=2)
    assert (low[3], high[3]) == ([0, 2], [3, 4])
    assert missing[0] == "missing" and missing[3] == [1] and np.isnan(missing[1])


# --- what describes a perturbation --------------------------------------------------------------


def coded_truth():
    """Perturbations A, B+N and N; training has A+C and B; codes relate N to C, and one source lacks B."""
    truth = random_truth(n=3, genes=25)
    truth = replace(truth, perturbations=["A", "B+N", "N"], n_genes_seen=np.array([1, 1, 0]))
    codes = {
        "net": np.array([[1, 0], [0, 1], [0.6, 0.8], [0.8, 0.6]]),
        "sets": np.array([[1.0], [0.0], [0.5], [1.0]]),
    }
    return truth, ["A+C", "B"], PriorCodes(("A", "B", "C", "N"), codes)


def test_neighbours_and_coverage_come_from_codes_and_training_genes():
    truth, trained, codes = coded_truth()
    table = perturbation_properties([truth], [trained], [codes]).set_index("perturbation")
    # N and C: cosines 0.96 and 0.5; N and A: 0.8 and 1, which is more on average.
    assert table.loc["N", "nearest_training_gene"] == "A"
    assert table.loc["N", "nearest_similarity"] == pytest.approx((0.8 + 1.0) / 2)
    assert table.loc["B+N", "nearest_training_gene"] == "B;A"
    assert table.loc["B+N", "nearest_distance"] == pytest.approx(0.1)
    assert table.loc["A", ["nearest_similarity", "nearest_distance"]].tolist() == [1.0, 0.0]
    assert table["prior_coverage"].tolist() == [1.0, 0.5, 1.0]
    bare = perturbation_properties([truth], [trained]).set_index("perturbation")
    assert bare["nearest_similarity"].isna().tolist() == [False, True, True]
    assert bare["prior_coverage"].isna().all()
    no_source = perturbation_properties([truth], [trained], [PriorCodes((), {})])
    assert no_source["prior_coverage"].tolist() == [0, 0, 0]


def test_a_perturbation_in_a_context_is_described_by_its_genes():
    truth, trained, codes = coded_truth()
    placed = replace(truth, perturbations=[f"{label} @ K562" for label in truth.perturbations])
    first, second = (perturbation_properties([t], [trained], [codes]) for t in (truth, placed))
    pd.testing.assert_frame_equal(first.drop(columns="perturbation"), second.drop(columns="perturbation"))


def test_effects_come_from_half_a_alone_without_their_sampling_noise():
    truth, trained, codes = coded_truth()
    table = perturbation_properties([truth], [trained], [codes])
    change = truth.half_a - truth.control_mean
    noise = truth.var_a / truth.n_a[:, None] + truth.control_var / truth.n_control
    expected = np.sqrt(np.maximum((change**2 - noise).sum(axis=1), 0))
    np.testing.assert_allclose(table["effect_size"], expected)
    for row in range(3):
        p = [
            stats.ttest_ind_from_stats(
                truth.half_a[row, g], np.sqrt(max(truth.var_a[row, g], truth.control_var[g])), truth.n_a[row],
                truth.control_mean[g], np.sqrt(truth.control_var[g]), truth.n_control, equal_var=False,
            ).pvalue
            for g in range(25)
        ]  # fmt: skip
        assert table["n_significant"][row] == (stats.false_discovery_control(p) < 0.05).sum()
    other_b = replace(truth, half_b=truth.half_b + 5, all_cells=truth.all_cells + 5)
    pd.testing.assert_frame_equal(perturbation_properties([other_b], [trained], [codes]), table)


def test_the_length_of_no_change_is_about_zero():
    rng = np.random.default_rng(0)
    control = rng.normal(1, 0.5, (4000, 200))
    cells = rng.normal(1, 0.5, (60, 20, 200))
    truth = replace(
        random_truth(n=60, genes=200), half_a=cells.mean(axis=1), var_a=cells.var(axis=1, ddof=1),
        n_a=np.full(60, 20), control_mean=control.mean(axis=0), control_var=control.var(axis=0, ddof=1),
        n_control=4000,
    )  # fmt: skip
    sizes = perturbation_properties([truth], [[]])["effect_size"]
    # The plain norm is √(200 · 0.25 / 20) = 1.58 for noise alone.
    assert np.linalg.norm(truth.half_a - truth.control_mean, axis=1).min() > 1.2
    assert sizes.median() < 0.4 and (sizes == 0).mean() == pytest.approx(0.5, abs=0.2)


def test_only_codes_and_their_genes_are_read(tmp_path):
    with h5py.File(tmp_path / "pairs.h5", "w") as file:
        file.create_dataset("names/perturbed_genes", data=np.array(["A", "B"], dtype=object),
                            dtype=h5py.string_dtype())  # fmt: skip
        file["codes/net"] = np.eye(2, dtype=np.float32)
    codes = read_prior_codes(tmp_path / "pairs.h5")
    assert codes.perturbed_genes == ("A", "B")
    np.testing.assert_array_equal(codes.codes["net"], np.eye(2))


# --- scores in strata ---------------------------------------------------------------------------


def case(n=24):
    """Scores of four models on n perturbations, whose number of cells rises with their place."""
    rng = np.random.default_rng(1)
    names = [f"P{place:02d}" for place in range(n)]
    ridge = rng.uniform(0.1, 0.5, n)
    values = {
        "biojepa": ridge + np.where(np.arange(n) < n // 3, 0.2, -0.1) + rng.normal(0, 0.02, n),
        "ridge": ridge, "knn": ridge - 0.3 + 0.8 * (np.arange(n) < n // 3), "mean": np.zeros(n),
        "duplicate": np.full(n, 0.9),
    }  # fmt: skip
    scores = pd.DataFrame(
        [(model, 0, 0, name, "single", METRIC, value)
         for model, numbers in values.items() for name, value in zip(names, numbers, strict=True)],
        columns=list(METRICS_COLUMNS),
    )  # fmt: skip
    properties = pd.DataFrame(
        {
            "perturbation": names, "fold": 0, "category": "single", "n_genes_seen": 0,
            "nearest_training_gene": "A", "nearest_similarity": 0.5, "nearest_distance": 0.5,
            "prior_coverage": 1.0, "n_cells": np.arange(n) + 50, "n_significant": rng.integers(0, 40, n),
            "effect_size": rng.uniform(0, 3, n),
        }
    )  # fmt: skip
    return scores, properties, pd.DataFrame(values, index=names)


def strata_of(scores, properties, settings=SETTINGS):
    tested = scores[["perturbation", "category"]].drop_duplicates()
    scopes = {"all": make_scopes(tested, settings.draws, settings.seed)["all"]}
    tables = metric_tables(scores, WholeModelScores(scopes), {METRIC: METRICS[METRIC]}, scopes)
    return strata_table(scores, {METRIC: tables[0]}, properties, settings)


def test_scores_of_a_stratum_are_means_over_its_perturbations():
    scores, properties, values = case()
    table = strata_of(scores, properties)
    assert tuple(table.columns) == STRATA_COLUMNS
    cells = table[table["property"] == "n_cells"].set_index(["stratum", "model"])
    parts = {"low": slice(0, 8), "middle": slice(8, 16), "high": slice(16, 24)}
    for name, part in parts.items():
        inside = values.iloc[part]
        row = cells.loc[(name, "biojepa")]
        assert (row["n"], row["lower"], row["upper"]) == (8, part.start + 50, part.stop + 49)
        assert row["mean"] == pytest.approx(inside["biojepa"].mean())
        assert row["gap_closed"] == pytest.approx(inside["biojepa"].mean() / 0.9)
        gain = inside["biojepa"] - inside["ridge"]
        assert row["difference"] == pytest.approx(gain.mean())
        half = 1.96 * gain.std() / np.sqrt(8)
        assert row["difference_ci_low"] == pytest.approx(gain.mean() - half, abs=0.5 * half)
    assert (cells.loc[("low", "biojepa"), "difference_ci_low"] > 0) and (
        cells.loc[("high", "biojepa"), "difference_ci_high"] < 0
    )


def test_every_stratum_is_compared_with_the_baseline_that_is_best_over_all():
    scores, properties, values = case()
    assert values["ridge"].mean() > values["knn"].mean()
    assert values["knn"][:8].mean() > values["ridge"][:8].mean()
    table = strata_of(scores, properties)
    assert set(table["best_baseline"]) == {"ridge"}
    own = table[table["model"] == "ridge"]
    assert own[["difference", "difference_ci_low"]].isna().all().all()


def test_a_simple_model_under_test_is_compared_with_the_others_in_every_stratum():
    scores, properties, values = case()
    table = strata_of(scores, properties, replace(SETTINGS, model="ridge"))
    assert set(table["best_baseline"]) == {"knn"}
    row = table[(table["model"] == "ridge") & (table["property"] == "category")].iloc[0]
    assert row["difference"] == pytest.approx((values["ridge"] - values["knn"]).mean())


def test_the_share_that_the_best_baseline_closes_is_a_property():
    scores, properties, values = case()
    table = strata_of(scores, properties)
    gap = table[(table["property"] == "baseline_gap") & (table["model"] == "ridge")]
    shares = np.sort(values["ridge"].to_numpy() / 0.9)
    assert gap["lower"].tolist() == pytest.approx(shares[[0, 8, 16]].tolist())
    assert gap["upper"].tolist() == pytest.approx(shares[[7, 15, 23]].tolist())
    # The duplicate scores the same everywhere, as do distances and coverage: nothing to cut.
    assert not {"duplicate_score", "nearest_distance", "prior_coverage"} & set(table["property"])


def test_a_share_of_no_gap_is_not_known():
    scores, properties, _ = case()
    flat = scores.copy()
    flat.loc[(flat["model"] == "duplicate") & flat["perturbation"].isin(["P00", "P01"]), "value"] = [
        0.0,
        -0.2,
    ]
    table = strata_of(flat, properties)
    missing = table[(table["property"] == "baseline_gap") & (table["stratum"] == "missing")]
    assert missing["n"].unique().tolist() == [2]


def test_categories_are_listed_whatever_their_size_and_one_perturbation_has_no_interval():
    scores, properties, values = case()
    scores.loc[scores["perturbation"] == "P05", "category"] = "combo_seen2"
    properties.loc[properties["perturbation"] == "P05", "category"] = "combo_seen2"
    rows = strata_of(scores, properties).query("property == 'category'").set_index(["stratum", "model"])
    lone = rows.loc[("combo_seen2", "biojepa")]
    assert lone["n"] == 1 and lone["mean"] == pytest.approx(values.loc["P05", "biojepa"])
    assert lone[["ci_low", "ci_high", "difference_ci_low", "difference_ci_high"]].isna().all()
    assert lone["difference"] == pytest.approx(values.loc["P05", "biojepa"] - values.loc["P05", "ridge"])
    assert rows.loc[("single", "biojepa"), "n"] == 23


def test_one_perturbation_in_two_contexts_has_no_interval_either():
    """It is drawn as one: an interval of width 0 would claim certainty."""
    scores, properties, values = case()
    placed = {"P05": "A @ K562", "P06": "A @ RPE1"}
    for table in (scores, properties):
        table.loc[table["perturbation"].isin(placed), "category"] = "other_context"
        table["perturbation"] = table["perturbation"].replace(placed)
    rows = strata_of(scores, properties).query("property == 'category'").set_index(["stratum", "model"])
    one, several = rows.loc[("other_context", "biojepa")], rows.loc[("single", "biojepa")]
    inside = values.loc[list(placed)]
    assert one["n"] == 2 and one["mean"] == pytest.approx(inside["biojepa"].mean())
    assert one["gap_closed"] == pytest.approx(inside["biojepa"].mean() / 0.9)
    assert one["difference"] == pytest.approx((inside["biojepa"] - inside["ridge"]).mean())
    bounds = [name for name in STRATA_COLUMNS if "_ci_" in name or name in ("ci_low", "ci_high")]
    assert len(bounds) == 6 and one[bounds].isna().all() and several[bounds].notna().all()


def test_a_perturbation_of_two_categories_counts_in_each_with_its_scores_there():
    scores, properties, values = case()
    again = scores[scores["perturbation"] == "P05"].assign(fold=1, category="combo_seen2")
    again["value"] += 0.2
    described = properties[properties["perturbation"] == "P05"].assign(fold=1, category="combo_seen2")
    table = strata_of(pd.concat([scores, again]), pd.concat([properties, described], ignore_index=True))
    rows = table[table["model"] == "biojepa"].set_index(["property", "stratum"])
    assert rows.loc[("category", "combo_seen2"), "mean"] == pytest.approx(values.loc["P05", "biojepa"] + 0.2)
    assert rows.loc[("category", "single"), "mean"] == pytest.approx(values["biojepa"].mean())
    # Other properties average what both folds say of it.
    inside = values["biojepa"].iloc[:8].sum() + 0.1
    assert rows.loc[("n_cells", "low"), "mean"] == pytest.approx(inside / 8)


def test_the_draws_of_a_stratum_do_not_depend_on_other_properties():
    scores, properties, _ = case()
    first = strata_of(scores, properties)
    second = strata_of(scores, properties.assign(n_significant=0, nearest_distance=np.arange(24) / 24))
    shared = "property in ('n_cells', 'effect_size')"
    pd.testing.assert_frame_equal(
        first.query(shared).reset_index(drop=True), second.query(shared).reset_index(drop=True)
    )
