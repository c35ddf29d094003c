"""What the names of models mean, without importing torch: the workflow reads this before any job."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from biojepa.contracts import SIMPLE_MODELS

# The three questions of the ablation, in the order of its table.
HEADS = ("full", "ridge", "knn", "predictor")
PRIOR_SUFFIXES = {"given": "", "none": "_noprior", "shuffled": "_shuffled"}
# Embedding to the trained model that holds it.
EMBEDDING_SOURCES = {"pca": "pca_predictor", "untrained": "untrained_predictor", "biojepa": "biojepa"}


@dataclass(frozen=True)
class AblationModel:
    """One cell of the ablation: a frozen embedding, a head on top of it, and the priors that the head gets.

    Attributes
    ----------
    embedding
        ``pca``, ``untrained`` or ``biojepa``.
    head
        ``ridge``, ``knn`` or ``predictor``: what predicts the change of the tokens; ``full`` is all that
        the default configuration puts on its embedding, and is always given the priors.
    priors
        ``given``, ``none`` or ``shuffled`` among the genes.
    """

    embedding: str
    head: str
    priors: str

    @property
    def name(self) -> str:
        """Value of the wildcard ``{model}``."""
        if self.head == "full":
            return self.embedding
        return f"{self.embedding}_{self.head}{PRIOR_SUFFIXES[self.priors]}"

    @property
    def source(self) -> str:
        """Trained model that holds the embedding."""
        return EMBEDDING_SOURCES[self.embedding]


ABLATION_MODELS = {
    model.name: model
    for model in (
        AblationModel(embedding, head, priors)
        for head in HEADS
        for priors in PRIOR_SUFFIXES
        for embedding in EMBEDDING_SOURCES
        if head != "full" or priors == "given"
    )
}
# Ridge and nearest neighbours are fitted together; the others are trained, below.
HEAD_MODELS = {name: model for name, model in ABLATION_MODELS.items() if model.head in ("ridge", "knn")}

# Departures from the section `train` of the config; `encoder_of` names the model whose encoder is reused.
LATENT_MODELS: dict[str, dict[str, Any]] = {
    "biojepa": {},
    "biojepa_predictor": {"linear_branch": False, "encoder_of": "biojepa"},
    "biojepa_predictor_noprior": {"linear_branch": False, "priors": "none", "encoder_of": "biojepa"},
    "biojepa_predictor_shuffled": {"linear_branch": False, "priors": "shuffled", "encoder_of": "biojepa"},
    "shuffled_priors": {"priors": "shuffled", "encoder_of": "biojepa"},
    "pca": {"embedding": "pca", "encoder_of": "pca_predictor"},
    "pca_predictor": {"embedding": "pca", "linear_branch": False},
    "pca_predictor_noprior": {
        "embedding": "pca", "linear_branch": False, "priors": "none", "encoder_of": "pca_predictor",
    },
    "pca_predictor_shuffled": {
        "embedding": "pca", "linear_branch": False, "priors": "shuffled", "encoder_of": "pca_predictor",
    },
    "untrained": {"embedding": "untrained", "encoder_of": "untrained_predictor"},
    "untrained_predictor": {"embedding": "untrained", "linear_branch": False},
    "untrained_predictor_noprior": {
        "embedding": "untrained", "linear_branch": False, "priors": "none",
        "encoder_of": "untrained_predictor",
    },
    "untrained_predictor_shuffled": {
        "embedding": "untrained", "linear_branch": False, "priors": "shuffled",
        "encoder_of": "untrained_predictor",
    },
    "biojepa_flat": {"encoder": {"regularizer": "flat"}},
}  # fmt: skip
ORACLES = {"biojepa": "oracle", "pca_predictor": "oracle_pca"}
REFERENCES = ("duplicate", "interpolated_duplicate")


def is_baseline(model: str) -> bool:
    """Whether the model is a simple one, fitted without a learned embedding."""
    return model in SIMPLE_MODELS


def is_head(model: str) -> bool:
    """Whether the model is a ridge or nearest neighbours on the embedding of a trained one."""
    return model in HEAD_MODELS


def known_models() -> list[str]:
    """Names that the config may list under ``models``."""
    return [*SIMPLE_MODELS, *LATENT_MODELS, *HEAD_MODELS]


def reserved_names() -> set[str]:
    """Names that predictions made elsewhere cannot have: models and references, and ``pair``, a folder."""
    return {*known_models(), *REFERENCES, *ORACLES.values(), "pair"}


def encoder_source(model: str) -> str | None:
    """Name of the model whose trained encoder this one reuses, or ``None``."""
    if is_head(model):
        return HEAD_MODELS[model].source
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
