"""Stage 1: learn an embedding of cells by predicting the whole cell's tokens from a masked cell."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from biojepa.collapse import refuse_collapse, refuse_divergence, statistics, std_over_cells
from biojepa.model.blocks import evaluation
from biojepa.model.embedding import CellEmbedding
from biojepa.model.encoder import GeneExpressionEncoder
from biojepa.model.losses import SIGRegLoss, VICRegLoss
from biojepa.model.masks import gene_mask, mask_units, unit_mask
from biojepa.model.predictor import JEPAPredictor
from biojepa.model.targets import TARGETS, TargetEncoder
from biojepa.training.cells import CellStore, spread
from biojepa.training.checkpoint import Checkpoint
from biojepa.training.distributed import gather_rows, own_randomness, share_of
from biojepa.training.gene_modules import gene_modules
from biojepa.training.optimization import (
    Execution,
    apply_gradients,
    learning_rate,
    make_optimizer,
    progress_bar,
    seed_step,
    step_seed,
)

log = logging.getLogger(__name__)

STAGE = 1
MONITOR_CELLS = 2048
TASKS = ("masked_genes", "control_to_perturbed")
REGULARIZERS = ("per_token", "flat", "sigreg")
REGULARIZED = ("context", "prediction")
MASKINGS = ("genes", "modules")
LOG1P, RESIDUALS = "log1p", "pearson_residuals"
INPUTS = (LOG1P, RESIDUALS)


@dataclass(frozen=True)
class EncoderSettings:
    """Settings of the encoder and of its training.

    Attributes
    ----------
    input
        What cells are embedded from: ``log1p`` expression, or analytic ``pearson_residuals`` of its counts,
        whose gene proportions are those of training cells. What is predicted is log1p expression in any case.
    hidden, num_tokens, embed_dim, depth, heads, dropout
        Size of :class:`GeneExpressionEncoder`.
    predictor_width, predictor_depth
        Size of the predictor that stage 1 discards.
    steps, batch_size, learning_rate, weight_decay
        Of the training.
    accumulate
        Micro-batches that a batch is split into, to save memory. Variance and covariance are those of a
        micro-batch, so the step is not that of an undivided batch; the prediction error is.
    task
        ``masked_genes`` predicts a whole cell from a masked one; ``control_to_perturbed``, the textbook
        form, predicts a random cell of a perturbation from a random control cell and the perturbation.
    masking
        ``genes``, each hidden on its own, or ``modules`` of genes that vary together.
    modules
        Number of gene modules.
    mask_low, mask_high
        Share of genes hidden from the context.
    invariance, variance, covariance
        Weights of VICReg.
    regularizer
        ``per_token``, or ``flat`` for the form that a collapsed encoder can satisfy, or ``sigreg``.
    regularized
        ``context``, which carries gradient to the encoder, or ``prediction`` for the textbook form of
        prediction and target.
    sigreg
        Weight of SIGReg, the prediction error weighing the rest to 1.
    target
        What encodes the target: ``ema`` teacher, the same encoder (``shared_stop_gradient``, ``shared``),
        or one of its own (``separate``). It is what is kept.
    ema
        Initial momentum of the teacher.
    action_weight
        Weight of the action-recovery term: the perturbation must be readable from a masked cell's
        tokens relative to those of controls, or the encoder may drop it for what is easier to predict.
        Of ``masked_genes`` alone.
    monitor_every, checkpoint_every
        Steps between measurements of collapse, and between checkpoints.
    """

    input: str = LOG1P
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
    accumulate: int = 1
    learning_rate: float = 2e-3
    weight_decay: float = 0.02
    task: str = "masked_genes"
    masking: str = "genes"
    modules: int = 50
    mask_low: float = 0.3
    mask_high: float = 0.6
    invariance: float = 25.0
    variance: float = 25.0
    covariance: float = 1.0
    regularizer: str = "per_token"
    regularized: str = "context"
    sigreg: float = 0.05
    target: str = "ema"
    ema: float = 0.996
    action_weight: float = 0.3
    monitor_every: int = 100
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        choices = {
            "input": INPUTS,
            "task": TASKS,
            "masking": MASKINGS,
            "regularizer": REGULARIZERS,
            "regularized": REGULARIZED,
            "target": TARGETS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"encoder.{name} is {getattr(self, name)!r}; expected one of {', '.join(allowed)}"
                )

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


class EncoderObjective:
    """The networks that stage 1 trains, and their loss at a step.

    Parameters
    ----------
    store, embedding, cells, classes, settings, seed
        See :func:`train_encoder`.
    execution
        Precision and compilation.
    """

    def __init__(
        self,
        store: CellStore,
        embedding: CellEmbedding,
        cells: Tensor,
        classes: Tensor,
        settings: EncoderSettings,
        seed: int,
        execution: Execution,
    ) -> None:
        self.store, self.embedding, self.classes = store, embedding, classes
        self.settings, self.seed, self.execution = settings, seed, execution
        device = store.device
        torch.manual_seed(seed)
        self.student = embedding.body
        self.target = TargetEncoder(self.student, settings.target, settings.ema)
        self.predictor = JEPAPredictor(
            settings.num_tokens,
            settings.embed_dim,
            settings.predictor_width,
            settings.predictor_depth,
            settings.heads,
        ).to(device)
        self.n_classes = int(classes.max()) + 1 if len(classes) else 0
        self.action = nn.Linear(settings.embed_dim * settings.num_tokens, max(self.n_classes, 1)).to(device)
        self.networks: dict[str, nn.Module] = {
            "student": self.student,
            "target": self.target,
            "predictor": self.predictor,
            "action": self.action,
        }
        self.cells, self.controls = cells, None
        self.told: nn.Embedding | None = None
        if settings.task == "control_to_perturbed":
            self.cells, self.controls = cells[classes[cells] >= 0], cells[classes[cells] < 0]
            # One vector for a perturbation, added to every token: what cross-attention to it would add.
            self.told = nn.Embedding(max(self.n_classes, 1), settings.embed_dim).to(device)
            self.networks["told"] = self.told
        self.criterion = _criterion(settings).to(device)
        self.modules = self._modules(cells) if settings.masking == "modules" else None
        self._units = None if self.modules is None else mask_units(self.modules)
        self.monitored = spread(cells, MONITOR_CELLS)
        self.batch_size = min(settings.batch_size, len(self.cells))
        self.micro_batch = self.batch_size // settings.accumulate
        if self.micro_batch < 2:
            raise ValueError(
                f"a batch of {self.batch_size} cells in {settings.accumulate} micro-batches leaves "
                f"{self.micro_batch} cells in each; expected at least 2"
            )
        self.share = share_of(self.micro_batch, "train.encoder.batch_size")
        own = len(range(*self.share.indices(self.micro_batch)))
        example = torch.zeros(own, store.n_genes, device=device), torch.zeros(own, device=device)
        self.encode = execution.compiled(self.student, *example)
        self.encode_target = (
            self.target if self.target.own is None else execution.compiled(self.target, *example)
        )
        self._measured: list[dict[str, Tensor]] = []

    def losses(self, step: int) -> Iterator[Tensor]:
        """Loss of each micro-batch of a step, divided by their number, so that gradients add up."""
        self._prefetch(step + 1)
        seed_step(self.seed, STAGE, step)
        device = self.store.device
        chosen = self.cells[torch.randint(len(self.cells), (self.batch_size,), device=device)]
        seen = chosen
        if self.controls is not None:
            seen = self.controls[torch.randint(len(self.controls), (self.batch_size,), device=device)]
        # Of the whole batch, in every process, so that the masks do not depend on how it is shared.
        hidden = None if self.controls is not None else self._mask(len(chosen))
        self._measured = []
        for part in range(self.settings.accumulate):
            rows = slice(part * self.micro_batch, (part + 1) * self.micro_batch)
            loss, parts = self._loss(
                chosen[rows], seen[rows], None if hidden is None else hidden[rows], (step, part)
            )
            self._measured.append({"loss": loss.detach(), **parts})
            yield loss if self.settings.accumulate == 1 else loss / self.settings.accumulate

    def _prefetch(self, step: int) -> None:
        """Name the cells of a later step to a store that copies them meanwhile."""
        if self.store.layout != "host" or step >= self.settings.steps:
            return
        # What the step itself will draw first.
        generator = torch.Generator(self.store.device).manual_seed(step_seed(self.seed, STAGE, step))
        place = torch.randint(
            len(self.cells), (self.batch_size,), device=self.store.device, generator=generator
        )
        for part, own in enumerate(self.cells[place].split(self.micro_batch)[: self.settings.accumulate]):
            self.store.prefetch(own[self.share], (step, part))

    def last(self) -> dict[str, float]:
        """Loss and its parts at the last step, means over the micro-batches."""
        names = self._measured[0]
        return {k: float(sum(part[k] for part in self._measured) / len(self._measured)) for k in names}

    def measure(self) -> dict[str, float]:
        """Collapse statistics of what would be kept now, and the spread of the student where that differs."""
        tokens = embed_with(self.target.encoder, self.embedding, self.store, self.monitored)
        measured = statistics(tokens, self.classes[self.monitored])
        if self.target.encoder is not self.student:
            trained = embed_with(self.student, self.embedding, self.store, self.monitored)
            measured["std_cells_student"] = std_over_cells(trained)
        return measured

    def keep(self) -> None:
        """Leave in the embedding what encodes targets, frozen."""
        if self.target.encoder is not self.student:
            self.student.load_state_dict(self.target.encoder.state_dict())
        self.student.requires_grad_(False).eval()

    def _mask(self, cells: int) -> Tensor:
        low, high, device = self.settings.mask_low, self.settings.mask_high, self.store.device
        if self._units is None:
            return gene_mask(cells, self.store.n_genes, low, high, device)
        return unit_mask(cells, *self._units, low, high)

    @torch.no_grad()
    def _modules(self, cells: Tensor) -> Tensor:
        few = spread(cells, MONITOR_CELLS)
        x, _ = self.embedding.inputs(self.store.rows(few), self.store.log_library[few])
        return gene_modules(x, self.settings.modules, self.seed)

    def _loss(
        self, chosen: Tensor, seen: Tensor, hidden: Tensor | None, number: tuple[int, int]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a micro-batch (B,) of target cells and the cells that the context is made of.

        ``number`` is that of the step, and of the micro-batch in it.
        """
        own = chosen[self.share]
        x, library = self.embedding.inputs(self.store.rows(own, number), self.store.log_library[own])
        if hidden is not None:
            shown = ~hidden[self.share]
            # Like dropout: what is left is scaled up, so that the first layer sees the same total.
            share = (shown.sum(dim=1, keepdim=True) / x.shape[1]).clamp(min=1 / x.shape[1])
            # A product, because filling where a mask says so is four times slower on a CPU.
            visible, visible_library = x * shown / share, library
        else:
            control = seen[self.share]
            visible, visible_library = self.embedding.inputs(
                self.store.rows(control), self.store.log_library[control]
            )
        with own_randomness(number[1]), self.execution.autocast(self.store.device):
            target = self.encode_target(x, library)
            context = self.encode(visible, visible_library)
            asked = context if self.told is None else context + self.told(self.classes[own])[:, None]
            predicted = self.predictor(asked.float())
        # Losses are taken in float32, and of the whole micro-batch in every process.
        predicted, target, context = (gather_rows(z.float()) for z in (predicted, target, context))
        loss, parts = self.criterion(predicted, target, *self._regularized(predicted, target, context))
        # A control says nothing of a perturbation, so the textbook task has no such term.
        if self.settings.action_weight and self.n_classes > 1 and self.told is None:
            loss = loss + self.settings.action_weight * _action_loss(context, self.classes[seen], self.action)
        return loss, parts

    def _regularized(self, predicted: Tensor, target: Tensor, context: Tensor) -> tuple[Tensor, ...]:
        first = context if self.settings.regularized == "context" else predicted
        # A target without gradient is regularized in the textbook form alone, where it trains nothing.
        both = target.requires_grad or self.settings.regularized == "prediction"
        return (first, target) if both else (first,)


def train_encoder(
    store: CellStore,
    embedding: CellEmbedding,
    cells: Tensor,
    classes: Tensor,
    settings: EncoderSettings,
    seed: int,
    checkpoint: Checkpoint,
    execution: Execution | None = None,
) -> list[dict[str, float]]:
    """Train ``embedding.body`` in place; at the end it holds what encoded the targets.

    By default that is the teacher, the running average. Under torchrun the processes share each batch.

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
    execution
        Precision, compilation, tracker; float32 and nothing else when absent.

    Returns
    -------
    Rows of the history: step, loss and its parts, and the collapse statistics.

    Raises
    ------
    CollapseError
        When the embedding has collapsed at a measurement in the second half of the training.
    """
    execution = execution or Execution()
    objective = EncoderObjective(store, embedding, cells, classes, settings, seed, execution)
    optimizer = make_optimizer(objective.networks.values(), settings.weight_decay)
    history: list[dict[str, float]] = []
    start = 0
    if state := checkpoint.load():
        for name, module in objective.networks.items():
            module.load_state_dict(state[name])
        optimizer.load_state_dict(state["optimizer"])
        start, history, untrained = state["step"], state["history"], state["untrained"]
    else:
        untrained = objective.measure()

    progress = progress_bar("encoder", start, settings.steps)
    for step in progress:
        rate = learning_rate(step, settings.steps, settings.learning_rate)
        apply_gradients(optimizer, objective.losses(step), rate)
        objective.target.update(step, settings.steps)

        done = step + 1
        if done % settings.monitor_every == 0 or done == settings.steps:
            # In every process, so that a collapse stops all of them at the same step.
            refuse_divergence(objective.last()["loss"], done, "encoder")
            measured = objective.measure()
            history.append({"step": done, **objective.last(), **measured})
            execution.tracker.add("encoder", history[-1])
            progress.set_postfix(loss=f"{history[-1]['loss']:.2f}", rank=f"{measured['rankme']:.0f}")
            if done * 2 > settings.steps:
                refuse_collapse(measured, untrained, done)
        if done % settings.checkpoint_every == 0 or done == settings.steps:
            states = {name: module.state_dict() for name, module in objective.networks.items()}
            checkpoint.save(
                done, optimizer=optimizer.state_dict(), history=history, untrained=untrained, **states
            )
    objective.keep()
    return history


def _criterion(settings: EncoderSettings) -> nn.Module:
    if settings.regularizer == "sigreg":
        return SIGRegLoss(settings.sigreg)
    return VICRegLoss(
        settings.invariance, settings.variance, settings.covariance, flatten=settings.regularizer == "flat"
    )


def _action_loss(context: Tensor, classes: Tensor, action: nn.Linear) -> Tensor:
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
    # Weights instead of selections, whose shapes a GPU would have to tell first. Without a control, all.
    weight = torch.where(is_control.any(), is_control, True).to(z.dtype)
    reference = weight @ z / weight.sum()
    # Without a perturbed cell in the batch the sum over none is zero, and so is its gradient.
    loss = F.cross_entropy(action(z - reference), classes, ignore_index=-1, reduction="sum")
    return loss / (~is_control).sum().clamp(min=1)


@torch.no_grad()
def embed_with(encoder: nn.Module, embedding: CellEmbedding, store: CellStore, cells: Tensor) -> Tensor:
    """Tokens (cells, T, D) that an encoder gives to cells, without dropout, in float32."""
    with evaluation(encoder):
        parts = [encoder(*embedding.inputs(store.rows(c), store.log_library[c])) for c in cells.split(1024)]
    return torch.cat(parts)
