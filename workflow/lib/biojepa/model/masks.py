"""Masks: what the context does not see."""

from __future__ import annotations

import torch
from torch import Tensor


def gene_mask(
    cells: int, genes: int, low: float = 0.3, high: float = 0.6, device: torch.device | str = "cpu"
) -> Tensor:
    """Hide a random share of the genes of each cell.

    Parameters
    ----------
    cells, genes
        Shape of the mask.
    low, high
        Each cell's share is uniform between them.

    Returns
    -------
    (cells, genes) bool, True where hidden.
    """
    if not 0 <= low <= high < 1:
        raise ValueError(f"masked shares are {low} to {high}; expected 0 <= low <= high < 1")
    share = low + (high - low) * torch.rand(cells, 1, device=device)
    return torch.rand(cells, genes, device=device) < share
