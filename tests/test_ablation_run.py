"""Simple heads in the chain: added to a finished run, they retrain nothing and reach the report."""

import json
import shutil

import numpy as np
import pytest

from biojepa.heads import fit_heads
from biojepa.pairs import read_pairs
from biojepa.training import load_model
from workflow_case import BASELINES, FOLDS, TRAINED, Pipeline

HEADS = ("biojepa_ridge", "pca_ridge", "biojepa_knn_shuffled")
MODELS = {"models": [*BASELINES, *TRAINED, *HEADS]}


@pytest.fixture(scope="module")
def with_heads(finished, tmp_path_factory):
    """A finished run, continued with three heads up to their predictions."""
    folder = tmp_path_factory.mktemp("ablation") / "run"
    shutil.copytree(finished.folder, folder)
    pipeline = Pipeline(finished.checkout, folder)
    wanted = [pipeline.fold(fold, HEADS[0], "seed0", "embed", "predictions.h5ad") for fold in FOLDS]
    names = [path.relative_to(folder).as_posix() for path in wanted]
    assert pipeline.planned(*names, config=MODELS) == {"heads": 2}
    answer = pipeline.run(*names, config=MODELS)
    assert answer.returncode == 0, answer.stdout
    return pipeline


@pytest.mark.parametrize("fold", FOLDS)
def test_predictions_of_heads_are_those_of_the_library_and_keep_the_contract(with_heads, fold):
    pairs = read_pairs(with_heads.fold(fold, "pair", "pairs.h5"))
    sources = {
        name: load_model(with_heads.fold(fold, name, "seed0", "train", "model.pt"))
        for name in ("biojepa", "pca_predictor")
    }
    fitted = fit_heads(sources, pairs, HEADS, neighbours=5, seed=0)
    reference = with_heads.predictions(fold, "ridge")
    for name in HEADS:
        written = with_heads.predictions(fold, name)
        assert list(written.obs_names) == list(reference.obs_names)
        assert set(written.obs["set"]) == {"val", "test"}
        np.testing.assert_array_equal(written.obs["n_cells"], reference.obs["n_cells"])
        rows = [pairs.labels.index(label) for label in written.obs_names]
        np.testing.assert_allclose(written.X, fitted[name].expression[rows], atol=1e-5)
        np.testing.assert_allclose(written.obsm["z_pred"], fitted[name].tokens[rows].mean(axis=1), atol=1e-4)
        provenance = json.loads(written.uns["provenance"])
        assert provenance["split_sha256"] == pairs.facts["split_sha256"]
        source = "pca_predictor" if name.startswith("pca") else "biojepa"
        assert (written.uns["model"], provenance["model"], provenance["embedding_of"]) == (name, name, source)


def test_more_heads_rerun_the_scores_and_no_training(with_heads):
    scored = {"evaluate": 1, "report": 1, "index": 1, "provenance": 1}
    assert with_heads.planned(config=MODELS) == scored
    neighbours = {"train": {"baselines": {"neighbours": 3}}}
    assert with_heads.planned(config={**MODELS, **neighbours}) == {"baselines": 2, "heads": 2, **scored}
