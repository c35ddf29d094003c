"""Dry runs: splits before the predictions that are fitted to them, and models trained on everything."""

import pytest

from workflow_case import Pipeline

MODELS = ["mean", "ridge", "biojepa", "shuffled_priors"]
# Jobs of the scheme that holds nothing out, on one dataset.
NOTHING_HELD_OUT = {"simulate": 1, "preprocess": 1, "freeze_split": 1, "pair": 1, "train": 2}
PAGES = {"qc_report": 1, "unevaluated": 1, "index": 1, "provenance": 1}


@pytest.fixture(scope="module")
def fresh(checkout, tmp_path_factory):
    return Pipeline(checkout, tmp_path_factory.mktemp("fresh"))


def test_without_a_held_out_perturbation_models_are_trained_and_nothing_is_evaluated(fresh):
    config = {"models": MODELS, "schemes": ["none"]}
    assert fresh.planned(config=config) == NOTHING_HELD_OUT | PAGES
    targets = {"trained": 1, "evaluated": 1}
    assert fresh.planned(*targets, config=config) == NOTHING_HELD_OUT | targets


def test_a_scheme_beside_it_is_evaluated_as_always(fresh):
    planned = fresh.planned(config={"models": MODELS, "folds": [1], "schemes": ["perturbation", "none"]})
    # One fold of each scheme is split and trained; what follows is made of the one that holds something out.
    twice = {"freeze_split": 2, "pair": 2, "train": 4}
    once = ("baselines", "references", "embed", "umap", "representation", "evaluate", "report")
    assert planned == NOTHING_HELD_OUT | PAGES | twice | dict.fromkeys(once, 1)


def test_splits_are_made_before_the_predictions_that_are_fitted_to_them(fresh):
    entry = {"name": "mine", "predictions": "mine/fold{fold}.h5ad"}
    config = {"models": ["mean", entry], "evaluate": {"model": "mine"}}
    planned = fresh.planned("paired", config=config)
    assert planned == {"simulate": 1, "preprocess": 1, "freeze_split": 2, "pair": 2, "paired": 1}
    answer = fresh.run("--dry-run", config=config)
    assert answer.returncode != 0
    assert "config, models, mine: no file mine/fold0.h5ad, mine/fold1.h5ad" in answer.stdout
    assert "make the splits first, with the target paired" in answer.stdout
    assert "Job stats" not in answer.stdout, "no job is planned"
