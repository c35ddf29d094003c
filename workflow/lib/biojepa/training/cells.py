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
    each drawn cell a control of its batch, so that the batch composition of the two sides is the same.

    Parameters
    ----------
    pairs
        Codes of perturbation and batch.
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
        self.batch = torch.from_numpy(pairs.batch.astype(np.int64)).to(device)
        controls = np.flatnonzero(pairs.perturbation == CONTROL_CODE)
        by_batch = controls[np.argsort(pairs.batch[controls], kind="stable")]
        per_batch = np.bincount(pairs.batch[controls], minlength=len(pairs.batches))
        # A batch without a control borrows from all of them.
        first = np.where(per_batch > 0, np.cumsum(per_batch) - per_batch, 0)
        self.controls = torch.from_numpy(by_batch).to(device)
        self.control_first = torch.from_numpy(first).to(device)
        self.control_count = torch.from_numpy(np.where(per_batch > 0, per_batch, len(controls))).to(device)

    def draw(self, labels: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Draw ``size`` cells of each label (B,), and their controls; both (B, size)."""
        place = torch.rand(len(labels), size, device=self.device)
        slot = labels + 1
        cells = self.order[self.first[slot][:, None] + (place * self.count[slot][:, None]).long()]
        return cells, self.draw_controls(self.batch[cells])

    def draw_controls(self, batch: Tensor) -> Tensor:
        """Draw a control cell for each batch code, of any shape."""
        place = torch.rand(batch.shape, device=self.device)
        return self.controls[self.control_first[batch] + (place * self.control_count[batch]).long()]
