"""What the names of models mean, without importing torch: the workflow reads this before any job."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from biojepa.contracts import LINEAR_BASELINES

# Departures from the section `train` of the config; `encoder_of` names the model whose encoder is reused.
LATENT_MODELS: dict[str, dict[str, Any]] = {
    "biojepa": {},
    "biojepa_predictor": {"linear_branch": False, "encoder_of": "biojepa"},
    "biojepa_predictor_noprior": {"linear_branch": False, "priors": "none", "encoder_of": "biojepa"},
    "biojepa_predictor_shuffled": {"linear_branch": False, "priors": "shuffled", "encoder_of": "biojepa"},
    "shuffled_priors": {"priors": "shuffled", "encoder_of": "biojepa"},
    "pca_predictor": {"embedding": "pca", "linear_branch": False},
    "untrained_predictor": {"embedding": "untrained", "linear_branch": False},
    "biojepa_flat": {"encoder": {"regularizer": "flat"}},
}
ORACLES = {"biojepa": "oracle", "pca_predictor": "oracle_pca"}
REFERENCES = ("duplicate", "interpolated_duplicate")


def is_baseline(model: str) -> bool:
    """Whether the model is fitted together with the other simple ones."""
    return model in LINEAR_BASELINES


def known_models() -> list[str]:
    """Names that the config may list under ``models``."""
    return [*LINEAR_BASELINES, *LATENT_MODELS]


def encoder_source(model: str) -> str | None:
    """Name of the model whose trained encoder this one reuses, or ``None``."""
    return LATENT_MODELS[model].get("encoder_of")


def resolve_settings(model: str, train: Mapping[str, Any]) -> dict[str, Any]:
    """Merge the config's section ``train`` with what the model's name changes."""
    settings = {key: dict(value) if isinstance(value, Mapping) else value for key, value in train.items()}
    settings.pop("baselines", None)
    for key, value in LATENT_MODELS[model].items():
        if key == "encoder_of":
            continue
        settings[key] = {**settings.get(key, {}), **value} if isinstance(value, Mapping) else value
    return settings
