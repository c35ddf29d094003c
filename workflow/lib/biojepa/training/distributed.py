"""Share the encoder stage among processes started by torchrun, with the result of a single process.

Each process draws the same batch and the same masks, encodes its share of the cells, and gathers the
tokens of all shares. Losses are taken of the whole batch in every process, because variance and
covariance over a share are not those over the batch. Gradients are averaged over the processes, so that
all of them take the same step. Only dropout differs from a single process: each share draws its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from biojepa.errors import InputError


def world_size() -> int:
    """Count the processes that train together, 1 outside torchrun."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, 0 for the one that logs and writes."""
    return dist.get_rank() if world_size() > 1 else 0


def is_main() -> bool:
    """Say whether this process logs and writes."""
    return rank() == 0


def local_device_index() -> int:
    """Return the GPU of this process on its machine, as torchrun numbers them."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """Join the processes that torchrun started; do nothing where it started none or one.

    Parameters
    ----------
    device
        ``auto``, ``cpu`` or ``cuda``: gloo joins processes on CPUs, NCCL those on GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield
        return
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def wait_for_all() -> None:
    """Wait until every process is here."""
    if world_size() > 1:
        dist.barrier()


def share_of(size: int, key: str) -> slice:
    """Choose the rows of a batch of ``size`` that this process encodes.

    Raises
    ------
    InputError
        Naming ``key`` when the batch cannot be shared evenly.
    """
    processes = world_size()
    if size % processes:
        raise InputError(
            f"config key {key}",
            f"a batch of {size} cells for {processes} processes",
            f"a multiple of {processes}",
            "change the batch size or train.processes",
        )
    part = size // processes
    return slice(rank() * part, (rank() + 1) * part)


class _Gather(torch.autograd.Function):
    """Rows of all processes, in their order.

    Every process computes the same loss of the same rows, so the gradient of its own rows is complete
    without communication. It is multiplied by the number of processes, because :func:`average_gradients`
    divides by it: the average is then right both for parameters before the gathering, to which each
    process contributes its rows, and for those behind it, whose gradient is the same everywhere.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(parts, x.contiguous())
        ctx.rows = len(x)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        start = rank() * ctx.rows
        return gradients[0][start : start + ctx.rows] * world_size()


def gather_rows(x: Tensor) -> Tensor:
    """Gather ``x`` (B / processes, …) of all processes as (B, …), with gradient."""
    return x if world_size() == 1 else _Gather.apply(x)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average the gradients over the processes, all in one message.

    A parameter that only some shares used, such as the interaction where only some drew a combination,
    counts as zero in the others. One that none used keeps no gradient, so that it is not decayed either.
    """
    if world_size() == 1:
        return
    parameters = list(parameters)
    if not parameters:
        return
    used = torch.tensor([p.grad is not None for p in parameters], device=parameters[0].device).int()
    dist.all_reduce(used)
    averaged = [p for p, count in zip(parameters, used.tolist(), strict=True) if count]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in averaged]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= world_size()
    for parameter, values in zip(averaged, flat.split([g.numel() for g in gradients]), strict=True):
        parameter.grad = values.view_as(parameter)


@contextmanager
def own_randomness(part: int = 0) -> Iterator[None]:
    """Draw dropout of this process's own, and leave the random state that all processes share as it was.

    Without other processes nothing changes. ``part`` numbers the micro-batches of a step.
    """
    if world_size() == 1:
        yield
        return
    seed = (torch.initial_seed() * 1009 + part * world_size() + rank() + 1) % 2**63
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield
