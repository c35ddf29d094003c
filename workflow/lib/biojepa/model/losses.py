"""Losses of a joint embedding: predict the target, and do not collapse."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

EPSILON = 1e-4


def _compared(predicted: Tensor, target: Tensor, branches: tuple[Tensor, ...]) -> list[Tensor]:
    """Check shapes and dtypes; at least single precision, because statistics of bfloat16 are coarse."""
    for name, z in (("predicted", predicted), ("target", target), *(("regularized", z) for z in branches)):
        if not z.is_floating_point():
            raise ValueError(f"{name} has dtype {z.dtype}; expected a floating dtype such as torch.float32")
        if z.ndim != 3:
            raise ValueError(f"{name} has shape {tuple(z.shape)}; expected (cells, tokens, dim)")
    if predicted.shape != target.shape:
        raise ValueError(f"predicted has shape {tuple(predicted.shape)}, target {tuple(target.shape)}")
    half = (torch.float16, torch.bfloat16)
    return [z.float() if z.dtype in half else z for z in (predicted, target, *branches)]


class VICRegLoss(nn.Module):
    """Variance-invariance-covariance regularization (Bardes, Ponce & LeCun, ICLR 2022).

    total = λ · inv + μ · var + ν · cov, with

    - inv: mean squared error of prediction and target;
    - var: mean over dimensions of max(0, γ - sqrt(variance over cells + 1e-4));
    - cov: sum of the squared off-diagonal covariances over cells, divided by the dimension.

    var and cov are taken **per token position across cells**, and then averaged over positions. With
    ``flatten=True`` cells and positions are pooled first, the form found in public code. Keep it for
    demonstration only: an encoder that maps every cell to the same distinct tokens satisfies it.

    A sample covariance of N cells in D dimensions scatters: on independent standard normal dimensions cov
    is about (D - 1) / (N - 1), its floor. A warning says so, once, when a batch is smaller than D.

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
        self._warned = False

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

        Raises
        ------
        ValueError
            When shapes or dtypes do not fit, or there are fewer than two cells.
        """
        predicted, target, *rest = _compared(predicted, target, regularized)
        inv = (predicted - target).square().mean()
        with torch.autocast(predicted.device.type, enabled=False):
            branches = [self._spread(z) for z in (rest or (predicted, target))]
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
        if N < D and self.covariance and not self._warned:
            self._warned = True
            warnings.warn(
                f"the covariance of {D} dimensions is estimated from {N} samples: its term cannot fall much "
                f"below {(D - 1) / (N - 1):.2g}. Use a batch of more than {D}, or a smaller weight",
                stacklevel=3,
            )
        z = z - z.mean(dim=1, keepdim=True)
        deviation = torch.sqrt(z.square().sum(dim=1) / (N - 1) + EPSILON)
        covariance = z.transpose(1, 2) @ z / (N - 1)
        # The sum of all squares less the diagonal's: no mask of size (T, D, D).
        diagonal = covariance.diagonal(dim1=1, dim2=2).square().sum(dim=1)
        off_diagonal = (covariance.square().sum(dim=(1, 2)) - diagonal) / D
        return torch.relu(self.gamma - deviation).mean(), off_diagonal.mean()


class SIGRegLoss(nn.Module):
    """Sketched isotropic Gaussian regularization (LeJEPA; Balestriero & LeCun, arXiv 2511.08544, 2025).

    total = (1 - λ) · inv + λ · sigreg, with

    - inv: mean squared error of prediction and target;
    - sigreg: the Epps-Pulley statistic against N(0, 1) of the embeddings projected on a random unit
      vector, averaged over vectors, token positions and branches. It is

      N ∫ abs(φ̂(t) - exp(-t²/2))² exp(-t²/2) dt,

      φ̂ being the empirical characteristic function of the N cells. Its expectation on standard normal
      samples is √(2π) (1 - 1/√3) = 1.06 whatever N; on a collapsed batch it grows with N.

    Cells are compared **per token position**, as in :class:`VICRegLoss`. The vectors are drawn anew in each
    call from torch's random state, and are the same for all positions and branches. The integral is a
    trapezoid rule on 0 … ``t_max``, doubled, since the integrand is even; the paper takes the range
    -5 … 5. Memory grows with cells × positions × vectors × knots.

    Parameters
    ----------
    weight
        λ, between 0 and 1.
    num_slices
        Random vectors.
    knots, t_max
        Of the integral.
    """

    def __init__(
        self,
        weight: float = 0.05,
        num_slices: int = 256,
        knots: int = 17,
        t_max: float = 5.0,
    ) -> None:
        super().__init__()
        if not 0 <= weight <= 1:
            raise ValueError(f"the weight is {weight}; expected a number between 0 and 1")
        self.weight, self.num_slices = weight, num_slices
        self.knots, self.t_max = knots, t_max

    def forward(
        self, predicted: Tensor, target: Tensor, *regularized: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss.

        Parameters
        ----------
        predicted, target, regularized
            As of :class:`VICRegLoss`; here the mean over branches counts.

        Returns
        -------
        total
            Scalar.
        parts
            ``inv`` and ``sigreg`` before weighting, detached.

        Raises
        ------
        ValueError
            When shapes or dtypes do not fit, or there are fewer than two cells.
        """
        predicted, target, *rest = _compared(predicted, target, regularized)
        inv = (predicted - target).square().mean()
        vectors = torch.randn(
            predicted.shape[-1], self.num_slices, dtype=predicted.dtype, device=predicted.device
        )
        vectors = vectors / vectors.norm(dim=0)
        with torch.autocast(predicted.device.type, enabled=False):
            branches = [self._statistic(z, vectors) for z in (rest or (predicted, target))]
        sigreg = torch.stack(branches).mean()
        total = (1 - self.weight) * inv + self.weight * sigreg
        return total, {"inv": inv.detach(), "sigreg": sigreg.detach()}

    def _statistic(self, z: Tensor, vectors: Tensor) -> Tensor:
        """Epps-Pulley statistic of (B, T, D), mean over positions and vectors (D, slices)."""
        z = z.transpose(0, 1)
        N = z.shape[1]
        if N < 2:
            raise ValueError(f"the distribution of {N} cell(s) is not defined; use a larger batch")
        t = torch.linspace(0, self.t_max, self.knots, dtype=z.dtype, device=z.device)
        normal = torch.exp(-t.square() / 2)  # both the characteristic function of N(0, 1) and the window
        angle = (z @ vectors)[..., None] * t
        real, imaginary = angle.cos().mean(dim=1), angle.sin().mean(dim=1)
        error = (real - normal).square() + imaginary.square()
        return 2 * N * torch.trapezoid(error * normal, t).mean()
