"""A trained model: what it holds, what it predicts, how it is written and read."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from biojepa.errors import InputError
from biojepa.files import atomic_path
from biojepa.model.biojepa import BioJEPA, BioJEPAConfig
from biojepa.model.embedding import CellEmbedding, PCAProjection
from biojepa.readout import Readout
from biojepa.training.settings import TrainSettings

FORMAT_VERSION = 1
PCA_TOKENS = (8, 8)


@dataclass
class TrainedModel:
    """A trained model, ready to embed cells and to predict perturbations.

    Attributes
    ----------
    settings, facts
        What made it; ``facts`` are those of ``pairs.h5``.
    embedding, predictor, readout
        The frozen embedding, the latent predictor, and expression from tokens.
    control_tokens
        (T, D) mean of all controls.
    control_expression
        (genes,) mean log-expression of all controls.
    membership, labels, sets
        Of all labels of the fold.
    linear_expression, linear_tokens, linear_sd
        What the linear branch says of each label: (labels, genes), (labels, T, D), (labels, genes);
        ``None`` without a linear branch.
    weight
        The gate of the latent prediction, or its scale where it stands alone.
    """

    settings: TrainSettings
    facts: dict[str, Any]
    genes: tuple[str, ...]
    embedding: CellEmbedding
    predictor: BioJEPA
    readout: Readout
    control_tokens: Tensor
    control_expression: Tensor
    membership: Tensor
    labels: tuple[str, ...]
    sets: tuple[str, ...]
    linear_expression: Tensor | None
    linear_tokens: Tensor | None
    linear_sd: Tensor | None
    weight: float

    @torch.no_grad()
    def predict(self, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
        """Predict labels of the fold.

        Returns
        -------
        expression
            (len(labels), genes) mean log-expression.
        sd
            (len(labels), genes) its uncertainty, or ``None``.
        tokens
            (len(labels), T, D) predicted standardized tokens.
        """
        index = torch.as_tensor(labels, device=self.control_tokens.device)
        context = self.control_tokens.expand(len(index), -1, -1)
        change = self.weight * self._token_change(index)
        expression, tokens, sd = self.control_expression + self.readout.change(change), context + change, None
        if (
            self.linear_expression is not None
            and self.linear_tokens is not None
            and self.linear_sd is not None
        ):
            expression = expression + self.linear_expression[index]
            tokens = tokens + self.linear_tokens[index]
            sd = self.linear_sd[index].cpu().numpy()
        # A mean of log1p values cannot be negative.
        return expression.clamp(min=0).cpu().numpy(), sd, tokens.cpu().numpy()

    def latent_change(self, labels: np.ndarray) -> Tensor:
        """Change of expression (len(labels), genes) that the latent predictor alone says, unweighted."""
        index = torch.as_tensor(labels, device=self.control_tokens.device)
        return self.readout.change(self._token_change(index))

    @torch.no_grad()
    def _token_change(self, index: Tensor) -> Tensor:
        context = self.control_tokens.expand(len(index), -1, -1)
        return self.predictor.eval().change(context, self.membership[index])

    def save(self, path: str | Path) -> None:
        """Write weights, arrays and the settings that made them; tensors and plain values only."""
        content = {
            "format_version": FORMAT_VERSION,
            "settings": asdict(self.settings) | {"encoder": _plain(asdict(self.settings.encoder))},
            "facts": self.facts,
            "genes": list(self.genes),
            "labels": list(self.labels),
            "sets": list(self.sets),
            "sources": self._codes,
            "seen": self.predictor.perturbation.seen,
            "embedding": self.embedding.state_dict(),
            "predictor": self.predictor.state_dict(),
            "readout": {"weight": self.readout.weight, "bias": self.readout.bias},
            "arrays": {name: getattr(self, name) for name in _ARRAYS},
            "weight": self.weight,
        }
        with atomic_path(path) as temporary:
            torch.save(content, temporary)

    @property
    def _codes(self) -> dict[str, Tensor]:
        perturbation = self.predictor.perturbation
        return {name: perturbation.get_buffer(f"codes_{name}") for name in perturbation.sources}


_ARRAYS = (
    "control_tokens",
    "control_expression",
    "membership",
    "linear_expression",
    "linear_tokens",
    "linear_sd",
)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def load_model(path: str | Path, device: str = "cpu") -> TrainedModel:
    """Read ``model.pt``.

    Raises
    ------
    InputError
        When the file is not a model of this version.
    """
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise InputError(
            path,
            f"a file that torch cannot read ({type(error).__name__})",
            "a model.pt",
            "rerun the train stage",
        ) from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise InputError(path, f"format version {version}", str(FORMAT_VERSION), "rerun the train stage")
    settings = TrainSettings.from_config(content["settings"])
    embedding = make_embedding(settings, len(content["genes"])).to(device)
    embedding.load_state_dict(content["embedding"])
    predictor = make_predictor(settings, embedding, content["sources"], content["seen"]).to(device)
    predictor.load_state_dict(content["predictor"])
    return TrainedModel(
        settings=settings,
        facts=content["facts"],
        genes=tuple(content["genes"]),
        embedding=embedding.requires_grad_(False).eval(),
        predictor=predictor.requires_grad_(False).eval(),
        readout=Readout(**content["readout"]),
        labels=tuple(content["labels"]),
        sets=tuple(content["sets"]),
        weight=content["weight"],
        **content["arrays"],
    )


def make_embedding(settings: TrainSettings, n_genes: int) -> CellEmbedding:
    """Make the embedding of the settings, not yet fitted."""
    if settings.embedding == "pca":
        return CellEmbedding(PCAProjection(n_genes, *PCA_TOKENS))
    return CellEmbedding(settings.encoder.build(n_genes))


def make_predictor(
    settings: TrainSettings, embedding: CellEmbedding, codes: Mapping[str, Tensor], seen: Tensor
) -> BioJEPA:
    """Make the latent predictor of the settings, not yet trained."""
    p = settings.predictor
    # Beside the linear branch no gene has a learned token: the predictor is trained on leave-one-out
    # residuals, where a token would learn a gene's whole effect, and add it again to a linear branch
    # that has seen the gene.
    config = BioJEPAConfig(
        p.width,
        p.depth,
        p.heads,
        p.dropout,
        p.condition_dim,
        p.source_dropout,
        learned_genes=not settings.linear_branch,
        interaction=p.interaction,
    )
    return BioJEPA(embedding.num_tokens, embedding.dim, codes, seen, config)
