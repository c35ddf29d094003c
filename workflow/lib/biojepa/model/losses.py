"""Losses of a joint embedding: predict the target, and do not collapse."""

from __future__ import annotations

import torch
from torch import Tensor, nn

EPSILON = 1e-4


class VICRegLoss(nn.Module):
    """Variance-invariance-covariance regularization (Bardes, Ponce & LeCun, ICLR 2022).

    total = λ · inv + μ · var + ν · cov, with

    - inv: mean squared error of prediction and target;
    - var: mean over dimensions of max(0, γ - sqrt(variance over cells + 1e-4));
    - cov: sum of the squared off-diagonal covariances over cells, divided by the dimension.

    var and cov are taken **per token position across cells**, and then averaged over positions. With
    ``flatten=True`` cells and positions are pooled first, the form found in public code. Keep it for
    demonstration only: an encoder that maps every cell to the same distinct tokens satisfies it.

    Parameters
    ----------
    invariance, variance, covariance
        λ, μ, ν.
    gamma
        Standard deviation that the hinge asks for.
    flatten
        Pool cells and positions.
    """

    def __init__(
        self,
        invariance: float = 25.0,
        variance: float = 25.0,
        covariance: float = 1.0,
        gamma: float = 1.0,
        flatten: bool = False,
    ) -> None:
        super().__init__()
        self.invariance, self.variance, self.covariance = invariance, variance, covariance
        self.gamma, self.flatten = gamma, flatten

    def forward(
        self, predicted: Tensor, target: Tensor, *regularized: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss.

        Parameters
        ----------
        predicted, target
            (B, T, D), compared by the invariance term.
        regularized
            Branches whose variance and covariance are added up, each (B, T, D); prediction and target
            when none is given. A branch under a stop-gradient would train nothing.

        Returns
        -------
        total
            Scalar.
        parts
            ``inv``, ``var``, ``cov`` before weighting, detached.
        """
        if predicted.shape != target.shape:
            raise ValueError(f"predicted has shape {tuple(predicted.shape)}, target {tuple(target.shape)}")
        inv = (predicted - target).square().mean()
        branches = [self._spread(z) for z in (regularized or (predicted, target))]
        var = torch.stack([v for v, _ in branches]).sum()
        cov = torch.stack([c for _, c in branches]).sum()
        total = self.invariance * inv + self.variance * var + self.covariance * cov
        return total, {"inv": inv.detach(), "var": var.detach(), "cov": cov.detach()}

    def _spread(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Variance and covariance terms of one branch (B, T, D)."""
        z = z.reshape(1, -1, z.shape[-1]) if self.flatten else z.transpose(0, 1)
        _, N, D = z.shape
        if N < 2:
            raise ValueError(f"variance over {N} cell(s) is not defined; use a larger batch")
        z = z - z.mean(dim=1, keepdim=True)
        deviation = torch.sqrt(z.square().sum(dim=1) / (N - 1) + EPSILON)
        covariance = z.transpose(1, 2) @ z / (N - 1)
        # The sum of all squares less the diagonal's: no mask of size (T, D, D).
        diagonal = covariance.diagonal(dim1=1, dim2=2).square().sum(dim=1)
        off_diagonal = (covariance.square().sum(dim=(1, 2)) - diagonal) / D
        return torch.relu(self.gamma - deviation).mean(), off_diagonal.mean()
