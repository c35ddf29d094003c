"""A joint-embedding predictive architecture for any data that its encoder takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from biojepa.model.blocks import evaluation, require_dtype, require_shape
from biojepa.model.losses import VICRegLoss
from biojepa.model.targets import TargetEncoder

Inputs = Tensor | Sequence[Tensor]


class JEPA(nn.Module):
    """Predict the target's tokens from the context's (LeCun 2022; I-JEPA, Assran et al., CVPR 2023).

    Context and target may differ in two ways, alone or together:

    - *inputs*: two versions or states of a sample, such as a cell with and without masked genes, or a
      control and a perturbed cell;
    - *masks* over tokens: the context encoder sees the patches of ``context_mask``, and the predictor is
      asked for those of ``target_mask``. The encoder then takes a ``visible`` argument, and the predictor
      is a :class:`JEPAPredictor` with target queries.

    Masks are shared by a batch, so that a position means the same in every row: the regularizers compare
    rows position by position.

    Parameters
    ----------
    encoder
        Module that gives tokens (B, T, D).
    predictor
        :class:`JEPAPredictor` or :class:`ConditionalPredictor`.
    target
        Kind of :class:`TargetEncoder`.
    regularizer
        Loss of prediction, target and regularized branches, such as :class:`VICRegLoss` (the default) or
        :class:`SIGRegLoss`. The context's tokens are regularized, and the target's where they carry
        gradient.
    momentum
        Initial momentum of an ``ema`` target.
    """

    def __init__(
        self,
        encoder: nn.Module,
        predictor: nn.Module,
        target: str = "ema",
        regularizer: nn.Module | None = None,
        momentum: float = 0.996,
    ) -> None:
        super().__init__()
        self.encoder, self.predictor = encoder, predictor
        self.target = TargetEncoder(encoder, target, momentum)
        self.regularizer = VICRegLoss() if regularizer is None else regularizer

    def forward(
        self,
        context: Inputs,
        target: Inputs | None = None,
        context_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
        condition: Tensor | None = None,
        absent: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of a batch.

        Parameters
        ----------
        context
            What the encoder takes: a tensor, or several in a sequence.
        target
            Likewise; the context's when not given.
        context_mask
            (T,) bool, patches that the context encoder sees.
        target_mask
            (T,) bool, patches to predict, or (blocks, T), each block predicted by itself. All patches, from
            context tokens at all positions, when not given.
        condition, absent
            Passed on to a conditional predictor.

        Returns
        -------
        loss
            Scalar.
        parts
            Of the regularizer, detached.

        Raises
        ------
        ValueError
            When a mask has another shape or dtype, or when the context lacks positions and no target mask
            says what to predict.
        """
        tokens, positions = self._context(_sequence(context), context_mask)
        goal = self.target(*_sequence(context if target is None else target))
        regularized = [tokens, goal] if self.target.with_gradient else [tokens]
        if condition is not None:
            if target_mask is not None:
                raise ValueError("a condition and a target mask were given; expected one of them")
            predicted = self.predictor(tokens, condition, absent)
        elif target_mask is None:
            if tokens.shape[1] != goal.shape[1]:
                raise ValueError(
                    f"the context has {tokens.shape[1]} tokens, the target {goal.shape[1]}; expected a "
                    "target_mask that says which to predict"
                )
            predicted = self.predictor(tokens)
        else:
            require_shape("target_mask", target_mask, (*(None,) * (target_mask.ndim - 1), goal.shape[1]))
            require_dtype("target_mask", target_mask, torch.bool)
            if not bool(target_mask.view(-1, goal.shape[1]).any(dim=1).all()):
                raise ValueError("a block of target_mask is empty; expected at least one patch to predict")
            blocks = [block.nonzero()[:, 0] for block in target_mask.view(-1, goal.shape[1])]
            predicted = torch.cat([self.predictor(tokens, positions, block) for block in blocks], dim=1)
            goal = torch.cat([goal[:, block] for block in blocks], dim=1)
        return self.regularizer(predicted, goal, *regularized)

    def _context(self, inputs: Sequence[Tensor], mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Encode the context; tokens (B, V, D), and their positions where they are not all."""
        if mask is None:
            return self.encoder(*inputs), None
        require_shape("context_mask", mask, (None,))
        require_dtype("context_mask", mask, torch.bool)
        tokens = self.encoder(*inputs, visible=mask)
        # An encoder with mask tokens gives tokens at all positions, one that drops patches does not.
        dropped = tokens.shape[1] != len(mask)
        return tokens, mask.nonzero()[:, 0] if dropped else None

    def update(self, step: int, steps: int) -> None:
        """Let the target encoder follow, after an optimizer step."""
        self.target.update(step, steps)

    @property
    def embedder(self) -> nn.Module:
        """The encoder to keep after training: the one of the targets, which has seen whole inputs."""
        return self.target.encoder

    @torch.no_grad()
    def encode(self, *inputs: Tensor) -> Tensor:
        """Encode without gradient and without dropout, (B, T, D)."""
        with evaluation(self.embedder):
            return self.embedder(*inputs)

    def embed(self, *inputs: Tensor) -> Tensor:
        """Mean of the tokens, without gradient and without dropout, (B, D)."""
        return self.encode(*inputs).mean(dim=1)


def _sequence(inputs: Inputs) -> Sequence[Tensor]:
    return (inputs,) if isinstance(inputs, Tensor) else inputs
