"""The verdict follows from the table by fixed rules."""

from __future__ import annotations

import json
import re

import numpy as np
import pandas as pd
import pytest
from test_statistics import long_table, tables_of

from biojepa.errors import InputError
from biojepa.evaluation.settings import SIMPLE_BASELINES, EvaluationSettings
from biojepa.evaluation.verdict import BETTER, CANNOT_TELL, NOT_EVALUATED, SAME, WORSE, reach_verdict

FIRST, SECOND = "pearson_delta_perturbed_mean", "rank_l2"


def scores(n=20, ours=0.5, other=0.3, ceiling=0.9, metric=FIRST, category="single", floor=0.0, prefix="P"):
    """Scores of the four models that matter, with noise of 0.02 between perturbations."""
    rng = np.random.default_rng(0)
    levels = {"mean": floor, "duplicate": ceiling, "ridge": other, "biojepa": ours}
    models = {
        name: {f"{prefix}{i}": level + rng.normal(0, 0.02) for i in range(n)}
        for name, level in levels.items()
    }
    return long_table(models, metric, category=category)


def verdict_of(*parts, **settings):
    return reach_verdict(tables_of(pd.concat(parts)), EvaluationSettings(**settings))


@pytest.mark.parametrize(
    ("ours", "outcome"), [(0.5, BETTER), (0.3, SAME), (0.1, WORSE)], ids=["better", "same", "worse"]
)
def test_interval_of_the_paired_difference_decides(ours, outcome):
    table = scores(ours=ours)
    verdict = verdict_of(table)
    means = table.groupby("model")["value"].mean()
    assert verdict["outcome"] == outcome
    assert f"biojepa is {outcome} the best simple baseline (ridge)" in verdict["sentence"]
    assert f"{means['biojepa']:.2f} against {means['ridge']:.2f}" in verdict["sentence"]
    made = verdict["details"][0]["comparisons"][0]
    assert {BETTER: made["ci_low"] > 0, WORSE: made["ci_high"] < 0}.get(
        outcome, made["ci_low"] <= 0 <= made["ci_high"]
    )


def test_gap_closed_is_said_in_words():
    assert (
        "It covers 56% of the way from the training mean to a technical duplicate"
        in verdict_of(scores())["sentence"]
    )


def test_no_number_of_the_sentence_is_a_zero_with_a_sign():
    rng = np.random.default_rng(0)
    shared = rng.normal(0, 0.1, 40)
    levels = {"mean": 0.0, "duplicate": 0.9, "ridge": -0.001, "biojepa": -0.0034}
    models = {
        name: {
            f"P{i}": level + (common - shared.mean()) + (name == "biojepa") * step
            for i, (common, step) in enumerate(zip(shared, 0.002 * np.tile([-1, 1], 20), strict=True))
        }
        for name, level in levels.items()
    }
    verdict = verdict_of(long_table(models, FIRST, category="single"), baselines=("ridge",))
    made = verdict["details"][0]["comparisons"][0]
    assert (made["outcome"], made["ci_high"] < 0, made["ci_high"] > -0.005) == (WORSE, True, True)
    assert " 0.00 against 0.00, difference -0.002 (" in verdict["sentence"]
    # On which side of 0 the interval ends decides, so it is told.
    assert f"to {made['ci_high']:+.1g})" in verdict["sentence"]
    assert not re.search(r"[-+]0\.00(?!\d)|-0%", verdict["sentence"])


def test_too_few_perturbations_cannot_tell():
    verdict = verdict_of(scores(n=7))
    assert verdict["outcome"] == CANNOT_TELL
    assert "7 held-out perturbations" in verdict["sentence"]
    assert verdict_of(scores(n=7), min_perturbations=7)["outcome"] == BETTER


def test_a_duplicate_no_better_than_the_mean_cannot_tell():
    verdict = verdict_of(scores(ceiling=0.0), scores(ceiling=0.0, metric=SECOND))
    assert verdict["outcome"] == CANNOT_TELL
    assert verdict["usable"] == {FIRST: False, SECOND: False}
    assert verdict["dynamic_range"][FIRST]["low"] < 0


def test_the_second_metric_decides_where_the_first_is_unusable():
    verdict = verdict_of(scores(ceiling=0.0), scores(metric=SECOND, ours=0.1))
    assert verdict["outcome"] == WORSE
    assert [made["metric"] for made in verdict["details"][0]["comparisons"]] == [SECOND]


def test_contexts_of_few_perturbations_are_few():
    """Seven perturbations in two contexts each are 14 labels and say no more than seven do."""
    table = scores(n=14, category="other_context")
    place = table["perturbation"].str[1:].astype(int)
    table["perturbation"] = [f"P{i // 2} @ {'K562' if i % 2 else 'RPE1'}" for i in place]
    verdict = verdict_of(table)
    assert verdict["outcome"] == CANNOT_TELL
    assert "On 14 held-out perturbations" in verdict["sentence"]
    assert verdict_of(table, min_perturbations=7)["outcome"] == BETTER


def test_metrics_that_contradict_each_other_do_not_make_a_winner():
    verdict = verdict_of(scores(ours=0.5), scores(ours=0.1, metric=SECOND))
    assert verdict["outcome"] == SAME
    assert "The metrics disagree: by discrimination rank it is worse than it" in verdict["sentence"]


def test_a_second_metric_without_difference_does_not_take_a_win_away():
    assert verdict_of(scores(ours=0.5), scores(ours=0.3, metric=SECOND))["outcome"] == BETTER


def test_seen_and_unseen_genes_are_judged_apart():
    verdict = verdict_of(
        scores(ours=0.6, category="combo_seen2", prefix="C"), scores(ours=0.1, category="single", prefix="S")
    )
    outcomes = {entry["scope"]: entry["outcome"] for entry in verdict["details"]}
    assert outcomes["seen genes"] == BETTER
    assert outcomes["unseen genes"] == WORSE
    assert set(verdict["dynamic_range_by_category"]) == {
        "combo_seen2",
        "single",
        "seen genes",
        "unseen genes",
    }


def test_without_the_model_or_a_baseline_nothing_is_claimed():
    table = scores()
    for absent in ("biojepa", "ridge"):
        verdict = verdict_of(table[table["model"] != absent], baselines=("ridge",))
        assert verdict["outcome"] == NOT_EVALUATED
        assert verdict["details"][0]["comparisons"] == []


def test_the_model_under_test_is_never_its_own_baseline():
    verdict = verdict_of(scores(ours=0.5), model="ridge")
    assert verdict["details"][0]["comparisons"][0]["best_baseline"] == "mean"
    assert verdict["outcome"] == BETTER


def test_verdict_is_json_without_nan():
    partial = scores()
    partial = partial[partial["model"] != "duplicate"]
    verdict = verdict_of(partial)
    assert verdict["usable"] == {FIRST: None}
    json.dumps(verdict, allow_nan=False)


def test_settings_refuse_unknown_keys_and_impossible_values():
    assert EvaluationSettings.from_mapping({}).baselines == SIMPLE_BASELINES
    made = EvaluationSettings.from_mapping({"baselines": ["ridge"], "enrichment": {"max_sets": 3}})
    assert (made.baselines, made.enrichment.max_sets) == (("ridge",), 3)
    for content, key in (
        ({"bootstraps": 5}, "evaluate.bootstraps"),
        ({"enrichment": {"sets": 5}}, r"evaluate.enrichment\.sets"),
        ({"confidence": 95}, "evaluate.confidence.*95.*0.5 to 0.9999"),
        ({"enrichment": {"permutations": 1}}, r"evaluate\.enrichment\.permutations"),
    ):
        with pytest.raises(InputError, match=key):
            EvaluationSettings.from_mapping(content)


def test_a_model_that_repeats_the_baseline_but_for_rounding_is_indistinguishable_from_it():
    table = scores()
    ours = table[table["model"] == "ridge"].assign(model="biojepa")
    ours["value"] -= 2e-8  # what float32 leaves between two ways to the same prediction
    made = verdict_of(table[table["model"] != "biojepa"], ours)["details"][0]["comparisons"][0]
    assert (made["outcome"], made["difference"], made["ci_low"], made["ci_high"]) == (SAME, 0.0, 0.0, 0.0)
