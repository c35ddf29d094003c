"""What to train: the section ``train`` of the config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from biojepa.training.encoder_stage import EncoderSettings
from biojepa.training.predictor_stage import PredictorSettings

EMBEDDINGS = ("jepa", "pca", "untrained")
PRIORS = ("given", "shuffled", "none")


@dataclass(frozen=True)
class TrainSettings:
    """What to train.

    Attributes
    ----------
    embedding
        ``jepa``, ``pca`` (64 components of the training cells) or ``untrained`` (the encoder as
        initialized).
    linear_branch
        Whether the latent predictor adds to an additive kernel ridge, gated on validation
        perturbations, or stands alone.
    priors
        ``given``, ``shuffled`` among the genes, or ``none``.
    encoder, predictor
        Of the two stages.
    device
        ``auto``, ``cpu`` or ``cuda``.
    torch_threads
        CPU threads. Part of the settings because sums depend on it in the last digit.
    """

    embedding: str = "jepa"
    linear_branch: bool = True
    priors: str = "given"
    encoder: EncoderSettings = field(default_factory=EncoderSettings)
    predictor: PredictorSettings = field(default_factory=PredictorSettings)
    device: str = "auto"
    torch_threads: int = 2

    def __post_init__(self) -> None:
        if self.embedding not in EMBEDDINGS:
            raise ValueError(f"embedding is {self.embedding!r}; expected one of {EMBEDDINGS}")
        if self.priors not in PRIORS:
            raise ValueError(f"priors is {self.priors!r}; expected one of {PRIORS}")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> TrainSettings:
        """Build from nested mappings, as the config and a checkpoint give them."""
        parts = dict(config)
        encoder = dict(parts.pop("encoder", {}))
        if "hidden" in encoder:
            encoder["hidden"] = tuple(encoder["hidden"])
        predictor = PredictorSettings(**parts.pop("predictor", {}))
        return cls(encoder=EncoderSettings(**encoder), predictor=predictor, **parts)
