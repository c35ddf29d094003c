"""Keep the training cells on the device and draw batches and populations there."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from biojepa.pairs import CONTROL_CODE, Pairs


def spread(cells: Tensor, size: int) -> Tensor:
    """Take at most ``size`` of ``cells`` (N,), evenly over their order."""
    place = torch.linspace(0, len(cells) - 1, min(size, len(cells)), device=cells.device)
    return cells[place.long()]


class CellStore:
    """Sparse expression of cells on a device, rows made dense a batch at a time.

    Parameters
    ----------
    pairs
        Where the cells are.
    device
        Where to keep them.
    """

    def __init__(self, pairs: Pairs, device: torch.device) -> None:
        self.n_genes = len(pairs.genes)
        self.device = device
        self.data = torch.from_numpy(pairs.data).to(device)
        self.indices = torch.from_numpy(pairs.indices.astype(np.int64)).to(device)
        self.indptr = torch.from_numpy(pairs.indptr).to(device)
        self.log_library = torch.from_numpy(pairs.log_library_size.astype(np.float32)).to(device)

    def __len__(self) -> int:
        return len(self.indptr) - 1

    def rows(self, cells: Tensor) -> Tensor:
        """Return log-expression (B, genes) of ``cells`` (B,), without a loop over cells."""
        start = self.indptr[cells]
        length = self.indptr[cells + 1] - start
        row = torch.repeat_interleave(torch.arange(len(cells), device=self.device), length)
        first = torch.cumsum(length, 0) - length
        place = torch.arange(len(row), device=self.device) - first[row] + start[row]
        out = torch.zeros(len(cells), self.n_genes, device=self.device)
        out[row, self.indices[place]] = self.data[place]
        return out

    def moments(self, cells: Tensor, block: int = 4096) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (genes,) of the log-expression of ``cells``."""
        total = torch.zeros(self.n_genes, dtype=torch.float64, device=self.device)
        squares = torch.zeros_like(total)
        for part in cells.split(block):
            x = self.rows(part).double()
            total, squares = total + x.sum(dim=0), squares + x.square().sum(dim=0)
        mean = total / len(cells)
        variance = (squares / len(cells) - mean.square()).clamp(min=0)
        return mean.float(), variance.sqrt().float()


class Populations:
    """Draw populations of cells of one perturbation, with controls of the same batches.

    A control and a perturbed cell share nothing but their batch, so single pairs are mostly noise;
    the means of populations are what a predictor can learn. Cells are drawn with replacement, and for
    each drawn cell a control of its batch, so that the batch composition of the two sides is the same. In
    the scheme context the control is of the same context too.

    Parameters
    ----------
    pairs
        Codes of perturbation and batch, and of the context where one is held out.
    device
        Where the drawing happens.
    """

    def __init__(self, pairs: Pairs, device: torch.device) -> None:
        self.device = device
        order = np.argsort(pairs.perturbation, kind="stable")
        counts = np.bincount(pairs.perturbation + 1, minlength=len(pairs.labels) + 1)
        self.order = torch.from_numpy(order).to(device)
        self.first = torch.from_numpy(np.cumsum(counts) - counts).to(device)
        self.count = torch.from_numpy(counts).to(device)
        n_batches, n_contexts = len(pairs.batches), max(len(pairs.contexts), 1)
        group = pairs.batch.astype(np.int64)
        if pairs.context is not None:
            group += pairs.context.astype(np.int64) * n_batches
        self.group = torch.from_numpy(group).to(device)
        controls = np.flatnonzero(pairs.perturbation == CONTROL_CODE)
        by_group = controls[np.argsort(group[controls], kind="stable")]
        per_group = np.bincount(group[controls], minlength=n_batches * n_contexts)
        # A batch without a control borrows from all batches: of its context, if that has any.
        per_context = np.repeat(per_group.reshape(n_contexts, n_batches).sum(axis=1), n_batches)
        before = np.cumsum(per_group) - per_group
        before_context = np.repeat(before[::n_batches], n_batches)
        lone, empty = per_group == 0, per_context == 0
        first = np.where(empty, 0, np.where(lone, before_context, before))
        count = np.where(empty, len(controls), np.where(lone, per_context, per_group))
        self.controls = torch.from_numpy(by_group).to(device)
        self.control_first = torch.from_numpy(first).to(device)
        self.control_count = torch.from_numpy(count).to(device)

    def draw(self, labels: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Draw ``size`` cells of each label (B,), and their controls; both (B, size)."""
        place = torch.rand(len(labels), size, device=self.device)
        slot = labels + 1
        cells = self.order[self.first[slot][:, None] + (place * self.count[slot][:, None]).long()]
        return cells, self.draw_controls(self.group[cells])

    def draw_controls(self, group: Tensor) -> Tensor:
        """Draw a control cell for each code of batch and context, of any shape."""
        place = torch.rand(group.shape, device=self.device)
        return self.controls[self.control_first[group] + (place * self.control_count[group]).long()]
