"""The training loop one would write first, to measure the pipeline's own against.

A ``Dataset`` whose ``__getitem__`` makes one sparse row dense, a ``DataLoader`` with workers, single
precision, ``torch.optim.AdamW`` as it comes, a loop over parameters for the running average, and a
``loss.item()`` in every step. Networks, losses, schedule and batch are those of the pipeline, so that only
the loop differs; :func:`encoder_step` and :func:`predictor_step` are that loop's step.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler

from biojepa.model.biojepa import BioJEPA
from biojepa.model.embedding import CellEmbedding
from biojepa.model.predictor import JEPAPredictor
from biojepa.model.targets import ema_momentum, while_young
from biojepa.pairs import CONTROL_CODE, Pairs
from biojepa.training.encoder_stage import EncoderSettings
from biojepa.training.optimization import learning_rate
from biojepa.training.predictor_stage import PredictorSettings


class MaskedCells(Dataset):
    """One training cell at a time: standardized expression, the same with masked genes, library, class.

    Parameters
    ----------
    pairs
        A fold.
    embedding
        Whose standardization of the inputs is applied.
    cells, classes
        (N,) training cells, and (cells of the fold,) training perturbation of each cell, -1 for control.
    settings
        Shares of genes to mask.
    """

    def __init__(
        self,
        pairs: Pairs,
        embedding: CellEmbedding,
        cells: np.ndarray,
        classes: np.ndarray,
        settings: EncoderSettings,
    ) -> None:
        shape = (len(pairs.indptr) - 1, len(pairs.genes))
        self.matrix = sparse.csr_matrix((pairs.data, pairs.indices, pairs.indptr), shape=shape)
        self.mean, self.scale = embedding.gene_mean.cpu(), embedding.gene_scale.cpu()
        self.library_mean, self.library_scale = embedding.library.cpu()
        self.log_library = torch.from_numpy(pairs.log_library_size)
        self.cells, self.classes = cells, classes
        self.low, self.high = settings.mask_low, settings.mask_high

    def __len__(self) -> int:
        return len(self.cells)

    def __getitem__(self, item: int) -> tuple[Tensor, Tensor, Tensor, int]:
        cell = self.cells[item]
        x = torch.from_numpy(self.matrix[cell].toarray()[0])
        x = ((x - self.mean) / self.scale).clamp(-10, 10)
        share = self.low + (self.high - self.low) * torch.rand(1)
        hidden = torch.rand(len(x)) < share
        shown = (~hidden).float().mean().clamp(min=1 / len(x))
        visible = x.masked_fill(hidden, 0) / shown
        library = (self.log_library[cell] - self.library_mean) / self.library_scale
        return x, visible, library, int(self.classes[cell])


class CellPopulations(Dataset):
    """One pair of populations at a time: mean tokens of cells of a label and of controls of their batches.

    Parameters
    ----------
    pairs
        A fold that holds out no context.
    tokens
        (cells, T, D) frozen embedding.
    labels
        (n,) positions of the training labels.
    settings
        Size of a population.
    """

    def __init__(self, pairs: Pairs, tokens: Tensor, labels: np.ndarray, settings: PredictorSettings) -> None:
        self.tokens, self.labels, self.size = tokens.cpu(), labels, settings.population
        self.cells_of = {label: np.flatnonzero(pairs.perturbation == label) for label in labels}
        self.batch = pairs.batch
        control = pairs.perturbation == CONTROL_CODE
        everywhere = np.flatnonzero(control)
        self.controls_of = {}
        for batch in np.unique(pairs.batch):
            own = np.flatnonzero(control & (pairs.batch == batch))
            self.controls_of[int(batch)] = own if len(own) else everywhere

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, item: int) -> tuple[int, Tensor, Tensor]:
        label = self.labels[item]
        own = self.cells_of[label]
        cells = [own[int(torch.randint(len(own), (1,)))] for _ in range(self.size)]
        controls = []
        for cell in cells:
            candidates = self.controls_of[int(self.batch[cell])]
            controls.append(candidates[int(torch.randint(len(candidates), (1,)))])
        return int(label), self.tokens[controls].mean(dim=0), self.tokens[cells].mean(dim=0)


def batches(dataset: Dataset, batch_size: int, workers: int) -> Iterator[list[Tensor]]:
    """Yield batches without end, drawn with replacement, by a ``DataLoader`` with ``workers`` processes."""
    sampler = RandomSampler(dataset, replacement=True, num_samples=10**9)  # type: ignore[arg-type]
    return iter(DataLoader(dataset, batch_size, sampler=sampler, num_workers=workers))


@dataclass
class EncoderNetworks:
    """What the encoder stage trains, as modules of its own.

    Attributes
    ----------
    student, teacher, predictor, action, criterion
        As in :class:`~biojepa.training.encoder_stage.EncoderObjective`.
    """

    student: nn.Module
    teacher: nn.Module
    predictor: JEPAPredictor
    action: nn.Linear
    criterion: nn.Module

    def trained(self) -> list[nn.Parameter]:
        """Parameters that the optimizer moves."""
        parts = (self.student, self.predictor, self.action)
        return [p for part in parts for p in part.parameters()]


def adamw(parameters: Iterable[nn.Parameter], weight_decay: float) -> torch.optim.AdamW:
    """AdamW that decays matrices alone, with the implementation that torch chooses."""
    decayed, spared = [], []
    for p in parameters:
        (decayed if p.ndim == 2 and min(p.shape) > 1 else spared).append(p)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95))


def encoder_step(
    networks: EncoderNetworks,
    optimizer: torch.optim.Optimizer,
    batch: Iterable[Tensor],
    step: int,
    settings: EncoderSettings,
) -> float:
    """Take one step of the encoder stage; return its loss.

    Parameters
    ----------
    batch
        x (B, genes), visible (B, genes), standardized library (B,), class (B,), on any device.
    """
    device = next(networks.student.parameters()).device
    x, visible, library, classes = (part.to(device) for part in batch)
    optimizer.zero_grad()
    with torch.no_grad():
        target = networks.teacher(x, library)
    context = networks.student(visible, library)
    loss, _ = networks.criterion(networks.predictor(context), target, context)
    perturbed = classes >= 0
    if settings.action_weight and perturbed.any() and networks.action.out_features > 1:
        z = context.flatten(1)
        reference = z[~perturbed].mean(dim=0) if (~perturbed).any() else z.mean(dim=0)
        named = networks.action(z[perturbed] - reference)
        loss = loss + settings.action_weight * nn.functional.cross_entropy(named, classes[perturbed])
    loss.backward()
    _finish(optimizer, networks.trained(), learning_rate(step, settings.steps, settings.learning_rate))
    _average(networks.teacher, networks.student, ema_momentum(step, settings.steps, settings.ema))
    return loss.item()


def predictor_step(
    model: BioJEPA,
    teacher: BioJEPA,
    optimizer: torch.optim.Optimizer,
    batch: Iterable[Tensor],
    membership: Tensor,
    baseline: Tensor,
    step: int,
    settings: PredictorSettings,
) -> float:
    """Take one step of the predictor stage; return its loss.

    Parameters
    ----------
    batch
        Label (B,), mean tokens of controls (B, T, D), mean tokens of the perturbed cells (B, T, D).
    membership, baseline
        (labels, genes) multi-hot code, and (labels, T, D) what the linear branch says of the change.
    """
    device = membership.device
    label, control, perturbed = (part.to(device) for part in batch)
    optimizer.zero_grad()
    change = model.change(control, membership[label])
    loss = (control + baseline[label] + change - perturbed).square().mean()
    loss.backward()
    rate = learning_rate(step, settings.steps, settings.learning_rate)
    _finish(optimizer, list(model.parameters()), rate)
    _average(teacher, model, while_young(step, settings.ema))
    return loss.item()


def teacher_of(module: nn.Module) -> nn.Module:
    """Copy a module that receives no gradient and uses no dropout."""
    return copy.deepcopy(module).requires_grad_(False).eval()


def _finish(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], rate: float) -> None:
    nn.utils.clip_grad_norm_(parameters, 1.0)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()


@torch.no_grad()
def _average(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    for old, new in zip(teacher.parameters(), student.parameters(), strict=True):
        old.mul_(decay).add_(new, alpha=1 - decay)
