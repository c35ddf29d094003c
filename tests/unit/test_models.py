"""What the names of models mean to the workflow."""

import subprocess
import sys

import pytest

from biojepa.contracts import POSITIVE_CONTROLS, SIMPLE_MODELS
from biojepa.models import (
    ABLATION_MODELS,
    LATENT_MODELS,
    ORACLES,
    REFERENCES,
    encoder_source,
    is_baseline,
    is_head,
    known_models,
    resolve_settings,
)
from biojepa.training import TrainSettings

TRAIN = {
    "embedding": "jepa",
    "linear_branch": True,
    "priors": "given",
    "encoder": {"regularizer": "per_token", "steps": 7},
    "predictor": {"steps": 5},
    "device": "cpu",
    "torch_threads": 1,
    "baselines": {"neighbours": 3, "seed": 0},
}


@pytest.mark.parametrize(
    ("model", "embedding", "linear_branch", "priors", "regularizer"),
    [
        ("biojepa", "jepa", True, "given", "per_token"),
        ("biojepa_predictor", "jepa", False, "given", "per_token"),
        ("biojepa_predictor_noprior", "jepa", False, "none", "per_token"),
        ("biojepa_predictor_shuffled", "jepa", False, "shuffled", "per_token"),
        ("shuffled_priors", "jepa", True, "shuffled", "per_token"),
        ("pca_predictor", "pca", False, "given", "per_token"),
        ("pca_predictor_noprior", "pca", False, "none", "per_token"),
        ("pca_predictor_shuffled", "pca", False, "shuffled", "per_token"),
        ("untrained_predictor", "untrained", False, "given", "per_token"),
        ("untrained_predictor_noprior", "untrained", False, "none", "per_token"),
        ("untrained_predictor_shuffled", "untrained", False, "shuffled", "per_token"),
        ("biojepa_flat", "jepa", True, "given", "flat"),
    ],
)
def test_a_name_changes_what_it_says_and_nothing_else(model, embedding, linear_branch, priors, regularizer):
    settings = TrainSettings.from_config(resolve_settings(model, TRAIN))
    assert (settings.embedding, settings.linear_branch, settings.priors) == (embedding, linear_branch, priors)
    assert settings.encoder.regularizer == regularizer
    assert (settings.encoder.steps, settings.predictor.steps, settings.device) == (7, 5, "cpu")
    assert TRAIN["encoder"] == {"regularizer": "per_token", "steps": 7}, "the config itself must not change"


def test_settings_of_baselines_do_not_reach_trained_models():
    # Otherwise a change of knn's neighbours would retrain everything.
    assert "baselines" not in resolve_settings("biojepa", TRAIN)


def test_every_model_is_a_baseline_or_a_simple_head_or_trained():
    kinds = {model: (is_baseline(model), is_head(model)) for model in known_models()}
    assert [model for model, kind in kinds.items() if kind == (True, False)] == list(SIMPLE_MODELS)
    trained = [model for model, kind in kinds.items() if kind == (False, False)]
    assert trained == list(LATENT_MODELS)
    assert len(known_models()) == len(kinds), "a name is listed twice"
    for model in trained:
        # A model whose encoder is reused trains its own.
        source = encoder_source(model)
        assert source is None or encoder_source(source) is None
    assert set(ORACLES) < set(trained)
    assert {*ORACLES.values(), *REFERENCES} == set(POSITIVE_CONTROLS)


def test_the_ablation_has_its_30_names_and_each_uses_one_embedding():
    sources = {"pca": "pca_predictor", "untrained": "untrained_predictor", "biojepa": "biojepa"}
    expected = {
        f"{embedding}_{head}{suffix}": source
        for embedding, source in sources.items()
        for head in ("ridge", "knn", "predictor")
        for suffix in ("", "_noprior", "_shuffled")
    }
    expected |= {"biojepa": "biojepa", "pca": "pca_predictor", "untrained": "untrained_predictor"}
    assert len(expected) == 30
    assert set(ABLATION_MODELS) == set(expected) <= set(known_models())
    for name, source in expected.items():
        assert is_head(name) == ("_ridge" in name or "_knn" in name)
        assert encoder_source(name) == (None if name == source else source)
        model = ABLATION_MODELS[name]
        if not is_head(name):
            settings = TrainSettings.from_config(resolve_settings(name, TRAIN))
            assert settings.embedding == model.embedding.replace("biojepa", "jepa")
            assert (settings.priors, settings.linear_branch) == (model.priors, model.head == "full")


def test_reading_the_names_imports_neither_torch_nor_scanpy():
    # The workflow reads them before every job.
    code = (
        "import sys, biojepa.models, biojepa.config; print({'torch', 'scanpy', 'anndata'} & set(sys.modules))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout.strip() == "set()"
