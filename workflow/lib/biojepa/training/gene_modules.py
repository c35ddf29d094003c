"""Group genes that vary together over training cells, so that a mask can hide whole groups."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_ROUNDS = 50


def gene_modules(x: Tensor, n_modules: int, seed: int) -> Tensor:
    """Cluster genes by the correlation of their expression, spherical k-means with k-means++ starts.

    Distances are 1 - r between a gene and the mean profile of a module, both over the same cells. The
    result depends on ``x``, the number and the seed alone, on a given machine.

    Parameters
    ----------
    x
        (cells, genes) expression of training cells.
    n_modules
        Modules to make; at most as many as there are varying genes.
    seed
        Of the starts.

    Returns
    -------
    (genes,) module of each gene, 0…n-1; -1 for genes that do not vary.
    """
    if x.ndim != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (cells, genes)")
    profile = (x - x.mean(dim=0)).T
    length = profile.norm(dim=1)
    varying = (length > 1e-6).nonzero(as_tuple=True)[0]
    module = torch.full((x.shape[1],), -1, dtype=torch.long, device=x.device)
    if not len(varying):
        return module
    unit = profile[varying] / length[varying, None]
    generator = torch.Generator().manual_seed(seed)
    centres = unit[_starts(unit, min(n_modules, len(varying)), generator)]
    member = torch.full((len(unit),), -1, device=x.device)
    for _ in range(MAX_ROUNDS):
        nearest = (unit @ centres.T).argmax(dim=1)
        if torch.equal(nearest, member):
            break
        member = nearest
        sums = torch.zeros_like(centres).index_add_(0, member, unit)
        size = sums.norm(dim=1, keepdim=True)
        # A module that lost all its genes keeps its place.
        centres = torch.where(size > 1e-6, sums / size.clamp(min=1e-6), centres)
    _, compact = member.unique(return_inverse=True)
    module[varying] = compact
    return module


def _starts(unit: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw ``count`` genes far from each other (Arthur & Vassilvitskii 2007); drawn on the CPU."""
    chosen = [int(torch.randint(len(unit), (1,), generator=generator))]
    distance = torch.full((len(unit),), 2.0, dtype=unit.dtype)
    for _ in range(count - 1):
        to_last = (1 - unit @ unit[chosen[-1]]).clamp(min=0).cpu()
        distance = torch.minimum(distance, to_last)
        distance[chosen] = 0
        if float(distance.sum()) <= 0:
            break
        chosen.append(int(torch.multinomial(distance, 1, generator=generator)))
    return torch.tensor(chosen, device=unit.device)
