"""Keep the training cells on the device and draw batches and populations there."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from biojepa.contracts import POPULATION, STRATEGY
from biojepa.pairs import CONTROL_CODE, Pairs

# Share of a GPU's free memory that the cells may take, dense and sparse.
GPU_SHARE = 0.4
# Bytes that dense cells may take in the memory of a CPU: jobs run side by side there.
CPU_DENSE = 256 * 2**20


def spread(cells: Tensor, size: int) -> Tensor:
    """Take at most ``size`` of ``cells`` (N,), evenly over their order."""
    place = torch.linspace(0, len(cells) - 1, min(size, len(cells)), device=cells.device)
    return cells[place.long()]


LAYOUTS = ("dense", "sparse", "host")


def _fitting_layout(pairs: Pairs, device: torch.device) -> str:
    dense = 4 * (len(pairs.indptr) - 1) * len(pairs.genes)
    if device.type != "cuda":
        return "dense" if dense <= CPU_DENSE else "sparse"
    free = GPU_SHARE * torch.cuda.mem_get_info(device)[0]
    return "dense" if dense <= free else "sparse" if 8 * len(pairs.data) <= free else "host"


class CellStore:
    """Expression of cells, of which rows are given dense, a batch at a time, on a device.

    ======  =================================================  ==========================================
    layout  cells are kept                                     chosen where
    ======  =================================================  ==========================================
    dense   on the device, dense                               they fit: then a batch is one gather
    sparse  on the device, sparse                              only that fits
    host    in the memory of the machine, pinned, sparse       a GPU has too little memory for either
    ======  =================================================  ==========================================

    What is given is the same to the last bit. From the layout ``host`` a batch is copied while the device
    computes, if :meth:`prefetch` says which one comes next.

    Parameters
    ----------
    pairs
        Where the cells are.
    device
        Where rows are wanted.
    layout
        One of the table; by default the first that fits: dense cells may take 256 MiB on a CPU, and cells
        40 % of the memory that is free on a GPU.
    """

    def __init__(self, pairs: Pairs, device: torch.device, layout: str | None = None) -> None:
        self.n_genes = len(pairs.genes)
        self.device = device
        self.layout = layout or _fitting_layout(pairs, device)
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout is {layout!r}; expected one of {', '.join(LAYOUTS)}")
        home = torch.device("cpu") if self.layout == "host" else device
        self.data = torch.from_numpy(pairs.data).to(home)
        self.indices = torch.from_numpy(pairs.indices.astype(np.int32, copy=False)).to(home)
        self.indptr = torch.from_numpy(pairs.indptr).to(home)
        self.log_library = torch.from_numpy(pairs.log_library_size.astype(np.float32)).to(device)
        self._dense: Tensor | None = None
        self._copier = ThreadPoolExecutor(1) if self.layout == "host" else None
        self._coming: dict[Hashable, Future[Tensor]] = {}
        # The longest row: a GPU pads to it, so that the shape of a batch need not be asked for.
        self._longest = int(np.diff(pairs.indptr).max(initial=1))
        if self.layout == "dense":
            parts = torch.arange(len(self), device=device).split(4096)
            self._dense = torch.empty(len(self), self.n_genes, device=device)
            for part in parts:
                self._dense[part] = self._scattered(part)
            del self.data, self.indices

    def __len__(self) -> int:
        return len(self.indptr) - 1

    def rows(self, cells: Tensor, key: Hashable = None) -> Tensor:
        """Return log-expression (B, genes) of ``cells`` (B,), without a loop over cells.

        ``key`` is that of :meth:`prefetch` where these cells were named before.
        """
        if self._dense is not None:
            return self._dense[cells]
        if self.layout == "sparse":
            return self._padded(cells) if self.device.type == "cuda" else self._scattered(cells)
        coming = self._coming.pop(key, None)
        return self._fetched(cells) if coming is None else coming.result()

    def prefetch(self, cells: Tensor, key: Hashable) -> None:
        """Begin to copy the rows that :meth:`rows` will be asked for with ``key``; only ``host`` needs it."""
        if self._copier is not None:
            self._coming[key] = self._copier.submit(self._fetched, cells)

    def _scattered(self, cells: Tensor) -> Tensor:
        row, column, value = self._entries(cells)
        out = torch.zeros(len(cells), self.n_genes, device=self.device)
        out[row, column] = value
        return out

    def _padded(self, cells: Tensor) -> Tensor:
        """As :meth:`_scattered`, in shapes that do not depend on the cells."""
        start = self.indptr[cells][:, None]
        length = self.indptr[cells + 1][:, None] - start
        offset = torch.arange(self._longest, device=self.device)
        place = (start + offset).clamp(max=len(self.data) - 1)
        # What pads goes to a column that is cut off.
        column = torch.where(offset < length, self.indices[place].long(), self.n_genes)
        out = torch.zeros(len(cells), self.n_genes + 1, device=self.device)
        return out.scatter_(1, column, self.data[place])[:, : self.n_genes]

    def _entries(self, cells: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Row, column and value of all that ``cells`` (B,) express."""
        start = self.indptr[cells]
        length = self.indptr[cells + 1] - start
        row = torch.repeat_interleave(torch.arange(len(cells), device=cells.device), length)
        first = torch.cumsum(length, 0) - length
        place = torch.arange(len(row), device=cells.device) - first[row] + start[row]
        return row, self.indices[place].long(), self.data[place]

    def _fetched(self, cells: Tensor) -> Tensor:
        entries = self._entries(cells.cpu())
        if self.device.type != "cuda":
            row, column, value = entries
        else:
            # Beside the stream that trains: it waits for the copy alone, and the host for neither.
            stream = torch.cuda.Stream(self.device)
            with torch.cuda.stream(stream):
                row, column, value = (
                    part.pin_memory().to(self.device, non_blocking=True) for part in entries
                )
            stream.synchronize()
            for part in (row, column, value):
                # Its memory is the other stream's: not to be taken again before it was read here.
                part.record_stream(torch.cuda.current_stream(self.device))
        out = torch.zeros(len(cells), self.n_genes, device=self.device)
        out[row, column] = value
        return out

    def gene_shares(self, cells: Tensor, target_sum: float, block: int = 4096) -> Tensor:
        """Share of each gene (genes,) in all UMIs of ``cells``, those of genes that are not kept included."""
        counts = torch.zeros(self.n_genes, dtype=torch.float64, device=self.device)
        for part in cells.split(block):
            size_factor = self.log_library[part].double().exp() / target_sum
            counts += size_factor @ self.rows(part).double().expm1()
        return (counts / self.log_library[cells].double().exp().sum()).float()

    def moments(
        self,
        cells: Tensor,
        block: int = 4096,
        transform: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (genes,) of the log-expression of ``cells``.

        Or of what ``transform`` makes of log-expression (B, genes) and log library sizes (B,).
        """
        total = torch.zeros(self.n_genes, dtype=torch.float64, device=self.device)
        squares = torch.zeros_like(total)
        for part in cells.split(block):
            x = self.rows(part)
            x = (x if transform is None else transform(x, self.log_library[part])).double()
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

    Where the pair stage chose another strategy than populations, the controls of the drawn cells are their
    partners.

    Parameters
    ----------
    pairs
        Codes of perturbation and batch, and of the context where one is held out; partners.
    device
        Where the drawing happens.
    """

    def __init__(self, pairs: Pairs, device: torch.device) -> None:
        self.device = device
        fixed = pairs.facts.get(STRATEGY, POPULATION) != POPULATION
        self.partner = torch.from_numpy(pairs.partner.astype(np.int64)).to(device) if fixed else None
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
        if self.partner is not None:
            return cells, self.partner[cells]
        return cells, self.draw_controls(self.group[cells])

    def draw_controls(self, group: Tensor) -> Tensor:
        """Draw a control cell for each code of batch and context, of any shape."""
        place = torch.rand(group.shape, device=self.device)
        return self.controls[self.control_first[group] + (place * self.control_count[group]).long()]
