"""Read expression out of embeddings, and decide how much of a latent prediction to believe."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

MIN_T = 2.0


@dataclass(frozen=True)
class Readout:
    """Linear map from flattened, standardized tokens to log-expression.

    Attributes
    ----------
    weight
        (T·D, genes)
    bias
        (genes,)
    """

    weight: Tensor
    bias: Tensor

    def __call__(self, tokens: Tensor) -> Tensor:
        """Read log-expression (B, genes) out of tokens (B, T, D). Means in, means out: it is linear."""
        return tokens.flatten(1) @ self.weight + self.bias

    def change(self, tokens: Tensor) -> Tensor:
        """Read a change of log-expression (B, genes) out of a change of tokens (B, T, D)."""
        return tokens.flatten(1) @ self.weight


def fit_readout(
    batches: Callable[[], Iterable[tuple[Tensor, Tensor]]],
    check_tokens: Tensor,
    check_expression: Tensor,
    penalties: Iterable[float] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0),
) -> tuple[Readout, float]:
    """Fit the readout by ridge on training cells.

    Parameters
    ----------
    batches
        Yields (tokens (B, T, D), log-expression (B, genes)) of training cells.
    check_tokens, check_expression
        Means of *validation* perturbations (V, T, D) and (V, genes), which choose the penalty. Without
        any the middle candidate is taken.
    penalties
        Candidates, relative to the mean variance of the tokens times cells.

    Returns
    -------
    The readout, and the chosen penalty.
    """
    size, n_genes = check_tokens.shape[1:].numel(), check_expression.shape[-1]
    exact = check_tokens.double()  # sums over many cells need the precision
    gram, cross = exact.new_zeros(size, size), exact.new_zeros(size, n_genes)
    token_sum, expression_sum = exact.new_zeros(size), exact.new_zeros(n_genes)
    n = 0
    for tokens, expression in batches():
        z, x = tokens.flatten(1).double(), expression.double()
        gram, cross = gram + z.T @ z, cross + z.T @ x
        token_sum, expression_sum = token_sum + z.sum(dim=0), expression_sum + x.sum(dim=0)
        n += len(z)
    token_mean, expression_mean = token_sum / n, expression_sum / n
    gram = gram - n * torch.outer(token_mean, token_mean)
    cross = cross - n * torch.outer(token_mean, expression_mean)
    unit = gram.diagonal().mean()
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    candidates = []
    tried = sorted(penalties)
    for penalty in tried if len(check_tokens) else tried[len(tried) // 2 : len(tried) // 2 + 1]:
        weight = torch.linalg.solve(gram + penalty * unit * identity, cross)
        readout = Readout(weight.float(), (expression_mean - token_mean @ weight).float())
        # With one candidate there is nothing to choose by.
        error = float((readout(check_tokens) - check_expression).square().mean())
        candidates.append((error, readout, penalty))
    _, readout, penalty = min(candidates, key=lambda candidate: candidate[0])
    return readout, penalty


def gate(addition: np.ndarray, residual: np.ndarray) -> tuple[float, float]:
    """Decide how much of the latent prediction to add to the linear branch.

    The least-squares coefficient of ``residual`` on ``addition``, shrunken by 1 - 1/t² (the positive-part
    James-Stein factor) with t from the spread over perturbations, and 0 below t = 2. The perturbations
    are those that early stopping looked at, so the gate is lenient; the linear branch is the fall-back.

    Parameters
    ----------
    addition, residual
        (V, genes): what the latent predictor would add to, and what the linear branch leaves
        unexplained of, Δ of each *validation* perturbation.

    Returns
    -------
    gate
        Between 0 and 1; 0 with fewer than three validation perturbations.
    t
        The t statistic behind it.
    """
    energy = (addition**2).sum(axis=1)
    if len(addition) < 3 or energy.sum() <= 1e-12:
        return 0.0, 0.0
    coefficient = (addition * residual).sum() / energy.sum()
    # Sandwich variance with perturbations as units: genes of one perturbation are not independent.
    score = ((residual - coefficient * addition) * addition).sum(axis=1)
    n = len(addition)
    error = np.sqrt((score**2).sum() * n / (n - 1)) / energy.sum()
    t = float(coefficient / max(error, 1e-12))
    return (float(np.clip(coefficient * (1 - 1 / t**2), 0, 1)), t) if t >= MIN_T else (0.0, t)


def calibrate_scale(prediction: np.ndarray, observed: np.ndarray, pseudo: float = 0.0) -> float:
    """Return the factor, 0 to 2, that best scales predicted Δ to observed Δ of validation perturbations.

    Parameters
    ----------
    prediction, observed
        ``(V, genes)``; the factor is 1 when there is no validation perturbation.
    pseudo
        Perturbations of average predicted size to add whose best factor is 1: few real ones then move
        the factor little.
    """
    energy = (prediction**2).sum()
    if energy <= 1e-12:
        return 1.0
    prior = pseudo * energy / len(prediction)
    return float(np.clip(((prediction * observed).sum() + prior) / (energy + prior), 0, 2))
