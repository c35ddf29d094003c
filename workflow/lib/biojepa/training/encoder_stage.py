"""Stage 1: learn an embedding of cells by predicting the whole cell's tokens from a masked cell."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from biojepa.collapse import refuse_collapse, statistics
from biojepa.model.embedding import CellEmbedding
from biojepa.model.encoder import GeneExpressionEncoder
from biojepa.model.losses import VICRegLoss
from biojepa.model.masks import gene_mask
from biojepa.model.predictor import JEPAPredictor
from biojepa.training.cells import CellStore, spread
from biojepa.training.checkpoint import Checkpoint
from biojepa.training.optimization import (
    apply_gradients,
    ema_decay,
    frozen_copy,
    learning_rate,
    make_optimizer,
    move_average,
    progress_bar,
    seed_step,
)

log = logging.getLogger(__name__)

STAGE = 1
MONITOR_CELLS = 2048


@dataclass(frozen=True)
class EncoderSettings:
    """Settings of the encoder and of its training.

    Attributes
    ----------
    hidden, num_tokens, embed_dim, depth, heads, dropout
        Size of :class:`GeneExpressionEncoder`.
    predictor_width, predictor_depth
        Size of the predictor that stage 1 discards.
    steps, batch_size, learning_rate, weight_decay
        Of the training.
    mask_low, mask_high
        Share of genes hidden from the context.
    variance, covariance, invariance
        Weights of VICReg.
    regularizer
        ``per_token``, or ``flat`` for the form that a collapsed encoder can satisfy.
    ema
        Initial momentum of the teacher.
    action_weight
        Weight of the action-recovery term: the perturbation must be readable from a masked cell's
        tokens relative to those of controls, or the encoder may drop it for what is easier to predict.
    monitor_every, checkpoint_every
        Steps between measurements of collapse, and between checkpoints.
    """

    hidden: tuple[int, ...] = (512,)
    num_tokens: int = 8
    embed_dim: int = 64
    depth: int = 1
    heads: int = 4
    dropout: float = 0.1
    predictor_width: int = 64
    predictor_depth: int = 1
    steps: int = 500
    batch_size: int = 128
    learning_rate: float = 2e-3
    weight_decay: float = 0.02
    mask_low: float = 0.3
    mask_high: float = 0.6
    invariance: float = 25.0
    variance: float = 25.0
    covariance: float = 1.0
    regularizer: str = "per_token"
    ema: float = 0.996
    action_weight: float = 3.0
    monitor_every: int = 100
    checkpoint_every: int = 500

    def build(self, n_genes: int) -> GeneExpressionEncoder:
        """Make the encoder."""
        return GeneExpressionEncoder(
            n_genes,
            tuple(self.hidden),
            self.num_tokens,
            self.embed_dim,
            self.depth,
            self.heads,
            dropout=self.dropout,
            library_token=True,
        )


def train_encoder(
    store: CellStore,
    embedding: CellEmbedding,
    cells: torch.Tensor,
    classes: torch.Tensor,
    settings: EncoderSettings,
    seed: int,
    checkpoint: Checkpoint,
) -> list[dict[str, float]]:
    """Train ``embedding.body`` in place; at the end it holds the teacher, the running average.

    Parameters
    ----------
    store
        Expression of all cells of ``pairs.h5``.
    embedding
        With the standardization of its inputs fitted.
    cells
        (N,) training cells: controls and training perturbations.
    classes
        (cells of the store,) training perturbation of each cell, -1 for control.
    settings, seed, checkpoint
        Of the run.

    Returns
    -------
    Rows of the history: step, loss and its parts, learning rate, and the collapse statistics.

    Raises
    ------
    CollapseError
        When the embedding has collapsed at a measurement in the second half of the training.
    """
    device = store.device
    torch.manual_seed(seed)
    student = embedding.body
    teacher = frozen_copy(student)
    predictor = JEPAPredictor(
        settings.num_tokens,
        settings.embed_dim,
        settings.predictor_width,
        settings.predictor_depth,
        settings.heads,
    ).to(device)
    n_classes = int(classes.max()) + 1 if len(classes) else 0
    action = nn.Linear(settings.embed_dim * settings.num_tokens, max(n_classes, 1)).to(device)
    criterion = VICRegLoss(
        settings.invariance, settings.variance, settings.covariance, flatten=settings.regularizer == "flat"
    )
    modules = {"student": student, "teacher": teacher, "predictor": predictor, "action": action}
    optimizer = make_optimizer((student, predictor, action), settings.weight_decay)
    batch_size = min(settings.batch_size, len(cells))
    monitored = spread(cells, MONITOR_CELLS)
    history: list[dict[str, float]] = []
    start = 0
    if state := checkpoint.load():
        for name, module in modules.items():
            module.load_state_dict(state[name])
        optimizer.load_state_dict(state["optimizer"])
        start, history = state["step"], state["history"]

    progress = progress_bar("encoder", start, settings.steps)
    for step in progress:
        seed_step(seed, STAGE, step)
        chosen = cells[torch.randint(len(cells), (batch_size,), device=device)]
        x, library = embedding.inputs(store.rows(chosen), store.log_library[chosen])
        hidden = gene_mask(len(x), x.shape[1], settings.mask_low, settings.mask_high, device)
        # Like dropout: what is left is scaled up, so that the first layer sees the same total.
        shown = (~hidden).float().mean(dim=1, keepdim=True).clamp(min=1 / x.shape[1])
        visible = x.masked_fill(hidden, 0) / shown
        with torch.no_grad():
            target = teacher(x, library)
        context = student(visible, library)
        loss, parts = criterion(predictor(context), target, context)
        if settings.action_weight and n_classes > 1:
            loss = loss + settings.action_weight * _action_loss(context, classes[chosen], action)
        apply_gradients(optimizer, loss, learning_rate(step, settings.steps, settings.learning_rate))
        move_average(teacher, student, ema_decay(step, settings.steps, settings.ema))

        done = step + 1
        if done % settings.monitor_every == 0 or done == settings.steps:
            measured = statistics(_tokens(teacher, embedding, store, monitored), classes[monitored])
            history.append(
                {
                    "step": done,
                    "loss": float(loss.detach()),
                    **{k: float(v) for k, v in parts.items()},
                    **measured,
                }
            )
            progress.set_postfix(loss=f"{history[-1]['loss']:.2f}", rank=f"{measured['rankme']:.0f}")
            if done * 2 > settings.steps:
                refuse_collapse(measured, done)
        if done % settings.checkpoint_every == 0 or done == settings.steps:
            states = {name: module.state_dict() for name, module in modules.items()}
            checkpoint.save(done, optimizer=optimizer.state_dict(), history=history, **states)
    student.load_state_dict(teacher.state_dict())
    student.requires_grad_(False).eval()
    return history


def _action_loss(context: torch.Tensor, classes: torch.Tensor, action: nn.Linear) -> torch.Tensor:
    """Cross-entropy of naming the training perturbation from z(cell) - mean z(controls of the batch).

    Parameters
    ----------
    context
        (B, T, D) tokens of the masked cells: the term costs no further pass through the encoder.
    classes
        (B,) training perturbation, -1 for control.
    """
    is_control = classes < 0
    z = context.flatten(1)
    reference = z[is_control].mean(dim=0) if is_control.any() else z.mean(dim=0)
    # Without a perturbed cell in the batch the sum over none is zero, and so is its gradient.
    loss = F.cross_entropy(action(z[~is_control] - reference), classes[~is_control], reduction="sum")
    return loss / max(int((~is_control).sum()), 1)


@torch.no_grad()
def _tokens(
    teacher: nn.Module, embedding: CellEmbedding, store: CellStore, cells: torch.Tensor
) -> torch.Tensor:
    parts = [teacher(*embedding.inputs(store.rows(c), store.log_library[c])) for c in cells.split(1024)]
    return torch.cat(parts)
