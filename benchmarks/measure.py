"""Time, memory, arithmetic and data that the benchmarks of training share."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from biojepa.pairs import CONTROL_CODE, Pairs


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    """Name the GPU, or say cpu."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


# Counts per cell that simulated expression is scaled to.
TARGET_SUM = 1e4


@dataclass(frozen=True)
class Turns:
    """Seconds per step of each turn: by the clock, and of this process's processors.

    Other processes slow the first and hardly the second; worker processes are in the first alone.
    """

    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)


def side_by_side(
    contenders: Mapping[str, Callable[[int], object]],
    steps: int,
    repeats: int,
    device: torch.device,
    warm_up: int = 3,
) -> dict[str, Turns]:
    """Time contenders in turns, so that a busy machine slows all of them.

    Parameters
    ----------
    contenders
        Name to a function that takes one step, given its number.
    steps, repeats
        Steps of a turn, and turns of each contender.
    warm_up
        Steps of each before the first turn: workers start, kernels are chosen or compiled.

    Returns
    -------
    Name to the seconds of the turns.
    """
    done = dict.fromkeys(contenders, 0)
    seconds = {name: Turns() for name in contenders}
    for turn in range(-1, repeats):
        for name, take_step in contenders.items():
            count = warm_up if turn < 0 else steps
            synchronize(device)
            began, used = time.perf_counter(), time.process_time()
            for _ in range(count):
                take_step(done[name])
                done[name] += 1
            synchronize(device)
            if turn >= 0:
                seconds[name].wall.append((time.perf_counter() - began) / steps)
                seconds[name].processor.append((time.process_time() - used) / steps)
    return seconds


def peak_memory(device: torch.device, run: Callable[[], object]) -> float:
    """Peak memory while ``run`` runs, GiB, with what was there before: resident, or allocated on a GPU.

    Linux only on a CPU, for it reads ``/proc``.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        run()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) / 2**30
    # 5 resets the peak, see proc(5).
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    run()
    return _resident("VmHWM") / 2**20


def _resident(name: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(name))


def count_flops(run: Callable[[], object]) -> int:
    """Count the floating-point operations of matrix products in ``run``, forward and backward.

    A multiplication and an addition are two. Attention is counted through its two products, because the
    fused kernel of a CPU is unknown to torch's counter.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def device_seconds(turns: Turns, device: torch.device) -> float:
    """Median seconds per step that the device was at work.

    On a CPU those of the processors, divided by the threads, because other processes share the machine.
    """
    if device.type == "cuda":
        return median(turns.wall)
    return median(turns.processor) / torch.get_num_threads()


def matmul_ceiling(device: torch.device, dtype: torch.dtype, repeats: int = 7) -> float:
    """Measure TFLOP/s of a large square matrix product: the median of ``repeats``, :func:`device_seconds`.

    Operands are random, because products of zeros may run faster.
    """
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    count = 20 if device.type == "cuda" else 2
    seconds = side_by_side({"product": lambda _: a @ b}, count, repeats, device)["product"]
    return 2 * size**3 / device_seconds(seconds, device) / 1e12


def simulated_pairs(
    n_cells: int, n_genes: int, n_labels: int = 50, expressed: float = 0.1, batches: int = 4, seed: int = 0
) -> Pairs:
    """Make a fold of random sparse cells, of which only the size matters.

    Parameters
    ----------
    expressed
        Share of the genes that a cell expresses.
    """
    rng = np.random.default_rng(seed)
    counts = rng.binomial(n_genes, expressed, n_cells)
    indices = np.concatenate([np.sort(rng.choice(n_genes, count, replace=False)) for count in counts])
    labels = tuple(f"P{i:05d}" for i in range(n_labels))
    perturbation = rng.integers(-1, n_labels, n_cells).astype(np.int32)
    perturbation[: n_cells // 10] = CONTROL_CODE
    batch = rng.integers(batches, size=n_cells).astype(np.int32)
    log_library = rng.normal(8.5, 0.3, n_cells).astype(np.float32)
    per_count = np.repeat(TARGET_SUM / np.exp(log_library.astype(np.float64)), counts)
    return Pairs(
        genes=tuple(f"G{i}" for i in range(n_genes)),
        data=np.log1p(rng.geometric(0.6, len(indices)) * per_count).astype(np.float32),
        indices=indices.astype(np.int32),
        indptr=np.append(0, np.cumsum(counts)).astype(np.int64),
        cell_names=tuple(f"cell{i}" for i in range(n_cells)),
        perturbation=perturbation,
        batch=batch,
        batches=tuple(f"b{i}" for i in range(batches)),
        log_library_size=log_library,
        partner=np.zeros(n_cells, dtype=np.int64),
        labels=labels,
        sets=("train",) * n_labels,
        categories=("",) * n_labels,
        types=("CRISPRi",),
        type_code=np.zeros(n_labels, dtype=np.int32),
        dose=np.ones(n_labels, dtype=np.float32),
        perturbed_genes=labels,
        codes={"network": rng.standard_normal((n_labels, 64)).astype(np.float32)},
        facts={
            "dataset": "simulated",
            "scheme": "perturbation",
            "fold": 0,
            "split_sha256": "0" * 8,
            "target_sum": TARGET_SUM,
        },
    )
