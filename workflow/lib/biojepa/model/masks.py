"""Masks: what the context sees, and what is predicted. All draw from torch's random state."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from biojepa.model.blocks import require_dtype, require_shape

ATTEMPTS = 50


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
    device
        Of the mask.

    Returns
    -------
    (cells, genes) bool, True where hidden.

    Raises
    ------
    ValueError
        When the shares are not 0 <= low <= high < 1.
    """
    share = _shares(cells, low, high, device)
    return torch.rand(cells, genes, device=device) < share


def module_mask(cells: int, modules: Tensor, low: float = 0.3, high: float = 0.6) -> Tensor:
    """Hide whole gene modules, so that a hidden gene cannot be read off the genes it moves with.

    Parameters
    ----------
    cells
        Rows of the mask.
    modules
        (genes,) integers: the module of each gene, or -1 for a gene that is in none; such genes are hidden
        one by one.
    low, high
        Each cell hides every module, and every gene that is in none, with the same probability, uniform
        between these.

    Returns
    -------
    (cells, genes) bool, True where hidden; on the device of ``modules``.

    Raises
    ------
    ValueError
        When ``modules`` has another shape or dtype, or the shares are not 0 <= low <= high < 1.
    """
    return unit_mask(cells, *mask_units(modules), low, high)


def mask_units(modules: Tensor) -> tuple[int, Tensor]:
    """Count the units that are hidden as one, and tell that of each gene (genes,): for :func:`unit_mask`.

    Worth keeping: a GPU has to be waited for to count them.
    """
    require_shape("modules", modules, (None,))
    require_dtype("modules", modules, torch.int64)
    alone = modules < 0
    # Genes in no module are modules of one gene.
    label = modules.clone()
    label[alone] = modules.max() + 1 + torch.arange(int(alone.sum()), device=modules.device)
    units, unit_of_gene = label.unique(return_inverse=True)
    return len(units), unit_of_gene


def unit_mask(cells: int, units: int, unit_of_gene: Tensor, low: float = 0.3, high: float = 0.6) -> Tensor:
    """Mask (cells, genes) as by :func:`module_mask`, of what :func:`mask_units` says of the modules."""
    share = _shares(cells, low, high, unit_of_gene.device)
    hidden = torch.rand(cells, units, device=unit_of_gene.device) < share
    return hidden[:, unit_of_gene]


def _shares(cells: int, low: float, high: float, device: torch.device | str) -> Tensor:
    """Draw each cell's share of what is hidden, (cells, 1)."""
    if not 0 <= low <= high < 1:
        raise ValueError(f"masked shares are {low} to {high}; expected 0 <= low <= high < 1")
    return low + (high - low) * torch.rand(cells, 1, device=device)


def perturbation_mask(is_control: Tensor) -> tuple[Tensor, Tensor]:
    """Let control cells be the context and perturbed cells the target.

    Parameters
    ----------
    is_control
        (cells,) bool.

    Returns
    -------
    context, target
        (cells,) bool each; every cell is in one of them.

    Raises
    ------
    ValueError
        When the shape or dtype is another one, or the batch has no cell of one kind.
    """
    require_shape("is_control", is_control, (None,))
    require_dtype("is_control", is_control, torch.bool)
    controls = int(is_control.sum())
    if controls in (0, len(is_control)):
        raise ValueError(
            f"of {len(is_control)} cells {controls} are controls; expected controls and perturbed cells both"
        )
    return is_control.clone(), ~is_control


def temporal_mask(
    frames: int,
    context: int = 4,
    target: int = 4,
    tokens_per_frame: int = 1,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Let the first frames be the context and those that follow the target (V-JEPA; Bardes et al. 2024).

    Parameters
    ----------
    frames
        Length of the sequence; frames after the target are in neither mask.
    context, target
        Numbers of frames.
    tokens_per_frame
        Consecutive tokens that make up a frame.
    device
        Of the masks.

    Returns
    -------
    context, target
        (frames · tokens_per_frame,) bool each, True where visible and where predicted.

    Raises
    ------
    ValueError
        When the sequence is too short, or a number is not positive.
    """
    if min(context, target, tokens_per_frame) < 1 or context + target > frames:
        raise ValueError(
            f"{context} context and {target} target frames of {tokens_per_frame} token(s) were asked for; "
            f"expected at least 1 each, and no more than the {frames} frames of the sequence together"
        )
    frame = torch.arange(frames, device=device).repeat_interleave(tokens_per_frame)
    return frame < context, (frame >= context) & (frame < context + target)


def random_block_mask(
    height: int,
    width: int,
    blocks: int = 4,
    target_scale: tuple[float, float] = (0.15, 0.2),
    target_aspect: tuple[float, float] = (0.75, 1.5),
    context_scale: tuple[float, float] = (0.85, 1.0),
    min_context: int = 1,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Choose target blocks and a large context block without them (I-JEPA; Assran et al., CVPR 2023).

    The target blocks are of one random size, at random places, and may overlap. The context is a random
    square block less all targets. Sizes are rounded to whole patches.

    Parameters
    ----------
    height, width
        Of the grid of patches.
    blocks
        Number of target blocks.
    target_scale, context_scale
        Range of a block's share of the grid.
    target_aspect
        Range of a target block's height divided by its width.
    min_context
        Patches that the context must keep; blocks are drawn again until it does.
    device
        Of the masks.

    Returns
    -------
    context
        (height · width,) bool, True where visible.
    targets
        (blocks, height · width) bool, True where predicted.

    Raises
    ------
    ValueError
        When a range is not one, or no draw leaves enough context.
    """
    for name, (low, high), most in (
        ("target_scale", target_scale, 1.0),
        ("context_scale", context_scale, 1.0),
        ("target_aspect", target_aspect, math.inf),
    ):
        if not 0 < low <= high <= most:
            raise ValueError(f"{name} is {low} to {high}; expected 0 < low <= high <= {most}")
    target_size = _block_size(height, width, target_scale, target_aspect)
    context_size = _block_size(height, width, context_scale, (1.0, 1.0))
    for _ in range(ATTEMPTS):
        targets = torch.stack([_block(height, width, *target_size) for _ in range(blocks)])
        context = _block(height, width, *context_size) & ~targets.any(dim=0)
        if int(context.sum()) >= min_context:
            return context.flatten().to(device), targets.flatten(1).to(device)
    raise ValueError(
        f"{ATTEMPTS} draws of {blocks} blocks of {target_size} patches on a grid of {(height, width)} left "
        f"the context fewer than {min_context} patch(es); expected smaller or fewer blocks, or a larger grid"
    )


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))


def _block_size(
    height: int, width: int, scale: tuple[float, float], aspect: tuple[float, float]
) -> tuple[int, int]:
    """Draw the height and width of a block, in patches.

    The second side makes up for the rounding, or the cutting, of the first, so that the area holds.
    """
    area = _uniform(*scale) * height * width
    rows = min(max(round(math.sqrt(area * _uniform(*aspect))), 1), height)
    columns = min(max(round(area / rows), 1), width)
    rows = min(max(round(area / columns), 1), height)
    return rows, columns


def _block(height: int, width: int, rows: int, columns: int) -> Tensor:
    """Place a block at random; (height, width) bool."""
    top = int(torch.randint(height - rows + 1, ()))
    left = int(torch.randint(width - columns + 1, ()))
    block = torch.zeros(height, width, dtype=torch.bool)
    block[top : top + rows, left : left + columns] = True
    return block
