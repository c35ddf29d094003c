"""Both stages at once: masked cells and perturbed populations train the encoder and the predictor."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from biojepa.collapse import refuse_collapse, refuse_divergence
from biojepa.model.biojepa import BioJEPA
from biojepa.model.embedding import CellEmbedding
from biojepa.model.targets import frozen_copy, move_average, while_young
from biojepa.training.cells import CellStore, Populations
from biojepa.training.checkpoint import Checkpoint
from biojepa.training.distributed import gather_rows, own_randomness, share_of
from biojepa.training.encoder_stage import EncoderObjective
from biojepa.training.optimization import (
    Execution,
    apply_gradients,
    learning_rate,
    make_optimizer,
    progress_bar,
)
from biojepa.training.settings import TrainSettings


def train_joint(
    store: CellStore,
    embedding: CellEmbedding,
    predictor: BioJEPA,
    populations: Populations,
    cells: Tensor,
    classes: Tensor,
    membership: Tensor,
    type_code: Tensor,
    dose: Tensor,
    train_labels: Tensor,
    settings: TrainSettings,
    seed: int,
    checkpoint: Checkpoint,
    execution: Execution | None = None,
) -> list[dict[str, float]]:
    """Train ``embedding.body`` and ``predictor`` in place, with one optimizer.

    The loss of a step is that of :func:`~biojepa.training.encoder_stage.train_encoder`, plus
    ``joint_weight`` times the squared error of the predicted mean tokens of perturbed populations. The
    student encodes the controls, and what encodes the targets of masked cells encodes the perturbed cells.
    Tokens move while both learn, so they are not standardized: leave ``token_mean`` at 0 and
    ``token_scale`` at 1, in which the predictor was trained. The steps, the learning rate and the weight
    decay are those of the encoder; batch, population and average of the weights those of the predictor.

    Parameters
    ----------
    store, embedding, cells, classes, checkpoint, execution
        See :func:`~biojepa.training.encoder_stage.train_encoder`.
    predictor
        Of the tokens of ``embedding``; at the end it holds the running average of its weights.
    populations
        Of the same fold.
    membership
        (labels, perturbed genes) multi-hot code of every label.
    type_code, dose
        (labels,) type and dose of every label.
    train_labels
        (n,) positions of the training labels.
    settings, seed
        Of the run.

    Returns
    -------
    Rows of the history, as of the encoder stage, with ``prediction``, the error of the populations.

    Raises
    ------
    CollapseError
        When the embedding has collapsed at a measurement in the second half of the training.
    """
    execution = execution or Execution()
    steps, every = settings.encoder.steps, settings.encoder.checkpoint_every
    objective = EncoderObjective(store, embedding, cells, classes, settings.encoder, seed, execution)
    average = frozen_copy(predictor)
    networks = {**objective.networks, "joint_predictor": predictor, "joint_average": average}
    optimizer = make_optimizer(networks.values(), settings.encoder.weight_decay)
    share = share_of(settings.predictor.batch_size, "train.predictor.batch_size")
    errors: list[Tensor] = []

    def losses(step: int) -> Iterator[Tensor]:
        yield from objective.losses(step)
        # On a CPU, like the codes of the labels: see BioJEPA.change.
        labels = train_labels[torch.randint(len(train_labels), (settings.predictor.batch_size,))]
        perturbed, controls = populations.draw(labels.to(store.device), settings.predictor.population)
        labels, perturbed, controls = labels[share], perturbed[share], controls[share]
        with own_randomness(settings.encoder.accumulate):
            with execution.autocast(store.device):
                z_perturbed = objective.target(*_inputs(store, embedding, perturbed)).float()
                z_control = objective.encode(*_inputs(store, embedding, controls)).float()
            # Embeddings are averaged; averaged profiles are never encoded.
            z_perturbed, z_control = _means(z_perturbed, perturbed), _means(z_control, controls)
            predicted = z_control + predictor.change(
                z_control, membership[labels], type_code[labels], dose[labels]
            )
        error = (gather_rows(predicted) - gather_rows(z_perturbed)).square().mean()
        errors[:] = [error.detach()]
        yield settings.joint_weight * error

    history: list[dict[str, float]] = []
    start = 0
    if state := checkpoint.load():
        for name, module in networks.items():
            module.load_state_dict(state[name])
        optimizer.load_state_dict(state["optimizer"])
        start, history, untrained = state["step"], state["history"], state["untrained"]
    else:
        untrained = objective.measure()

    progress = progress_bar("joint", start, steps)
    predictor.train()
    for step in progress:
        apply_gradients(optimizer, losses(step), learning_rate(step, steps, settings.encoder.learning_rate))
        objective.target.update(step, steps)
        # A young average follows closely, or a short run would keep the start.
        move_average(average, predictor, while_young(step, settings.predictor.ema))

        done = step + 1
        if done % settings.encoder.monitor_every == 0 or done == steps:
            refuse_divergence(objective.last()["loss"] + float(errors[0]), done, "encoder and predictor")
            measured = objective.measure()
            history.append({"step": done, **objective.last(), "prediction": float(errors[0]), **measured})
            execution.tracker.add("joint", history[-1])
            progress.set_postfix(loss=f"{history[-1]['loss']:.2f}", prediction=f"{float(errors[0]):.3f}")
            if done * 2 > steps:
                refuse_collapse(measured, untrained, done)
        if done % every == 0 or done == steps:
            states = {name: module.state_dict() for name, module in networks.items()}
            checkpoint.save(
                done, optimizer=optimizer.state_dict(), history=history, untrained=untrained, **states
            )
    objective.keep()
    predictor.load_state_dict(average.state_dict())
    predictor.requires_grad_(False).eval()
    return history


def _inputs(store: CellStore, embedding: CellEmbedding, cells: Tensor) -> tuple[Tensor, Tensor]:
    flat = cells.flatten()
    return embedding.inputs(store.rows(flat), store.log_library[flat])


def _means(tokens: Tensor, cells: Tensor) -> Tensor:
    """Mean tokens (B, T, D) of populations ``cells`` (B, n), from those of their cells (B · n, T, D)."""
    return tokens.view(*cells.shape, *tokens.shape[1:]).mean(dim=1)
