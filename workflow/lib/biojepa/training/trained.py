"""A trained model: what it holds, what it predicts, how it is written and read."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from biojepa.errors import InputError
from biojepa.files import atomic_path
from biojepa.linear_branch import LinearBranch, Uncertainty
from biojepa.model.biojepa import BioJEPA, BioJEPAConfig
from biojepa.model.embedding import CellEmbedding, PCAProjection, PearsonResiduals
from biojepa.pairs import multi_hot
from biojepa.readout import Readout
from biojepa.training.encoder_stage import RESIDUALS
from biojepa.training.settings import TrainSettings

FORMAT_VERSION = 3
PCA_TOKENS = (8, 8)


@dataclass
class TrainedModel:
    """A trained model, ready to embed cells and to predict perturbations.

    Attributes
    ----------
    settings, facts
        What made it; ``facts`` are those of ``pairs.h5``.
    genes
        Genes of the expression that it reads and predicts.
    embedding, predictor, readout
        The frozen embedding, the latent predictor, and expression from tokens.
    control_tokens
        (T, D) mean of all controls.
    control_expression
        (genes,) mean log-expression of all controls.
    labels, sets
        Of the fold.
    perturbed_genes
        Genes that can be asked for: those that have a code.
    types, type_code, dose
        Types of perturbation, and type and dose of each label.
    branch
        The linear branch, or ``None`` where the latent predictor stands alone.
    weight
        The gate of the latent prediction, or its scale where it stands alone.
    scale
        Factor of the whole predicted change, which validation perturbations set; 1 where the latent
        predictor stands alone, whose weight is its scale.
    blended
        Whether the latent prediction takes the place of that share of the linear branch, instead of
        being added to it.
    """

    settings: TrainSettings
    facts: dict[str, Any]
    genes: tuple[str, ...]
    embedding: CellEmbedding
    predictor: BioJEPA
    readout: Readout
    control_tokens: Tensor
    control_expression: Tensor
    labels: tuple[str, ...]
    sets: tuple[str, ...]
    perturbed_genes: tuple[str, ...]
    types: tuple[str, ...]
    type_code: np.ndarray
    dose: np.ndarray
    branch: LinearBranch | None
    weight: float
    scale: float = 1.0
    blended: bool = False

    @property
    def codes(self) -> dict[str, Tensor]:
        """Prior codes of the perturbed genes, source name to (perturbed genes, dim)."""
        perturbation = self.predictor.perturbation
        return {name: perturbation.codes(name) for name in perturbation.sources}

    @torch.no_grad()
    def encode(self, expression: np.ndarray, log_library: np.ndarray, block: int = 2048) -> np.ndarray:
        """Embed cells.

        Parameters
        ----------
        expression
            (cells, genes) log1p of counts per target sum, columns as ``genes``.
        log_library
            (cells,) natural log of the library size.
        block
            Cells embedded at a time.

        Returns
        -------
        (cells, T, D) standardized tokens, float32.

        Raises
        ------
        ValueError
            When the shapes do not fit the model or each other.
        """
        if expression.ndim != 2 or expression.shape[1] != len(self.genes):
            raise ValueError(f"expression has shape {expression.shape}; expected (any, {len(self.genes)})")
        if log_library.shape != expression.shape[:1]:
            raise ValueError(f"log_library has shape {log_library.shape}; expected {expression.shape[:1]}")
        parts = [
            self.embedding(self._tensor(expression[i : i + block]), self._tensor(log_library[i : i + block]))
            for i in range(0, len(expression), block)
        ]
        empty = self.control_tokens.new_zeros(0, *self.control_tokens.shape)
        return torch.cat([empty, *parts]).cpu().numpy()

    def embed(self, expression: np.ndarray, log_library: np.ndarray, block: int = 2048) -> np.ndarray:
        """Mean of the tokens of :meth:`encode`, (cells, D)."""
        return self.encode(expression, log_library, block).mean(axis=1)

    def predict(self, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
        """Predict labels of the fold, given by their positions; see :meth:`predict_membership`."""
        return self.predict_membership(*self.asked(labels))

    def asked(self, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Multi-hot codes, types and doses of labels of the fold, given by their positions."""
        labels = np.asarray(labels, dtype=np.int64)
        names = [self.labels[label] for label in labels]
        return multi_hot(names, self.perturbed_genes), self.type_code[labels], self.dose[labels]

    @torch.no_grad()
    def predict_membership(
        self, membership: np.ndarray, type_code: np.ndarray | None = None, dose: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
        """Predict any combination of the genes that have a code.

        Parameters
        ----------
        membership
            (n, perturbed genes) multi-hot; all zero is control.
        type_code, dose
            (n,) type and dose; those most common among the labels where ``None``. The latent predictor
            knows them, the linear branch does not.

        Returns
        -------
        expression
            (n, genes) mean log-expression.
        sd
            (n, genes) its uncertainty, or ``None``.
        tokens
            (n, T, D) predicted standardized tokens.

        Raises
        ------
        ValueError
            When ``membership`` has another shape.
        """
        self._require_membership(membership)
        moved, sd = self.weight * self._token_change(membership, type_code, dose), None
        if self.branch is not None:
            codes = self._plain_codes()
            linear = self._tensor(self.branch.token_change(membership, codes)).view_as(moved)
            moved = moved + self._linear_weight * linear
            sd = (self.scale * self._uncertainty.standard_deviation(membership)).astype(np.float32)
        expression = self.control_expression + self._tensor(self.change(membership, type_code, dose))
        tokens = self.control_tokens + self.scale * moved
        # A mean of log1p values cannot be negative.
        return expression.clamp(min=0).cpu().numpy(), sd, tokens.cpu().numpy()

    def change(
        self, membership: np.ndarray, type_code: np.ndarray | None = None, dose: np.ndarray | None = None
    ) -> np.ndarray:
        """Change of expression (n, genes) that the whole model says; parameters as above."""
        self._require_membership(membership)
        linear = self._linear_weight * self.linear_change(membership)
        return self.scale * (linear + self.weight * self.latent_change(membership, type_code, dose))

    @property
    def _linear_weight(self) -> float:
        return 1 - self.weight if self.blended else 1.0

    def linear_change(self, membership: np.ndarray) -> np.ndarray:
        """Change of expression (n, genes) that the linear branch alone says; zero without one."""
        if self.branch is None:
            return np.zeros((len(membership), len(self.genes)))
        weight = self.readout.weight.double().cpu().numpy()
        return self.branch.change(membership, self._plain_codes(), weight)

    def latent_change(
        self, membership: np.ndarray, type_code: np.ndarray | None = None, dose: np.ndarray | None = None
    ) -> np.ndarray:
        """Change of expression (n, genes) that the latent predictor alone says, unweighted."""
        return self.readout.change(self._token_change(membership, type_code, dose)).cpu().numpy()

    @torch.no_grad()
    def _token_change(
        self, membership: np.ndarray, type_code: np.ndarray | None, dose: np.ndarray | None
    ) -> Tensor:
        n = len(membership)
        kinds = np.full(n, np.bincount(self.type_code).argmax()) if type_code is None else type_code
        doses = np.full(n, np.median(self.dose)) if dose is None else dose
        device = self.control_tokens.device
        return self.predictor.eval().change(
            self.control_tokens.expand(n, -1, -1),
            self._tensor(membership),
            torch.as_tensor(kinds, dtype=torch.int64, device=device),
            self._tensor(doses),
        )

    def _require_membership(self, membership: np.ndarray) -> None:
        if membership.ndim != 2 or membership.shape[1] != len(self.perturbed_genes):
            raise ValueError(
                f"membership has shape {membership.shape}; expected (any, {len(self.perturbed_genes)}), "
                "one column per perturbed gene"
            )

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.as_tensor(values, dtype=torch.float32, device=self.control_tokens.device)

    @cached_property
    def _uncertainty(self) -> Uncertainty:
        assert self.branch is not None
        return self.branch.uncertainty(self._plain_codes())

    def _plain_codes(self) -> dict[str, np.ndarray]:
        return {name: values.cpu().numpy() for name, values in self.codes.items()}

    def save(self, path: str | Path) -> None:
        """Write weights, arrays and the settings that made them; tensors and plain values only."""
        content = {
            "format_version": FORMAT_VERSION,
            "settings": asdict(self.settings) | {"encoder": _plain(asdict(self.settings.encoder))},
            "facts": self.facts,
            "genes": list(self.genes),
            "labels": list(self.labels),
            "sets": list(self.sets),
            "perturbed_genes": list(self.perturbed_genes),
            "types": list(self.types),
            "type_code": torch.from_numpy(self.type_code),
            "dose": torch.from_numpy(self.dose),
            "sources": self.codes,
            "seen": self.predictor.perturbation.seen,
            "embedding": self.embedding.state_dict(),
            "predictor": self.predictor.state_dict(),
            "readout": {"weight": self.readout.weight, "bias": self.readout.bias},
            "control_tokens": self.control_tokens,
            "control_expression": self.control_expression,
            "branch": None if self.branch is None else _tensors(self.branch.state()),
            "weight": self.weight,
            "scale": self.scale,
            "blended": self.blended,
        }
        with atomic_path(path) as temporary:
            torch.save(content, temporary)


def _tensors(content: Any) -> Any:
    """Turn arrays into tensors at every depth: files hold no pickled object."""
    if isinstance(content, dict):
        return {key: _tensors(value) for key, value in content.items()}
    return torch.from_numpy(content) if isinstance(content, np.ndarray) else content


def _arrays(content: Any) -> Any:
    """Turn tensors back into arrays."""
    if isinstance(content, dict):
        return {key: _arrays(value) for key, value in content.items()}
    return content.cpu().numpy() if isinstance(content, Tensor) else content


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
    predictor = make_predictor(
        settings,
        embedding,
        content["sources"],
        content["seen"],
        len(content["types"]),
        bool((content["dose"] != 1).any()),
    ).to(device)
    predictor.load_state_dict(content["predictor"])
    return TrainedModel(
        settings=settings,
        facts=content["facts"],
        genes=tuple(content["genes"]),
        embedding=embedding.requires_grad_(False).eval(),
        predictor=predictor.requires_grad_(False).eval(),
        readout=Readout(**content["readout"]),
        control_tokens=content["control_tokens"],
        control_expression=content["control_expression"],
        labels=tuple(content["labels"]),
        sets=tuple(content["sets"]),
        perturbed_genes=tuple(content["perturbed_genes"]),
        types=tuple(content["types"]),
        type_code=content["type_code"].cpu().numpy(),
        dose=content["dose"].cpu().numpy(),
        branch=None if content["branch"] is None else LinearBranch(**_arrays(content["branch"])),
        weight=content["weight"],
        scale=content["scale"],
        blended=content["blended"],
    )


def make_embedding(settings: TrainSettings, n_genes: int) -> CellEmbedding:
    """Make the embedding of the settings, not yet fitted."""
    residuals = PearsonResiduals(n_genes) if settings.encoder.input == RESIDUALS else None
    if settings.embedding == "pca":
        return CellEmbedding(PCAProjection(n_genes, *PCA_TOKENS), residuals)
    return CellEmbedding(settings.encoder.build(n_genes), residuals)


def make_predictor(
    settings: TrainSettings,
    embedding: CellEmbedding,
    codes: Mapping[str, Tensor],
    seen: Tensor,
    n_types: int = 1,
    dosed: bool = False,
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
    return BioJEPA(embedding.num_tokens, embedding.dim, codes, seen, config, n_types, dosed)
