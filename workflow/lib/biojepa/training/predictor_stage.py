"""Stage 2: with the embedding frozen, learn how a perturbation moves the tokens of a population."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from biojepa.collapse import refuse_divergence
from biojepa.model.biojepa import BioJEPA
from biojepa.model.targets import frozen_copy, move_average, while_young
from biojepa.training.cells import Populations
from biojepa.training.checkpoint import Checkpoint
from biojepa.training.optimization import (
    Execution,
    apply_gradients,
    learning_rate,
    make_optimizer,
    progress_bar,
    seed_step,
)

STAGE = 2


@dataclass(frozen=True)
class PredictorSettings:
    """Settings of the predictor and of its training.

    Attributes
    ----------
    width, depth, heads, dropout, condition_dim, source_dropout, interaction
        Size, see :class:`~biojepa.model.BioJEPAConfig`.
    steps, batch_size, learning_rate, weight_decay
        Of the training; a batch counts populations.
    population
        Cells of a population.
    ema
        Decay of the running average of the weights, which is what is kept.
    evaluate_every, patience
        Steps between looks at the validation perturbations, and looks without gain before stopping.
    """

    width: int = 64
    depth: int = 2
    heads: int = 4
    dropout: float = 0.1
    condition_dim: int = 64
    source_dropout: float = 0.2
    interaction: bool = True
    steps: int = 400
    batch_size: int = 32
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    population: int = 32
    ema: float = 0.98
    evaluate_every: int = 50
    patience: int = 4


@dataclass(frozen=True)
class LatentCells:
    """Frozen embedding of the cells of ``pairs.h5`` and what the predictor is asked about them.

    Attributes
    ----------
    tokens
        (cells, T, D), standardized.
    membership
        (labels, genes) multi-hot.
    type_code, dose
        (labels,) type and dose of the perturbation. Like ``membership`` they stay in the memory of a CPU,
        see :meth:`BioJEPA.change`.
    baseline
        (labels, T, D) what the linear branch says of the change: leave-one-out for training labels,
        so that what is left for the predictor is what the linear branch gets wrong on new labels.
    """

    tokens: Tensor
    membership: Tensor
    type_code: Tensor
    dose: Tensor
    baseline: Tensor

    def asked(self, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Multi-hot codes, types and doses of labels (B,), as :meth:`BioJEPA.change` takes them."""
        labels = labels.to(self.membership.device)
        return self.membership[labels], self.type_code[labels], self.dose[labels]

    def population_means(self, cells: Tensor) -> Tensor:
        """Mean tokens (B, T, D) of populations ``cells`` (B, n), without a copy of their tokens."""
        return F.embedding_bag(cells, self.tokens.flatten(1), mode="mean").view(-1, *self.tokens.shape[1:])


def predictor_loss(
    model: BioJEPA,
    populations: Populations,
    latent: LatentCells,
    train: Tensor,
    settings: PredictorSettings,
    execution: Execution,
) -> Tensor:
    """Draw a batch of populations of the labels ``train`` (n,), on a CPU, and take the loss of ``model``.

    The mean squared error between predicted and observed tokens of the perturbed population.
    """
    device = latent.tokens.device
    # Drawn where their genes are looked up, so that nothing waits for a GPU.
    labels = train[torch.randint(len(train), (settings.batch_size,))]
    asked = latent.asked(labels)
    labels = labels.to(device, non_blocking=True)
    cells, controls = populations.draw(labels, settings.population)
    z_control, z_perturbed = latent.population_means(controls), latent.population_means(cells)
    with execution.autocast(device):
        change = model.change(z_control, *asked)
    return (z_control + latent.baseline[labels] + change.float() - z_perturbed).square().mean()


def train_predictor(
    model: BioJEPA,
    populations: Populations,
    latent: LatentCells,
    train: Tensor,
    validation: Tensor,
    observed: Tensor,
    control: Tensor,
    settings: PredictorSettings,
    seed: int,
    checkpoint: Checkpoint,
    stop_after: int | None = None,
    execution: Execution | None = None,
) -> list[dict[str, float]]:
    """Train ``model`` in place; at the end it holds the averaged weights that predicted validation best.

    The loss is the mean squared error between predicted and observed tokens of the perturbed
    population, whose encoding is frozen: nothing can collapse here.

    Parameters
    ----------
    train, validation
        Positions of labels. Without validation labels, training runs to its end.
    observed, control
        Mean tokens of the validation labels (V, T, D) and of all controls (T, D).
    stop_after
        Steps after which to stop, of a schedule made for ``settings.steps``.
    execution
        Precision; float32 when absent.

    Returns
    -------
    Rows of the history: step, loss, val_loss, and val_loss_start, that of no change.
    """
    execution = execution or Execution()
    train = train.cpu()
    teacher = frozen_copy(model)
    optimizer = make_optimizer((model,), settings.weight_decay)
    wanted = observed - control - latent.baseline[validation]
    context = control.expand(len(validation), -1, -1)
    history: list[dict[str, float]] = []
    start, looks, best_loss = 0, 0, _change_error(teacher, context, latent.asked(validation), wanted)
    nothing = best_loss
    best = copy.deepcopy(teacher.state_dict())
    if state := checkpoint.load():
        model.load_state_dict(state["model"])
        teacher.load_state_dict(state["teacher"])
        optimizer.load_state_dict(state["optimizer"])
        best, best_loss, looks = state["best"], state["best_loss"], state["looks"]
        start, history = state["step"], state["history"]

    progress = progress_bar("predictor", start, settings.steps)
    model.train()
    for step in progress:
        if looks >= settings.patience or (stop_after is not None and step >= stop_after):
            break
        seed_step(seed, STAGE, step)
        loss = predictor_loss(model, populations, latent, train, settings, execution)
        apply_gradients(optimizer, loss, learning_rate(step, settings.steps, settings.learning_rate))
        # A young average follows closely, or it would still hold the start when training stops early.
        move_average(teacher, model, while_young(step, settings.ema))

        done = step + 1
        if done % settings.evaluate_every == 0 or done in (settings.steps, stop_after):
            value = _change_error(teacher, context, latent.asked(validation), wanted)
            refuse_divergence(float(loss.detach()), done, "predictor")
            history.append(
                {"step": done, "loss": float(loss.detach()), "val_loss": value, "val_loss_start": nothing}
            )
            progress.set_postfix(loss=f"{history[-1]['loss']:.3f}", val=f"{value:.4f}")
            if not len(validation) or value < best_loss:
                best, best_loss, looks = copy.deepcopy(teacher.state_dict()), value, 0
            else:
                looks += 1
            checkpoint.save(
                done,
                model=model.state_dict(),
                teacher=teacher.state_dict(),
                optimizer=optimizer.state_dict(),
                best=best,
                best_loss=best_loss,
                looks=looks,
                history=history,
            )
    model.load_state_dict(best)
    model.requires_grad_(False).eval()
    return history


@torch.no_grad()
def _change_error(
    model: BioJEPA, context: Tensor, asked: tuple[Tensor, Tensor, Tensor], wanted: Tensor
) -> float:
    if not len(context):
        return float("nan")
    model.eval()
    return float((model.change(context, *asked) - wanted).square().mean())
