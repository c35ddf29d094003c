"""A small additive network on mean changes: the baseline ``mlp``.

It asks whether depth alone, given the same codes and means as the linear models, predicts better.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from biojepa.optimizers import FusedAdamW

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NetworkSettings:
    """Fixed in advance for every dataset, so that nothing is tuned on what is held out.

    Attributes
    ----------
    hidden
        Units of the one hidden layer.
    components
        Leading directions of the training changes that are predicted, at most.
    steps
        Steps over all training perturbations, at most.
    learning_rate
        Of Adam.
    offset_penalty
        On the mean squared length of the genes' own offsets, in units of that of the training changes.
    evaluate_every
        Steps between looks at the validation perturbations.
    patience
        Looks without gain before training stops.
    steps_without_validation
        Steps where no validation perturbation says when to stop.
    """

    hidden: int = 64
    components: int = 32
    steps: int = 600
    learning_rate: float = 3e-3
    offset_penalty: float = 0.3
    evaluate_every: int = 10
    patience: int = 10
    steps_without_validation: int = 100


def fit_additive_network(
    membership: np.ndarray,
    codes: Mapping[str, np.ndarray],
    train: np.ndarray,
    delta: np.ndarray,
    validation: np.ndarray,
    validation_delta: np.ndarray,
    seed: int = 0,
    settings: NetworkSettings | None = None,
) -> np.ndarray:
    """Fit Δ of a label as the sum over its genes of f(codes of the gene) + offset of the gene.

    f has one hidden layer and is shared by all genes; the offset is the gene's own and stays 0 for a gene
    that no training label perturbs. Both end in the leading principal directions of the training changes,
    uncentred, so that control is 0 and combinations are sums. Validation labels say when to stop and
    teach nothing.

    Parameters
    ----------
    membership
        ``(labels, genes)`` multi-hot code of the perturbed genes.
    codes
        Source name to ``(genes, dim)``. Without any, f is a constant, and the offsets are all there is.
    train, delta
        ``(n,)`` positions of the training labels and ``(n, outputs)`` their Δ.
    validation, validation_delta
        The same of the validation labels; may be empty.
    seed
        Of the weights at the start.

    Returns
    -------
    Δ ``(labels, outputs)`` of all labels, float64. Independent of the threads that torch was given.
    """
    settings = settings or NetworkSettings()
    # Labels are fewer than outputs: their products give the directions faster than the changes themselves.
    variances, directions = np.linalg.eigh(delta @ delta.T)
    leading = np.argsort(-variances)[: settings.components]
    leading = leading[variances[leading] > 1e-12 * max(variances[-1], 1e-300)]
    basis = directions[:, leading].T @ delta / np.sqrt(variances[leading])[:, None]
    size = max(np.sqrt((delta**2).sum(axis=1).mean()), 1e-12)
    features = np.zeros((membership.shape[1], 1))
    if codes:
        features = np.hstack(list(codes.values())) / np.sqrt(len(codes))
    targets, n_genes = delta @ basis.T / size, membership[train].sum(axis=1)
    # Of least squares; where all labels are singles it is the mean, so that stopping at once predicts that.
    common = n_genes @ targets / max(n_genes @ n_genes, 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums depend on the number of threads in the last digit
    try:
        model = _Network(features, common, settings.hidden, seed)
        model.learn(
            membership[train],
            targets,
            membership[validation],
            validation_delta @ basis.T / size,
            settings,
        )
        with torch.no_grad():
            of_genes = model.of_genes().numpy()
    finally:
        torch.set_num_threads(threads)
    return membership @ of_genes @ basis * size


class _Network:
    """Effects of genes in the leading directions, ``(genes, outputs)``.

    Parameters
    ----------
    features
        ``(genes, dim)``
    common
        ``(outputs,)`` effect of every gene at the start.
    hidden, seed
        Units of the hidden layer, and the seed of its first weights.
    """

    def __init__(self, features: np.ndarray, common: np.ndarray, hidden: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        dim = features.shape[1]
        # The first layer begins as torch.nn.Linear does, the last one at what all genes have in common.
        first = rng.uniform(-1, 1, (dim + 1, hidden)) / np.sqrt(dim)
        last = np.vstack([np.zeros((hidden, len(common))), common])
        values = (first, last, np.zeros((len(features), len(common))))
        self.features = torch.tensor(features, dtype=torch.float64)
        self.weights = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in values]

    def of_genes(self) -> torch.Tensor:
        """Effect of every gene."""
        first, last, offsets = self.weights
        hidden = torch.nn.functional.gelu(self.features @ first[:-1] + first[-1])
        return hidden @ last[:-1] + last[-1] + offsets

    def learn(
        self,
        membership: np.ndarray,
        targets: np.ndarray,
        validation_membership: np.ndarray,
        validation_targets: np.ndarray,
        settings: NetworkSettings,
    ) -> None:
        """Descend on the training labels; keep the weights that were best on the validation labels."""
        codes, wanted = torch.tensor(membership), torch.tensor(targets)
        held_codes, held = torch.tensor(validation_membership), torch.tensor(validation_targets)
        group = {"params": self.weights, "lr": settings.learning_rate, "weight_decay": 0.0}
        optimizer = FusedAdamW([group], betas=(0.9, 0.999))  # without decay, that is Adam

        def step() -> None:
            loss = ((codes @ self.of_genes() - wanted) ** 2).sum(dim=1).mean()
            loss = loss + settings.offset_penalty * (self.weights[2] ** 2).sum(dim=1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        if not len(held):
            for _ in range(settings.steps_without_validation):
                step()
            log.info("mlp: %d steps, with no validation perturbation", settings.steps_without_validation)
            return
        best, kept, taken, waited = np.inf, self._copies(), 0, 0
        for done in range(settings.steps + 1):
            if done % settings.evaluate_every == 0:
                with torch.no_grad():
                    error = float(((held_codes @ self.of_genes() - held) ** 2).sum(dim=1).mean())
                waited += 1
                if error < best:
                    best, kept, taken, waited = error, self._copies(), done, 0
                if waited >= settings.patience:
                    break
            step()
        log.info("mlp: %d steps until the validation perturbations were predicted best", taken)
        with torch.no_grad():
            for weight, value in zip(self.weights, kept, strict=True):
                weight.copy_(value)

    def _copies(self) -> list[torch.Tensor]:
        return [weight.detach().clone() for weight in self.weights]
