"""Predictions made elsewhere in the workflow: a known model under another name scores the same."""

import importlib.util
import json
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from biojepa.evaluation.evaluate import evaluate
from biojepa.evaluation.predictions import PredictionFile
from biojepa.evaluation.settings import DistributionSettings, EvaluationSettings
from biojepa.evaluation.splits import read_split
from biojepa.files import sha256_of
from biojepa.halves import half_b
from workflow_case import BASELINES, FOLDS, REPO, TRAINED

TARGET_SUM = 100  # preprocess.target_sum of the tiny config
FOLD = FOLDS[0]


def run_script(finished, name, predictions, output):
    """Call the rule's script on a fold of the finished run."""
    path = REPO / "workflow" / "scripts" / "user_predictions.py"
    spec = importlib.util.spec_from_file_location("user_predictions", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    pair = {key: finished.fold(FOLD, "pair", name) for key, name in
            (("split", "split.tsv"), ("info", "split.json"), ("pairs", "pairs.h5"))}  # fmt: skip
    script.main(
        SimpleNamespace(
            input=SimpleNamespace(
                predictions=predictions, cells=finished.path("preprocess", "cells.h5ad"), **pair
            ),
            output=SimpleNamespace(predictions=output),
            wildcards=SimpleNamespace(model=name),
            params=SimpleNamespace(target_sum=TARGET_SUM, distribution={"max_cells": 1000, "seed": 0}),
        )
    )
    return PredictionFile(name, FOLD, 0, output)


def known(finished, name):
    return PredictionFile(name, FOLD, 0, finished.fold(FOLD, name, "seed0", "embed", "predictions.h5ad"))


@pytest.fixture(scope="module")
def scored(finished, tmp_path_factory):
    """Score the kernel ridge and the duplicate beside copies of them, the latter as single cells."""
    folder = tmp_path_factory.mktemp("mine")
    ridge = ad.read_h5ad(known(finished, "kernel_ridge").path)
    # As someone else would write it: other orders, more genes, no word on sets or split.
    copy = ad.AnnData(
        np.hstack([ridge.X, np.ones((ridge.n_obs, 1), dtype=np.float32)])[::-1],
        obs=pd.DataFrame(index=["+".join(reversed(label.split("+"))) for label in ridge.obs_names[::-1]]),
        var=pd.DataFrame(index=[*ridge.var_names, "MORE"]),
    )
    copy.layers["sd"] = np.hstack([ridge.layers["sd"], np.ones((ridge.n_obs, 1), dtype=np.float32)])[::-1]
    copy.write_h5ad(folder / "ridge.h5ad")
    cells = finished.cells()
    labels = cells.obs["perturbation"].astype(str)
    half_a = cells[labels.isin(ridge.obs_names).to_numpy() & ~half_b(cells.obs_names, 0, labels)]
    ad.AnnData(half_a.X, obs=half_a.obs[["perturbation"]], var=half_a.var[[]]).write_h5ad(
        folder / "cells.h5ad"
    )
    files = [known(finished, name) for name in ("mean", "kernel_ridge", "duplicate")]
    files.append(run_script(finished, "mine", folder / "ridge.h5ad", folder / "mine" / "predictions.h5ad"))
    files.append(run_script(finished, "halves", folder / "cells.h5ad", folder / "halves.h5ad"))
    split = read_split(*(finished.fold(FOLD, "pair", name) for name in ("split.tsv", "split.json")), FOLD)
    settings = EvaluationSettings(
        model="kernel_ridge", draws=100, distribution=DistributionSettings(max_cells=1000)
    )
    result = evaluate(finished.path("preprocess", "cells.h5ad"), [split], files, settings)
    return files, result.metrics.set_index(["metric", "perturbation"])


def test_a_model_under_another_name_scores_identically(scored):
    _, metrics = scored
    columns = ["fold", "seed", "category", "value"]
    mine, theirs = (metrics.loc[metrics["model"] == name, columns] for name in ("mine", "kernel_ridge"))
    # Distribution metrics of models without cells are for the model under test, among a few.
    theirs = theirs[theirs.index.isin(mine.index)]
    pd.testing.assert_frame_equal(mine, theirs)
    assert {"pearson_delta_perturbed_mean", "rank_l2", "crps"} <= set(mine.index.get_level_values("metric"))


def test_the_cells_of_half_a_score_like_the_duplicate(scored):
    _, metrics = scored
    cells, duplicate = (metrics.loc[metrics["model"] == name, "value"] for name in ("halves", "duplicate"))
    pd.testing.assert_index_equal(cells.index, duplicate.index)
    assert {"energy_distance", "variance_ratio"} <= set(cells.index.get_level_values("metric"))
    np.testing.assert_allclose(cells, duplicate, rtol=1e-3, atol=1e-4)


def test_what_is_written_is_what_every_model_writes(finished, scored):
    files, _ = scored
    original, copy = ad.read_h5ad(files[1].path), ad.read_h5ad(files[3].path)
    pd.testing.assert_frame_equal(copy.obs, original.obs)
    np.testing.assert_array_equal(copy.X, original.X)
    np.testing.assert_array_equal(copy.layers["sd"], original.layers["sd"])
    provenance = json.loads(copy.uns["provenance"])
    assert copy.uns["model"] == provenance["model"] == "mine"
    assert provenance["made_elsewhere"] is True
    assert provenance["split_sha256"] == sha256_of(finished.fold(FOLD, "pair", "split.tsv"))
    assert provenance["sha256"] == sha256_of(files[3].path.parents[1] / "ridge.h5ad")


def test_a_model_made_elsewhere_adds_jobs_of_its_own_alone(finished):
    template = "results/{dataset}/{split}/fold{fold}/ridge/seed0/embed/predictions.h5ad"
    models = [*BASELINES, *TRAINED, {"name": "mine", "predictions": template}]
    planned = finished.planned(config={"models": models, "evaluate": {"model": "mine"}})
    assert planned.pop("user_predictions") == len(FOLDS)
    assert {"evaluate", "report", "index", "provenance"} <= set(planned)
    assert not {"train", "baselines", "embed", "references", "pair", "freeze_split"} & set(planned)
