"""What to train: the section ``train`` of the config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from biojepa.sizes import SIZES, with_named_sizes
from biojepa.training.encoder_stage import EncoderSettings
from biojepa.training.optimization import PRECISIONS
from biojepa.training.predictor_stage import PredictorSettings

EMBEDDINGS = ("jepa", "pca", "untrained")
PRIORS = ("given", "shuffled", "none")
STAGES = ("two", "joint")


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
    latent_share
        Weight of the linear branch's view from the embedding against its view from expression.
    priors
        ``given``, ``shuffled`` among the genes, or ``none``.
    model
        ``small`` or ``reference``: sizes of encoder and predictor that :meth:`from_config` fills in where
        no key gives them. Made in another way, settings have the sizes of their parts.
    stages
        ``two``, the encoder and then the predictor with the encoder frozen, or ``joint``.
    joint_weight
        Weight of the prediction error of populations in joint training.
    encoder, predictor
        Of the two stages.
    device
        ``auto``, ``cpu`` or ``cuda``.
    processes
        Processes that share the batches of the encoder, one for each GPU.
    precision
        ``auto`` (bfloat16 on a GPU, and on a CPU with AMX where ``embed_dim`` is at least 128; else
        float32), ``float32`` or ``bfloat16``: of matrix products in training. Weights, losses and
        statistics are float32 in any case.
    compile
        Whether ``torch.compile`` compiles the encoder.
    deterministic
        Whether to use deterministic algorithms only: slower on a GPU, the same on a CPU.
    tensorboard
        Whether to write curves for TensorBoard too.
    torch_threads
        CPU threads. Part of the settings because sums depend on it in the last digit.
    """

    embedding: str = "jepa"
    linear_branch: bool = True
    latent_share: float = 0.5
    priors: str = "given"
    model: str = "small"
    stages: str = "two"
    joint_weight: float = 1.0
    encoder: EncoderSettings = field(default_factory=EncoderSettings)
    predictor: PredictorSettings = field(default_factory=PredictorSettings)
    device: str = "auto"
    processes: int = 1
    precision: str = "auto"
    compile: bool = False
    deterministic: bool = False
    tensorboard: bool = False
    torch_threads: int = 2

    def __post_init__(self) -> None:
        choices = {
            "embedding": EMBEDDINGS,
            "priors": PRIORS,
            "model": tuple(SIZES),
            "stages": STAGES,
            "precision": PRECISIONS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {allowed}")
        if not 0 <= self.latent_share <= 1:
            raise ValueError(f"latent_share is {self.latent_share}; expected 0 to 1")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> TrainSettings:
        """Build from nested mappings, as the config and a checkpoint give them.

        Sizes that are not given are those that ``model`` names.
        """
        parts = with_named_sizes(config)
        encoder = dict(parts.pop("encoder", {}))
        if "hidden" in encoder:
            encoder["hidden"] = tuple(encoder["hidden"])
        predictor = PredictorSettings(**parts.pop("predictor", {}))
        return cls(encoder=EncoderSettings(**encoder), predictor=predictor, **parts)
